"""`execution="stacked"`: every state once, and the states that run the same layer as one batch.

The model's own forward runs once, on activations in which the ghost batches (B rows each) of several states are
stacked. With a share of the batch for subnets (share.py) only the full network's has B rows; a state that leaves it
takes its first rows along. Where states meet, they are ordered by the number of blocks that lie before them, most
first: those that still run are then a leading slice. A state that a stream keeps while others go on is put aside, and
is stacked again where its streams run next. BatchNorm normalises every ghost batch by itself. The full network runs
every block, so its ghost batch comes first.

No layer but BatchNorm may mix the rows of a batch, and blocks must take and return one activation (other arguments may
not be tensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from ..batch_norm.fusion import FusedBlock
from ..batch_norm.kinds import is_batch_norm
from ..batch_norm.layer import ghost_batches, run_batch_norm_layer
from ..batch_norm.statistics import StreamStatistics
from ..network.block_order import BlockOrder
from ..network.calls import leaves_of
from ..network.inputs import call_model
from ..network.interception import Site, find_layers, intercept
from ..network.network import Network
from ..network.noise import DrawDetector, forbid_draws
from ..network.recomputation import Regions, in_region, recomputing
from ..subnets.plan import Layer, Plan, make_plan
from ..subnets.streams import Streams
from .partition import Rows, lead_and_kept
from .share import Share, share_of
from .stackable import (
    RECOMPUTED,
    StackingError,
    allow_recomputation,
    batch_norms,
    forbid_recomputation,
    reason_against,
)
from .step import Mode, StepResult
from .stream_loss import step_loss

__all__ = ["MODE", "run_stacked"]

_NOTHING = nullcontext()


def run_stacked(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs all streams in one forward. `loss_scale` is not needed: backward comes later.

    Raises:
        StackingError: it shows while the model runs that it can't be stacked.
    """
    share = share_of(streams, inputs)
    logits, full = _stacked_logits(network, inputs, streams, share, watch=not network.returns)
    loss, terms, learnt = step_loss(logits, targets, streams, full, share)
    forbid_recomputation(network, loss)
    return StepResult(loss, terms, (logits[0] if full is None else full).detach(), learnt)


def _forward(network: Network, inputs: tuple[Any, ...], streams: Streams) -> list[Tensor]:
    logits, full = _stacked_logits(network, inputs, streams, share_of(streams, inputs), watch=True)
    return [*([] if full is None else [full]), *logits.unbind()]


def _stacked_logits(
    network: Network, inputs: tuple[Any, ...], streams: Streams, share: Share | None, watch: bool
) -> tuple[Tensor, Tensor | None]:
    """(S, B, ...) logits; with a share those of the subnets (S - 1, m, ...) and of the full network (B, ...).

    `watch`: for decisions by an activation's values.
    """
    independent_noise = streams.config.independent_noise
    plan = make_plan(network.layers(independent_noise), streams.dropped)
    statistics = StreamStatistics(streams.all_update_statistics)
    stack = _Stack(plan, network, statistics, independent_noise=independent_noise, share=share)
    allow_recomputation(batch_norms(network))
    norms = network.once("outer batch norms", lambda: _batch_norms_outside_fused_blocks(network.model))
    with (
        _RefuseDecisions() if watch else nullcontext(),
        intercept(network.model, norms, _call_batch_norm),
        intercept(network.model, network.sites, stack.call),
    ):
        logits = stack.per_stream(network.logits(call_model(network.model, inputs)))
    stack.order.end_stream()
    statistics.update()
    return logits


def _batch_norms_outside_fused_blocks(model: nn.Module) -> list[Site]:
    """Those that don't run per ghost batch by themselves."""
    sites = find_layers(model, lambda module: is_batch_norm(module) or isinstance(module, FusedBlock))
    return [site for site in sites if is_batch_norm(model.get_submodule(site.path))]


class _RefuseDecisions(TorchFunctionMode):
    """Refuses what decides by an activation's values: it would see those of several states at once."""

    _readers = frozenset(
        ("__bool__", "__float__", "__index__", "__int__", "equal", "is_nonzero", "item", "tolist")
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._readers:
            raise StackingError(
                f"the model reads a value of a tensor ({name}) in its forward; under execution='stacked' it would "
                "see several states at once"
            )
        return func(*args, **(kwargs or {}))


def _call_batch_norm(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    if module.training and not recomputing() and in_region():
        raise StackingError(RECOMPUTED)
    return run_batch_norm_layer(module, *args, **kwargs)


class _Stack:
    """The states whose ghost batches the model's forward passes along.

    Args:
        plan: the states of the step.
        network: the network.
        statistics: receives the batch statistics of every BatchNorm call.
        independent_noise: whether layers that draw random numbers draw them for each stream.
        share: the rows that subnets see; None: all.
    """

    def __init__(
        self,
        plan: Plan,
        network: Network,
        statistics: StreamStatistics,
        *,
        independent_noise: bool,
        share: Share | None,
    ) -> None:
        self._rows = None if share is None else Rows(share.batch, share.rows)
        self.plan = plan
        self.network = network
        self.statistics = statistics
        self.position = 0
        self.stacked = [tuple(range(len(plan.paths)))]
        self.aside: dict[int, Tensor] = {}
        self.passed: Any = None
        self._regions = Regions()
        self.order = BlockOrder(network.sites)
        self.order.begin_stream()
        self._detector = DrawDetector(network.model) if independent_noise else None
        self._running = _streams_of_layers(plan)
        self._state_of = [0] * len(plan.paths)
        self._next = [0] * len(plan.paths)

    def call(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A call of the layer at `site`; the handler for `intercept`."""
        if recomputing():
            return module(*args, **kwargs)
        self.order.call(site)
        layer = self.plan.layers[self.position] if self.position < len(self.plan.layers) else None
        if layer is None or layer.path != site.path:
            raise StackingError(
                f"the model called {site.path!r} where its forward in evaluation mode calls another layer; "
                f"execution='stacked' needs the same order of calls in every step. {self.order.advice}"
            )
        if self.aside and not (args and args[0] is self.passed):
            raise StackingError(
                f"the model computes something between two blocks, before {site.path!r}, outside any module; "
                "execution='stacked' can't apply that to the states that it put aside"
            )
        if site.is_block:
            return self._run_block(site, module, args, kwargs)
        self._check_recomputation(site, module, arranged=False)
        output = self._run(site, module, args, kwargs)
        self._advance()
        return output

    def _run_block(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        tensors = [leaf for leaf in leaves_of(args, kwargs) if isinstance(leaf, Tensor)]
        if not args or [*map(id, tensors)] != [id(args[0])]:
            raise StackingError(
                f"block {site.path!r} takes {len(tensors)} tensors; execution='stacked' needs blocks that take one "
                "activation, as their first argument"
            )
        x = args[0]
        if x is not self.passed:
            x = self._arrange(x)
        self._check_recomputation(site, module, arranged=x is not args[0])
        y = self._run(site, module, (x, *args[1:]), kwargs)
        if not isinstance(y, Tensor) or y.shape[0] != x.shape[0]:
            raise StackingError(
                f"block {site.path!r} returns {type(y).__name__}; execution='stacked' needs blocks that return one "
                "activation with as many rows as their input"
            )
        self.network.learn_returns(site, y)
        self._advance()
        self.passed = y = self._arrange(y)
        return y

    def _run(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        detector = None if self.plan.layers[self.position].draws_noise else self._detector
        with (
            ghost_batches(len(self.stacked), self.statistics.receiver(self.stacked), self._rows),
            _NOTHING if detector is None else forbid_draws(detector, site.path),
        ):
            if self.position == 0 and not site.is_block:
                return module(*args, **kwargs)
            return self.network.run_on_shared_input(site, module, args, kwargs)

    def _check_recomputation(self, site: Site, module: nn.Module, arranged: bool) -> None:
        """A region that a backward recomputes calls the layer by itself, on what came in."""
        reason = self._regions.call(site.path, ran=True)
        if reason is None and self._regions.crowded:
            reason = f"activation checkpointing holds {site.path!r} and another layer in one region"
        if reason is None and self._regions.in_region:
            if arranged:
                reason = (
                    f"states are stacked before {site.path!r}, within a region of activation checkpointing"
                )
            elif any(isinstance(inner, _NormBase) and inner.training for inner in module.modules()):
                raise StackingError(RECOMPUTED)
        if reason is not None:
            raise StackingError(f"{reason}, which execution='stacked' can't recompute")

    def _moves(self, stream: int) -> bool:
        """Whether the stream runs the next layer."""
        return self.position < len(self._running) and stream in self._running[self.position]

    def _stays_stacked(self) -> bool:
        """Whether the next layer is run by the streams of the block before it, which are stacked as it needs them."""
        here, layers = self.position, self.plan.layers
        return (
            0 < here < len(layers)
            and layers[here].is_block
            and layers[here - 1].is_block
            and not layers[here].draws_noise
            and self._running[here] == self._running[here - 1]
        )

    def _advance(self) -> None:
        """The stacked states have run the layer: their streams are in the states after it."""
        for streams in self.stacked:
            for stream in streams:
                self._state_of[stream] = self.plan.paths[stream][self._next[stream]]
                self._next[stream] += 1
        self.position += 1

    def _arrange(self, x: Tensor) -> Tensor:
        """Of the states in `x` and those put aside, stacks the ones that run the next layer and keeps the others.

        Before a layer that is no block (or at the end) all are stacked: the model may compute anything there. Streams
        that will draw noise of their own before the next block get a ghost batch each.
        """
        if self._rows is None and self._stays_stacked():
            return x
        rows = self._rows_of(x)
        if self._stays_stacked():
            return x
        segment = self._until_next_block()
        is_block = bool(segment) and segment[0].is_block
        apart = any(layer.draws_noise for layer in segment)
        run: dict[tuple[int, int], list[int]] = {}
        stay: dict[int, list[int]] = {}
        for stream, state in enumerate(self._state_of):
            if not is_block or self._moves(stream):
                run.setdefault((state, stream if apart else -1), []).append(stream)
            else:
                stay.setdefault(state, []).append(stream)
        index = {stream: i for i, streams in enumerate(self.stacked) for stream in streams}
        stacked = [tuple(streams) for streams in run.values()]
        kept = {state: index[streams[0]] for state, streams in stay.items() if streams[0] in index}
        if sorted(index.get(streams[0], -1) for streams in stacked) == list(range(len(stacked))):
            stacked.sort(key=lambda streams: index[streams[0]])
            x, parts = lead_and_kept(x, rows, len(stacked), list(kept.values()))
        else:
            stacked.sort(key=self._run_length, reverse=True)
            others = [streams[0] for streams in stacked[1:]]  # behind the full network's
            here = [stream for stream in others if stream in index]
            lead, parts = lead_and_kept(x, rows, 1, [*(index[stream] for stream in here), *kept.values()])
            found = dict(zip(here, parts, strict=False))
            parts = parts[len(here) :]
            x = torch.cat(
                [lead, *(found[s] if s in found else self.aside[self._state_of[s]] for s in others)]
            )
        self.aside = {state: self.aside[state] for state in stay if state not in kept}
        self.aside |= dict(zip(kept, parts, strict=True))
        self.stacked = stacked
        return x

    def _rows_of(self, x: Tensor) -> Rows:
        """Of the ghost batches in `x`."""
        if self._rows is None:
            return Rows(*(x.shape[0] // len(self.stacked),) * 2)
        if x.shape[0] != self._rows.start(len(self.stacked)):
            raise StackingError(
                f"an activation between blocks has {x.shape[0]} rows where the full network's {self._rows.lead} and "
                f"{len(self.stacked) - 1} times {self._rows.other} of subnets are stacked; with subnet_share below 1 "
                "the first dimension must be the batch"
            )
        return self._rows

    def _until_next_block(self) -> Sequence[Layer]:
        """The next layer if it is a block, or the layers up to the next block."""
        layers = self.plan.layers[self.position :]
        end = next((i for i, layer in enumerate(layers) if layer.is_block), len(layers))
        return layers[: max(end, 1)]

    def _run_length(self, streams: Sequence[int]) -> int:
        """How many layers the streams of a state run from here on before one drops one, at most."""
        return max(map(self._layers_ahead, streams))

    def _layers_ahead(self, stream: int) -> int:
        path, index = self.plan.paths[stream], self._next[stream]
        length = 0
        while (
            index + length < len(path) and self.plan.layer_of[path[index + length]] == self.position + length
        ):
            length += 1
        return length

    def per_stream(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the stacked logits of the final states those of the streams, as `_stacked_logits`."""
        ghost_of = {stream: i for i, streams in enumerate(self.stacked) for stream in streams}
        index = [ghost_of[stream] for stream in range(len(ghost_of))]
        apart = index == list(range(len(self.stacked)))
        if self._rows is None:
            ghosts = logits.reshape(len(self.stacked), -1, *logits.shape[1:])
            if apart:
                return ghosts, None
            parts = ghosts.unbind()
            return torch.stack(
                [parts[i] for i in index]
            ), None  # an index tensor would be copied from the host
        rows = self._rows_of(logits)
        if apart:
            full, subnets = logits.split([rows.lead, logits.shape[0] - rows.lead])
            return subnets.unflatten(0, (-1, rows.other)), full
        full, parts = lead_and_kept(logits, rows, 1, index[1:])
        return torch.stack(parts), full


def _streams_of_layers(plan: Plan) -> list[set[int]]:
    """The streams that run each layer."""
    streams: list[set[int]] = [set() for _ in plan.layers]
    for stream, path in enumerate(plan.paths):
        for state in path:
            streams[plan.layer_of[state]].add(stream)
    return streams


def _refusal(network: Network, streams: Streams) -> StackingError | None:
    reason = reason_against(network, streams)
    return None if reason is None else StackingError(f"execution='stacked' can't run this model: {reason}")


MODE = Mode(run_stacked, _refusal, forward=_forward)
