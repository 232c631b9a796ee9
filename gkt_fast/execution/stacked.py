"""`execution="stacked"`: every state once, and the states that run the same layer as one batch.

The model's own forward runs once, on activations in which the ghost batches (B rows each) of several states are
stacked. Where states meet, they are ordered by the number of blocks that lie before them, most first: those that still
run are then a leading slice. A state that a stream keeps while others go on is put aside, and is stacked again where
its streams run next. BatchNorm normalises every ghost batch by itself. The full network runs every block, so its ghost
batch comes first.

No layer but BatchNorm may mix the rows of a batch, and blocks must take and return one activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..norm import ghost_batches, run_batch_norm
from ..ops import group_knowledge_loss
from ..plan import Plan, make_plan
from .batch_norm import StreamStatistics
from .interception import Site, check_called, find_layers, intercept
from .partition import ghost, lead_and_kept
from .states import SharedStateError, logits_of, run_watched
from .step import Network, StepResult, Streams, loss_options

__all__ = ["StackingError", "reason_against_stacking", "run_stacked"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class StackingError(SharedStateError):
    """Several states of the model can't run as one batch; the message says why."""


def reason_against_stacking(model: nn.Module) -> str | None:
    """Why states of this model can't be stacked; None when nothing speaks against it."""
    compiled = [path for path, module in model.named_modules() if module._compiled_call_impl is not None]
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        name = f"{path!r} ({type(module).__name__})"
        if any(path.startswith(f"{outer}.") for outer in compiled):
            return f"{name} is in a module compiled by torch.compile, where it can't be run per state"
        if type(module) not in _BATCH_NORMS:
            if isinstance(module, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
                if module.track_running_stats:
                    return f"{name} averages its running statistics over all stacked states"
                continue
            return f"{name} looks across the batch in a way of its own"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if module._backward_hooks or any(hook is not _refuse_recomputation for hook in hooks):
            return f"{name} has hooks, which would see several states as one batch"
    return None


def run_stacked(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs all streams in one forward. `loss_scale` is not needed: backward comes later.

    Raises:
        StackingError: the model can't be stacked.
    """
    reason = reason_against_stacking(network.model)
    if reason is not None:
        raise StackingError(f"execution='stacked' can't run this model: {reason}")
    plan = make_plan(network.layers(), streams.dropped)
    statistics = StreamStatistics(streams.config.batch_norm)
    stack = _Stack(plan, network, statistics)
    _unwatch([module for module in network.model.modules() if isinstance(module, _BATCH_NORMS)])
    norms = find_layers(network.model, _BATCH_NORMS)
    with (
        intercept(network.model, norms, _call_batch_norm),
        intercept(network.model, network.sites, stack.call),
    ):
        logits = stack.per_stream(logits_of(network.model(*inputs)))
    check_called(network.sites, network.returns)
    statistics.update()
    loss, terms = group_knowledge_loss(logits, targets, **loss_options(streams.config))
    _watch_backward(network.model, loss)
    return StepResult(loss, terms, logits[0].detach())


def _call_batch_norm(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    return run_batch_norm(module, *args, **kwargs)


def _watch_backward(model: nn.Module, loss: Tensor) -> None:
    """While backward runs, a BatchNorm that is called would take all stacked states for one batch: it refuses."""
    layers = [module for module in model.modules() if isinstance(module, _BATCH_NORMS) and module.training]

    def watch(gradient: Tensor) -> None:
        _unwatch(layers)  # of a backward that failed
        for layer in layers:
            layer.register_forward_pre_hook(_refuse_recomputation)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _unwatch(layers))

    if layers and loss.requires_grad:
        loss.register_hook(watch)


def _refuse_recomputation(layer: nn.Module, args: tuple) -> None:
    if torch._C._current_graph_task_id() != -1:
        raise StackingError(
            "a BatchNorm was recomputed during backward (activation checkpointing), where execution='stacked' can't "
            "tell the states apart. Use execution='shared' or 'lean'"
        )


def _unwatch(layers: list[nn.Module]) -> None:
    for layer in layers:
        for key, hook in [*layer._forward_pre_hooks.items()]:
            if hook is _refuse_recomputation:
                del layer._forward_pre_hooks[key]


class _Stack:
    """The states whose ghost batches the model's forward passes along.

    Args:
        plan: the states of the step.
        network: the network.
        statistics: hears of the batch statistics of every BatchNorm call.
    """

    def __init__(self, plan: Plan, network: Network, statistics: StreamStatistics) -> None:
        self.plan = plan
        self.network = network
        self.statistics = statistics
        self.position = 0
        self.stacked = [0]
        self.aside: dict[int, Tensor] = {}
        self.passed: Any = None
        self._state_of = [0] * len(plan.paths)
        self._next = [0] * len(plan.paths)

    def call(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A call of the layer at `site`; the handler for `intercept`."""
        layer = self.plan.layers[self.position] if self.position < len(self.plan.layers) else None
        if layer is None or layer.path != site.path:
            raise StackingError(
                f"the model called {site.path!r} where its forward in evaluation mode calls another layer; "
                "execution='stacked' needs the same order of calls in every step"
            )
        if self.aside and not (args and args[0] is self.passed):
            raise StackingError(
                f"the model computes something between two blocks, before {site.path!r}, outside any module; "
                "execution='stacked' can't apply that to the states that it put aside"
            )
        if site.is_block:
            return self._run_block(site, module, args, kwargs)
        output = self._run(site, module, args, kwargs)
        self._advance()
        return output

    def _run_block(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise StackingError(
                f"block {site.path!r} takes {len(args) + len(kwargs)} arguments; "
                "execution='stacked' needs blocks that take one activation"
            )
        x = args[0]
        if x is not self.passed:
            x = self._arrange(x)
        y = self._run(site, module, (x,), {})
        if not isinstance(y, Tensor) or y.shape[0] != x.shape[0]:
            raise StackingError(
                f"block {site.path!r} returns {type(y).__name__}; execution='stacked' needs blocks that return one "
                "activation with as many rows as their input"
            )
        self.network.returns[site.path] = 0
        self._advance()
        self.passed = y = self._arrange(y)
        return y

    def _run(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        streams = [[s for s in self._moving() if self._state_of[s] == state] for state in self.stacked]
        with ghost_batches(len(self.stacked), self.statistics.receiver(streams)):
            if self.position == 0 and not site.is_block:
                return module(*args, **kwargs)
            return run_watched(self.network.writes_input, site.path, module, args, kwargs)

    def _moving(self) -> list[int]:
        """The streams that run the next layer."""
        return [stream for stream in range(len(self._next)) if self._moves(stream)]

    def _moves(self, stream: int) -> bool:
        path, index = self.plan.paths[stream], self._next[stream]
        return index < len(path) and self.plan.layer_of[path[index]] == self.position

    def _advance(self) -> None:
        """The stacked states have run the layer: their streams are in the states after it."""
        after = {}
        for stream in self._moving():
            child = self.plan.paths[stream][self._next[stream]]
            after[self._state_of[stream]] = child
            self._state_of[stream] = child
            self._next[stream] += 1
        self.stacked = [after[state] for state in self.stacked]
        self.position += 1

    def _arrange(self, x: Tensor) -> Tensor:
        """Of the states in `x` and those put aside, stacks the ones that run the next layer and keeps the others.

        Before a layer that is no block (or at the end) all are stacked: the model may compute anything there.
        """
        is_block = self.position < len(self.plan.layers) and self.plan.layers[self.position].is_block
        rows = x.shape[0] // len(self.stacked)
        run: list[int] = []
        stay: list[int] = []
        for stream, state in enumerate(self._state_of):
            goal = run if not is_block or self._moves(stream) else stay
            if state not in goal:
                goal.append(state)
        index = {state: i for i, state in enumerate(self.stacked)}
        kept = [state for state in stay if state in index]
        if set(run) == set(self.stacked[: len(run)]):
            run = self.stacked[: len(run)]
            x, parts = lead_and_kept(x, rows, len(run), [index[state] for state in kept])
        else:
            run.sort(key=self._blocks_ahead, reverse=True)
            parts = [ghost(x, index[state], rows) for state in kept]
            x = torch.cat([ghost(x, index[s], rows) if s in index else self.aside[s] for s in run])
        self.aside = {state: self.aside[state] for state in stay if state in self.aside}
        self.aside |= dict(zip(kept, parts, strict=True))
        self.stacked = run
        return x

    def _blocks_ahead(self, state: int) -> int:
        """How many layers a stream of the state runs from here on before it drops one, at most."""
        return max(self._run_length(stream) for stream, s in enumerate(self._state_of) if s == state)

    def _run_length(self, stream: int) -> int:
        path, index = self.plan.paths[stream], self._next[stream]
        length = 0
        while (
            index + length < len(path) and self.plan.layer_of[path[index + length]] == self.position + length
        ):
            length += 1
        return length

    def per_stream(self, logits: Tensor) -> Tensor:
        """(S, B, ...) from the stacked logits of the final states."""
        ghosts = logits.reshape(len(self.stacked), -1, *logits.shape[1:])
        index = [self.stacked.index(state) for state in self._state_of]
        if index == list(range(len(self.stacked))):
            return ghosts
        return ghosts[torch.tensor(index, device=logits.device)]
