"""One subnet's stream by itself, on its share of the batch.

The model runs twice. First on all rows, up to the layer in which the subnet leaves the full network: the layers that
both have in common run, and the first rows of what they give are kept. Then on the subnet's rows, where these layers
hand out what was kept. So the model's own code never meets activations of different rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..network.block_order import BlockOrder
from ..network.calls import SharedStateError
from ..network.inputs import map_tensors
from ..network.interception import Site
from ..network.network import Network
from ..network.recomputation import Regions, recomputing
from .share import Share

__all__ = ["CutStream"]


class _LeavesError(BaseException):
    """The stream comes to where its subnet leaves the full network. No error: a model's `except` must not see it."""


class CutStream:
    """Handles the layers of one subnet's stream, which runs within `intercept(model, network.sites, stream.call)`.

    Args:
        network: the network.
        dropped: paths of the blocks that the subnet drops.
        noisy: paths of the layers that draw random numbers of this stream's own; the subnet leaves the full network
            there.
        share: the subnet's rows.
        order: of the blocks, with the full network's stream on record.
    """

    def __init__(
        self,
        network: Network,
        dropped: frozenset[str],
        noisy: frozenset[str],
        share: Share,
        order: BlockOrder,
    ) -> None:
        self.sites = network.sites
        self._network = network
        self._dropped = dropped
        self._leaves = dropped | noisy
        self._share = share
        self._order = order
        self._kept: deque[tuple[str, Any]] = deque()
        self._on_all_rows = True
        self._regions = Regions()

    def logits(self, forward: Callable[[Share | None], Tensor]) -> Tensor:
        """The stream's logits, of the subnet's rows.

        Args:
            forward: runs the model on all rows of its inputs, or on a share of them, and returns the logits.

        Raises:
            SharedStateError: a backward would recompute layers that were handed out.
            ValueError: the model calls other blocks on fewer rows, or returns logits of other rows.
        """
        self._order.begin_stream()
        try:
            logits = self._share.cut(forward(None))  # a subnet that is the full network
        except _LeavesError:
            self._on_all_rows = False
            self._order.begin_stream()
            logits = forward(self._share)
        self._order.end_stream()
        self._share.check_logits(logits, of_subnet=True)
        self._refuse(self._regions.reason_against())
        return logits

    def call(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A call of the layer at `site`; the handler for `intercept`."""
        if recomputing():
            return self._run(site, module, args, kwargs)
        self._order.call(site)
        if self._on_all_rows:
            if site.path in self._leaves:
                raise _LeavesError
            self._refuse(self._regions.call(site.path, ran=True))
            output = module(*args, **kwargs)
            # Copies, since the model may go on to write into what the layer gave.
            self._kept.append((site.path, map_tensors(Tensor.clone, self._share.cut(output))))
            return output
        if not self._kept:
            self._regions.call(site.path, ran=True)
            return self._run(site, module, args, kwargs)
        path, output = self._kept.popleft()
        if path != site.path:
            raise ValueError(
                f"the model called {site.path!r} for {self._share.rows} rows where it called {path!r} for "
                f"{self._share.batch}; with subnet_share below 1 it must call the same layers. Set subnet_share=1"
            )
        self._refuse(self._regions.call(site.path, ran=False))
        return output

    def _run(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if site.path in self._dropped:
            return self._network.skip(site, args, kwargs)
        output = module(*args, **kwargs)
        if site.is_block:
            self._network.learn_returns(site, output)
        return output

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise SharedStateError(
                f"{reason}. With subnet_share below 1 that holds for execution='sequential' too: use "
                "use_reentrant=False, checkpoint each block by itself, or set subnet_share=1"
            )
