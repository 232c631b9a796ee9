"""Subnets on a share of the batch (`GKTConfig.subnet_share`): which rows are theirs, and where they are taken.

The full network sees all B rows, subnets m of them. What a subnet has in common with the full network is computed once,
on B rows. The first layer in which it differs (behind a block that it drops, or with random numbers of its own) reads
the first m rows of that activation. To the model's own code a subnet's batch has m rows from the input on: there the
layers in common hand out the first m rows of what they gave for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..network.inputs import map_tensors, rows_in, tensors_in
from ..subnets.streams import Streams

__all__ = ["Share", "share_of"]

_SET_ASIDE = "Set subnet_share=1, so that subnets see the whole batch"


class Share(NamedTuple):
    """The rows of a batch that subnets see.

    Args:
        batch: B, the rows of the full network.
        rows: m, the first ones, of the subnets; less than B.
    """

    batch: int
    rows: int

    def cut(self, values: Any) -> Any:
        """The first m rows of every tensor with B of them, in nested tuples, lists and mappings; others as they are."""

        def head(tensor: Tensor) -> Tensor:
            return tensor[: self.rows] if self._is_batch(tensor) else tensor

        return map_tensors(head, values)

    def cut_targets(self, targets: Any) -> Any:
        """The targets of the first m rows, in whatever form a criterion takes them.

        Beside tensors of B rows, a list or tuple of B entries without such tensors is taken for one entry a row.

        Raises:
            ValueError: nothing in the targets has B rows.
        """
        if isinstance(targets, Tensor):
            return self.cut(targets)
        found: list[Any] = []
        result = self._cut_nested(targets, found)
        if not found:
            raise ValueError(
                f"targets is {type(targets).__name__}, in which nothing has the batch's {self.batch} rows; with "
                f"subnet_share below 1 the criterion is called for subnets with the targets of {self.rows}. Let them "
                f"hold tensors whose first dimension is the batch, or a list with one entry a row. {_SET_ASIDE}"
            )
        return result

    def _cut_nested(self, values: Any, found: list[Any]) -> Any:
        """The same of any values; what was cut is put on `found`."""
        if isinstance(values, Tensor):
            if self._is_batch(values):
                found.append(values)
            return self.cut(values)
        if isinstance(values, Mapping):
            return {key: self._cut_nested(value, found) for key, value in values.items()}
        if not isinstance(values, list | tuple):
            return values
        if len(values) == self.batch and not any(self._is_batch(tensor) for tensor in tensors_in(values)):
            found.append(values)
            return values[: self.rows]
        entries = [self._cut_nested(value, found) for value in values]
        return type(values)(*entries) if hasattr(values, "_fields") else type(values)(entries)

    def _is_batch(self, tensor: Tensor) -> bool:
        return bool(tensor.dim()) and tensor.shape[0] == self.batch

    def check_block(self, path: str, output: Any) -> None:
        """Checks that what a block of the full network returned can be cut.

        Raises:
            ValueError: its leading dimension isn't the batch.
        """
        activation = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if activation is None or not activation.dim() or activation.shape[0] != self.batch:
            shape = None if activation is None else tuple(activation.shape)
            raise ValueError(
                f"block {path!r} returns an activation of shape {shape} for a batch of {self.batch} rows; with "
                f"subnet_share below 1 its first dimension must be the batch, of which subnets go on with the first "
                f"{self.rows} rows. {_SET_ASIDE}"
            )

    def check_logits(self, logits: Tensor, of_subnet: bool) -> None:
        """Checks that a stream's logits are of its rows.

        Raises:
            ValueError: they aren't.
        """
        rows = self.rows if of_subnet else self.batch
        if not logits.dim() or logits.shape[0] != rows:
            whose = "a subnet" if of_subnet else "the full network"
            raise ValueError(
                f"the model returned logits of shape {tuple(logits.shape)} for {whose}, which sees {rows} of the "
                f"batch's {self.batch} rows (subnet_share): a layer takes another dimension for the batch. {_SET_ASIDE}"
            )


def share_of(streams: Streams, inputs: tuple[Any, ...]) -> Share | None:
    """The rows of this batch that subnets see; None: all."""
    batch = rows_in(inputs)
    if batch is None or len(streams.dropped) == 1:
        return None
    rows = streams.config.subnet_rows(batch)
    return None if rows == batch else Share(batch, rows)
