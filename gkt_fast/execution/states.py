"""Runs the streams of a step so that every distinct activation is computed once.

A state is the sequence of layers executed so far (blocks, and the modules between them). The model's own forward runs
once per stream; a layer that was already executed in the same state hands out the result that it gave then, a dropped
block hands its input through. So shared prefixes cost nothing, and what is computed is exactly what the streams would
compute one by one.

With a share of the batch for subnets (share.py) the full network's stream comes first, on all rows. The states on its
path hand the first rows of their activations to the other streams.

Streams that share a state share its tensors. A block that writes into its input would corrupt them, so the first
real call of every layer gets a copy: a layer that writes into it keeps getting copies, the others never again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..network.block_order import BlockOrder
from ..network.calls import SharedStateError, versions
from ..network.interception import Site
from ..network.network import Network
from ..network.noise import DrawDetector, forbid_draws
from ..network.recomputation import Regions, recomputing
from .share import Share

__all__ = ["States"]


class _State:
    """An activation: what the last layer returned, and the states reached from here."""

    __slots__ = ("children", "cut", "output", "past_stem", "statistics", "versions")

    def __init__(self, output: Any, past_stem: bool, statistics: list) -> None:
        self.output = self.cut = output
        self.versions = versions(output)
        self.past_stem = past_stem
        self.statistics = statistics
        self.children: dict[tuple[int, int | None], _State] = {}

    def release(self) -> None:
        """Lets go of the activation; no stream will read it again."""
        self.output = self.cut = None
        self.versions = []


class States:
    """The states of one step.

    Args:
        network: the network; what is learnt of its layers is kept there from step to step.
        statistics: list that BatchNorm layers append to as they run (`batch_norm.record_statistics`); the states
            remember what was appended while they were computed.
        independent_noise: whether every stream runs the layers by itself that draw random numbers, and what follows.
        share: the rows of the batch that all streams but the first see; None: all.
    """

    def __init__(
        self, network: Network, statistics: list, *, independent_noise: bool, share: Share | None
    ) -> None:
        self.network = network
        self.share = share
        self.statistics = statistics
        self.order = BlockOrder(network.sites)
        self._noisy = network.noisy_layers() if independent_noise else frozenset()
        self._detector = DrawDetector(network.model) if independent_noise else None
        self.root = self.state = _State(None, False, [])
        self.path: list[_State] = []
        self.past_stem = False
        self.dropped: frozenset[str] = frozenset()
        self.stream_statistics: list[list] = []
        self.active = True
        self._regions = Regions()

    def begin_stream(self, dropped: frozenset[str]) -> None:
        """Starts at the input again; blocks at the paths in `dropped` are skipped."""
        self.dropped = dropped
        self.state = self.root
        self.path = []
        self.past_stem = False
        self.stream_statistics.append([])
        self.order.begin_stream()

    def end_stream(self, logits: Tensor) -> None:
        """Checks that the stream called its blocks, and left every activation that others may read as it was.

        Args:
            logits: the stream's.

        Raises:
            SharedStateError: the model changed one in place, or a backward would recompute other layers than it ran.
            ValueError: it called other blocks than it should (see `BlockOrder`), or its logits are of other rows.
        """
        self.order.end_stream()
        if self.share is not None:
            self.share.check_logits(logits, of_subnet=not self._reads_all_rows)
        reason = self._regions.reason_against()
        if reason is not None:
            raise SharedStateError(reason)
        self._regions = Regions()
        for state in self.path:
            if state.past_stem:
                _check_untouched(state, "after it left a block")

    def run_model(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on the rows of the inputs that the stream sees which was begun last."""
        if not self._reads_all_rows:
            args, kwargs = self.share.cut((args, kwargs))
        return self.network.model(*args, **kwargs)

    @property
    def _reads_all_rows(self) -> bool:
        return self.share is None or len(self.stream_statistics) == 1

    def close(self) -> None:
        """Lets go of the activations. Later calls (a recomputation during backward) just run the module."""
        self.active = False
        self.root = self.state = _State(None, False, [])
        self.path = []

    def call(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A call of the layer at `site`; the handler for `intercept`."""
        if not self.active or recomputing():
            return module(*args, **kwargs)
        self.past_stem = self.past_stem or site.is_block
        self.order.call(site)
        if site.path in self.dropped:
            self._note_call(site, ran=False)
            return self.network.skip(site, args, kwargs)
        noisy = site.path in self._noisy
        key = (site.index, len(self.stream_statistics) if noisy else None)
        child = self.state.children.get(key)
        self._note_call(site, ran=child is None)
        if child is None:
            with forbid_draws(None if noisy else self._detector, site.path):
                child = self._execute(site, module, args, kwargs)
            self.state.children[key] = child
        self.state = child
        self.path.append(child)
        self.stream_statistics[-1].extend(child.statistics)
        return child.output if self._reads_all_rows else child.cut

    def _note_call(self, site: Site, ran: bool) -> None:
        reason = self._regions.call(site.path, ran)
        if reason is not None:
            raise SharedStateError(f"{reason}. Use use_reentrant=False, or execution='sequential'")

    def _execute(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> _State:
        _check_untouched(self.state, f"before {site.path!r}")
        before = len(self.statistics)
        # Before the first block, kept or dropped, streams don't part: the stem may write into its own.
        if self.past_stem:
            output = self.network.run_on_shared_input(site, module, args, kwargs)
        else:
            output = module(*args, **kwargs)
        if site.is_block:
            self.network.learn_returns(site, output)
            if self.share is not None and self._reads_all_rows:
                self.share.check_block(site.path, output)
        return self._state(output, self.past_stem, self.statistics[before:])

    def _state(self, output: Any, past_stem: bool, statistics: list) -> _State:
        """A state that the stream begun last came to first."""
        state = _State(output, past_stem, statistics)
        if self.share is not None and self._reads_all_rows:
            state.cut = self.share.cut(output)
        return state


def _check_untouched(state: _State, where: str) -> None:
    if versions(state.output) != state.versions:
        raise SharedStateError(
            f"the model changed an activation in place outside its blocks, {where} "
            "(for example x += y, or an in-place activation outside any module); streams share that "
            "activation. Use execution='sequential', or make that operation out of place"
        )
