"""Where a network and its batches are computed, in which memory format and precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..network.inputs import map_tensors

__all__ = ["AMP_DTYPES", "Placement"]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Placement:
    """Moves a network and its batches to where and to what they are computed in.

    Args:
        device: where to compute.
        amp: None for full precision, "bf16" or "fp16".
        channels_last: whether networks and images (B, C, H, W) are in the channels_last memory format.

    Raises:
        ValueError: amp is something else.
    """

    def __init__(
        self, device: torch.device | str, amp: str | None = None, channels_last: bool = False
    ) -> None:
        if amp is not None and amp not in AMP_DTYPES:
            raise ValueError(f"amp is {amp!r}; it must be None, {' or '.join(map(repr, AMP_DTYPES))}")
        self.device = torch.device(device)
        self.amp = amp
        self.channels_last = channels_last

    def model(self, model: nn.Module) -> None:
        """Moves a network, in place."""
        model.to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)

    def images(self, images: Tensor) -> Tensor:
        """The images of a batch, moved."""
        memory_format = (
            torch.channels_last if self.channels_last and images.ndim == 4 else torch.preserve_format
        )
        return images.to(self.device, non_blocking=True, memory_format=memory_format)

    def batch(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """A batch to train on, moved: the model's inputs, in any form that `GKT` takes, and the targets."""
        return map_tensors(self.images, inputs), map_tensors(self._targets, targets)

    def _targets(self, targets: Tensor) -> Tensor:
        return targets.to(self.device, non_blocking=True)

    def loader(self, loader: Iterable[Any]) -> Iterator[Any]:
        """A loader's batches, of any form, with every tensor moved."""
        for batch in loader:
            yield map_tensors(self.images, batch)

    def autocast(self) -> AbstractContextManager:
        """Inside, the forward pass runs in the precision of `amp`."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp])
