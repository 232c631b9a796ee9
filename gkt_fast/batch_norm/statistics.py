"""Who updates BatchNorm's running statistics when several streams run through a layer.

Every state is normalised with its own batch's statistics. With the policy `full` only the full network's stream
updates the running ones; with `all_streams` every stream does, as if they ran one by one. Recomputation
during backward (activation checkpointing) never updates them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..ops.ghost_batch_norm.running_statistics import FoundStatistics, RunningUpdate, update_on_cpu
from .layer import OnStatistics, Report, count_batches, running_buffers

__all__ = [
    "BatchStatistics",
    "StreamStatistics",
    "check_running_buffers",
    "compiled_batch_norm",
    "freeze_during_backward",
    "frozen_statistics",
    "record_statistics",
    "tracking_layers",
    "update_running_statistics",
]


_set_aside: WeakKeyDictionary[_NormBase, dict[str, Tensor | None]] = WeakKeyDictionary()
"""The buffers of the layers that are frozen now."""


class BatchStatistics(NamedTuple):
    """What one call of a layer saw: mean and unbiased variance, each (C,)."""

    layer: _NormBase
    mean: Tensor
    variance: Tensor


def tracking_layers(model: nn.Module) -> list[_NormBase]:
    """The normalisation layers that update running statistics now: in training mode, with some to track.

    Layers that a failed backward left frozen are unfrozen first.
    """
    layers = [module for module in model.modules() if isinstance(module, _NormBase)]
    _thaw(layers)
    return [
        layer
        for layer in layers
        if layer.training
        and layer.track_running_stats
        and layer.running_mean is not None
        and (layer.momentum is not None or isinstance(layer, _BatchNorm))
    ]


def check_running_buffers(model: nn.Module) -> None:
    """Checks that running statistics can be set aside.

    Raises:
        ValueError: a layer holds them, but not as buffers.
    """
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        names = ("running_mean", "running_var", "num_batches_tracked")
        if any(name not in module._buffers and getattr(module, name, None) is not None for name in names):
            raise ValueError(
                f"{path!r} ({type(module).__name__}) holds running statistics as plain attributes, which GKT can't "
                "keep as they are while subnets run; register them as buffers"
            )


@contextmanager
def frozen_statistics(layers: Iterable[_NormBase]) -> Iterator[None]:
    """The layers still use their batch's statistics, but don't update the running ones."""
    frozen = _freeze(layers)
    try:
        yield
    finally:
        _thaw(frozen)


def freeze_during_backward(loss: Tensor, layers: Sequence[_NormBase]) -> None:
    """From the moment that backward reaches `loss` until it ends, the layers' running statistics stay as they are."""
    if not layers or not loss.requires_grad:
        return

    def freeze(gradient: Tensor) -> None:
        frozen = _freeze(layers)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _thaw(frozen))

    loss.register_hook(freeze)


def compiled_batch_norm(model: nn.Module) -> str | None:
    """The path of a compiled module that holds normalisation layers of batches; None: there is none."""
    for path, module in model.named_modules():
        compiled = module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        if compiled and any(isinstance(inner, _NormBase) for inner in module.modules()):
            return path
    return None


@contextmanager
def record_statistics(model: nn.Module, layers: Iterable[_NormBase]) -> Iterator[list[BatchStatistics]]:
    """Every call of a layer appends its batch's statistics to the list; the running ones stay as they are.

    Raises:
        ValueError: a layer of the model stands in a compiled module, which would be compiled anew in every step.
    """
    compiled = compiled_batch_norm(model)
    if compiled is not None:
        raise ValueError(
            f"batch_norm is 'all_streams', and {compiled!r} is compiled: BatchNorm inside can't put every stream's "
            "statistics on record. Use batch_norm='full' or execution='sequential'"
        )
    recorded: list[BatchStatistics] = []
    layers = list(layers)
    buffers = [dict(layer._buffers) for layer in layers]
    momenta = [layer.momentum for layer in layers]

    def record(layer: _NormBase, args: tuple, output: Tensor) -> None:
        recorded.append(BatchStatistics(layer, layer.running_mean.clone(), layer.running_var.clone()))

    hooks = []
    try:
        for layer in layers:
            # With momentum 1 a layer leaves the batch's own statistics in its buffers.
            for name, buffer in layer._buffers.items():
                layer._buffers[name] = None if buffer is None else torch.zeros_like(buffer)
            layer.momentum = 1.0
            hooks.append(layer.register_forward_hook(record))
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
        for layer, original, momentum in zip(layers, buffers, momenta, strict=True):
            layer._buffers.update(original)
            layer.momentum = momentum


@torch.no_grad()
def update_running_statistics(updates: Iterable[BatchStatistics]) -> None:
    """Applies the updates in order: r <- (1 - momentum) r + momentum * statistic; momentum None averages all."""
    for batch in _rounds(list(updates)):
        by_momentum: dict[float | None, list[BatchStatistics]] = {}
        for update in batch:
            by_momentum.setdefault(update.layer.momentum, []).append(update)
        for momentum, group in by_momentum.items():
            _update_together(momentum, group)


def _rounds(updates: list[BatchStatistics]) -> list[list[BatchStatistics]]:
    """The updates in order; those of one round are of distinct layers and can go together."""
    if len({id(update.layer) for update in updates}) == len(updates):
        return [updates]
    seen: Counter[int] = Counter()
    rounds: list[list[BatchStatistics]] = []
    for update in updates:
        number = seen[id(update.layer)]
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(update)
        seen[id(update.layer)] += 1
    return rounds


def _update_together(momentum: float | None, updates: list[BatchStatistics]) -> None:
    """Updates distinct layers, in few kernel launches."""
    count_batches(u.layer for u in updates if isinstance(u.layer, _BatchNorm))
    if momentum is not None:
        running = [r for u in updates for r in running_buffers(u.layer)[:2]]
        statistics = [s for u in updates for s in (u.mean, u.variance)]
        statistics = [
            s if s.dtype is r.dtype else s.to(r.dtype) for s, r in zip(statistics, running, strict=True)
        ]
        torch._foreach_lerp_(running, statistics, momentum)
        return
    for u in updates:
        if u.layer.num_batches_tracked is None:  # torch leaves the statistics alone, too
            continue
        factor = 1.0 / u.layer.num_batches_tracked.to(u.mean.dtype)
        for r, s in ((u.layer.running_mean, u.mean), (u.layer.running_var, u.variance)):
            r.mul_(1.0 - factor).add_(s * factor)


class StreamStatistics:
    """Gathers the statistics of stacked batches; updates the running ones when all streams have run.

    Args:
        all_update: whether every stream updates them, or the full network's alone.
    """

    def __init__(self, all_update: bool) -> None:
        self._all_update = all_update
        self._reports: list[tuple[Sequence[Sequence[int]], Report]] = []

    def receiver(self, streams: Sequence[Sequence[int]]) -> OnStatistics:
        """For a call in which ghost batch i is the state of `streams[i]`."""
        append = self._reports.append
        return lambda report: append((streams, report))

    @torch.no_grad()
    def update(self) -> None:
        """Updates the running statistics in the order of the streams."""
        seen = [
            (stream, report, ghost)
            for streams, report in self._reports
            for ghost, members in enumerate(streams)
            for stream in members
            if stream == 0 or self._all_update
        ]
        if self._all_update:
            seen.sort(key=lambda update: update[0])
        reports = [(report, ghost) for _, report, ghost in seen]
        if not _update_on_cpu(reports):
            update_running_statistics(_batch_statistics(reports))


def _update_on_cpu(seen: Sequence[tuple[Report, int]]) -> bool:
    """Whether the statistics of these ghost batches have gone into the running ones in one native call."""
    found, updates = [], []
    for report, ghost in seen:
        layer, statistics, _ = report
        if type(layer.momentum) not in (float, int):
            return False
        mean, var = (statistics, None) if isinstance(statistics, Tensor) else statistics
        found.append(FoundStatistics(mean, var, ghost, report.correction(ghost)))
        running_mean, running_var, counter = running_buffers(layer)
        updates.append(RunningUpdate(running_mean, running_var, layer.momentum, counter))
    return update_on_cpu(found, updates)


def _batch_statistics(seen: Sequence[tuple[Report, int]]) -> list[BatchStatistics]:
    """Those of ghost batches, in few kernel launches where reports have one form."""
    alike: dict[Hashable, list[int]] = {}
    for i, (report, ghost) in enumerate(seen):
        _, statistics, values = report
        form: Hashable = i
        if isinstance(statistics, Tensor):
            form = statistics.shape, statistics.dtype, statistics.device, values, ghost
        alike.setdefault(form, []).append(i)
    found: list[BatchStatistics | None] = [None] * len(seen)
    for places in alike.values():
        report, ghost = seen[places[0]]
        if len(places) == 1:
            mean, biased = report.of_ghost(ghost)
            means, variances = [mean], [biased * report.correction(ghost)]
        else:
            statistics = torch.stack([seen[i][0].statistics for i in places])
            means = statistics[:, 0, ghost].unbind()
            variances = (statistics[:, -1, ghost] * report.correction(ghost)).unbind()
        for i, mean, variance in zip(places, means, variances, strict=True):
            found[i] = BatchStatistics(seen[i][0].layer, mean, variance)
    return found


def _freeze(layers: Iterable[_NormBase]) -> list[_NormBase]:
    """Gives the layers copies of their buffers to write to; returns those that were not frozen already.

    Copies, and not `track_running_stats = False`: a checkpointed layer must save as many tensors when it is
    recomputed as it did the first time.
    """
    frozen = [layer for layer in layers if layer not in _set_aside]
    for layer in frozen:
        _set_aside[layer] = dict(layer._buffers)
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else buffer.clone()
    return frozen


def _thaw(layers: Iterable[_NormBase]) -> None:
    """Gives the frozen ones among the layers their own buffers again."""
    for layer in layers:
        layer._buffers.update(_set_aside.pop(layer, {}))
