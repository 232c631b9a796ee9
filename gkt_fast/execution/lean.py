"""`execution="lean"`: every state once, at nearly the memory of the one-by-one loop.

Where streams part, the state is cut from the graph. A stream's backward runs as soon as its loss is known and stops at
the cut, where its gradient is kept. When the last stream that reads a cut state is done, the gradients that gathered
there go back through the layers before it, and those activations are freed. Nested ordered subnets part from the trunk
ever earlier, so that at any time little more than one network's activations are held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..batch_norm.statistics import (
    frozen_statistics,
    record_statistics,
    tracking_layers,
    update_running_statistics,
)
from ..config import GKTConfig
from ..network.calls import SharedStateError
from ..network.inputs import call_model
from ..network.interception import Site, intercept
from ..network.network import Network
from ..subnets.plan import Plan, make_plan
from ..subnets.streams import Streams, place_of, stream_at
from .gradients import GradientSum, deliver, refusal_of_sharded, tell_of_unscaled_float16
from .running_buffers import RunningBuffers
from .share import Share, share_of
from .states import States, _State
from .step import Mode, StepResult
from .stream_loss import StreamLoss

__all__ = ["MODE", "run_lean", "stream_order"]


def run_lean(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs the streams depth-first. The inner backward passes run on the loss times `loss_scale` (float16)."""
    config, share = streams.config, share_of(streams, inputs)
    plan = make_plan(network.layers(config.independent_noise), streams.dropped)
    tell_of_unscaled_float16(network, loss_scale)
    gradients = GradientSum(network.model, inputs, loss_scale)
    stream_loss = StreamLoss(streams, targets, share)
    layers = tracking_layers(network.model)
    all_update = streams.all_update_statistics
    order = stream_order(plan, config)
    buffers = RunningBuffers(network, streams)
    with record_statistics(network.model, layers) if all_update else nullcontext([]) as statistics:
        noise = config.independent_noise
        states = _CutStates(network, statistics, plan, independent_noise=noise, share=share)
        try:
            for stream in order:
                updates = stream == 0 or all_update
                with (
                    nullcontext() if updates else frozen_statistics(layers),
                    buffers.stream(stream),
                    intercept(network.model, network.sites, states.call),
                ):
                    states.begin_stream(streams.dropped[stream], plan.paths[stream])
                    logits = network.logits(gradients.run(states.run_model, inputs))
                    states.end_stream(logits)
                with frozen_statistics(layers):
                    gradients.add(stream_loss(stream, logits))
                    states.finish_stream()
        finally:
            states.close()
    for _, updates in sorted(zip(order, states.stream_statistics, strict=True), key=lambda pair: pair[0]):
        update_running_statistics(updates)
    loss = deliver(stream_loss.total(), gradients)
    return StepResult(loss, stream_loss.terms(), stream_loss.full_logits, stream_loss.learnt())


def _forward(network: Network, inputs: tuple[Any, ...], streams: Streams) -> list[Tensor]:
    noise, share = streams.config.independent_noise, share_of(streams, inputs)
    plan = make_plan(network.layers(noise), streams.dropped)
    layers, buffers = tracking_layers(network.model), RunningBuffers(network, streams)
    states = _CutStates(network, [], plan, independent_noise=noise, share=share)
    logits = {}
    try:
        with intercept(network.model, network.sites, states.call):
            for stream in stream_order(plan, streams.config):
                with frozen_statistics(layers) if stream else nullcontext(), buffers.stream(stream):
                    states.begin_stream(streams.dropped[stream], plan.paths[stream])
                    logits[stream] = network.logits(call_model(states.run_model, inputs))
                    states.end_stream(logits[stream])
    finally:
        states.close()
    return [logits[stream] for stream in range(len(logits))]


class _CutStates(States):
    """States of which those that several streams read further are cut from the graph.

    Args:
        network: the network.
        statistics: see `States`.
        plan: the states of the step.
        independent_noise: see `States`.
        share: see `States`.
    """

    def __init__(
        self,
        network: Network,
        statistics: list,
        plan: Plan,
        *,
        independent_noise: bool,
        share: Share | None,
    ) -> None:
        super().__init__(network, statistics, independent_noise=independent_noise, share=share)
        self.plan = plan
        self._readers = Counter(state for path in plan.paths for state in path)
        children = Counter(plan.parents[1:])
        ends = Counter(path[-1] for path in plan.paths)
        # Past the last block, what comes next may read any layer's output: the logits needn't be of the last one.
        past_blocks = max((i + 1 for i, layer in enumerate(plan.layers) if layer.is_block), default=0)
        self._branching = {
            state
            for state, readers in self._readers.items()
            if children[state] + ends[state] > 1 or (readers > 1 and plan.layer_of[state] >= past_blocks)
        }
        self._cuts: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._executed: dict[int, _State] = {}
        self._plan_path: tuple[int, ...] = ()

    def begin_stream(self, dropped: frozenset[str], plan_path: tuple[int, ...] = ()) -> None:
        """Starts at the input again; `plan_path` holds the stream's states in the plan."""
        super().begin_stream(dropped)
        self._plan_path = plan_path

    def _execute(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> _State:
        number = self._plan_path[len(self.path)] if len(self.path) < len(self._plan_path) else None
        if number is None or self.plan.layers[self.plan.layer_of[number]].path != site.path:
            raise SharedStateError(
                f"the model called {site.path!r} where its forward in evaluation mode calls another layer; "
                f"execution='lean' needs the same order of calls in every step. {self.order.advice}"
            )
        state = super()._execute(site, module, args, kwargs)
        if number in self._branching and torch.is_grad_enabled():
            state = self._cut(number, state)
        self._executed[number] = state
        return state

    def _cut(self, number: int, state: _State) -> _State:
        values, structure = tree_flatten(state.output)
        outputs = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        leaves = {id(value): value.detach().requires_grad_() for value in outputs}
        self._cuts[number] = outputs, [leaves[id(value)] for value in outputs]
        output = tree_unflatten([leaves.get(id(value), value) for value in values], structure)
        return self._state(output, state.past_stem, state.statistics)

    def finish_stream(self) -> None:
        """The stream's backward is done: goes back through cuts that no other stream will read, deepest first."""
        self.path = []
        for number in reversed(self._plan_path):
            self._readers[number] -= 1
            if self._readers[number]:
                continue
            self._executed.pop(number).release()
            outputs, leaves = self._cuts.pop(number, ([], []))
            pairs = [(o, leaf.grad) for o, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
            if pairs:
                torch.autograd.backward(*zip(*pairs, strict=True))


def stream_order(plan: Plan, config: GKTConfig) -> list[int]:
    """An order of the streams in which each finds its teacher, and that leaves cut states as early as possible.

    A subnet's teacher is the group before as it is after the same loop, so a stream comes after that group's and
    before its next update. Among the streams that may come next, the one that shares most states with the last.
    """
    order = [0]
    waiting = list(range(1, len(plan.paths)))
    while waiting:
        ready = [stream for stream in waiting if _is_ready(stream, order, config)]
        last = plan.paths[order[-1]]
        order.append(max(ready, key=lambda stream: (_shared_states(plan.paths[stream], last), -stream)))
        waiting.remove(order[-1])
    return order


def _is_ready(stream: int, done: Sequence[int], config: GKTConfig) -> bool:
    loop, group = place_of(stream, config.step_groups)
    needed = []
    if group > 1:
        needed.append((loop, group - 1))
    if loop > 1:
        needed.append((loop - 1, group))
        if group < config.step_groups:
            needed.append((loop - 1, group + 1))
    return all(stream_at(*place, config.step_groups) in done for place in needed)


def _shared_states(path: tuple[int, ...], other: tuple[int, ...]) -> int:
    return len(set(path) & set(other))


def _refusal(network: Network, streams: Streams) -> Exception | None:
    layers = network.layers(streams.config.independent_noise)
    older = next((layer for layer in layers if layer.reads_back_gradient), None)
    if older is not None:
        return SharedStateError(
            f"{older.path!r} or the code beside it reads {older.reads_back} again, after layers in between; "
            "execution='lean' has cut the graph between the two. Use execution='shared'"
        )
    return refusal_of_sharded(network.model)


MODE = Mode(run_lean, _refusal, forward=_forward)
