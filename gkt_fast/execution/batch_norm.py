"""Who updates BatchNorm's running statistics when several streams run through a layer.

Every state is normalised with its own batch's statistics. With the policy `full` only the full network's stream
updates the running ones; with `sequential` every stream does, as if the streams ran one after another. Recomputation
during backward (activation checkpointing) never updates them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = [
    "BatchStatistics",
    "freeze_during_backward",
    "frozen_statistics",
    "record_statistics",
    "tracking_layers",
    "update_running_statistics",
]


class BatchStatistics(NamedTuple):
    """What one call of a layer saw: mean and unbiased variance, each (C,)."""

    layer: _NormBase
    mean: Tensor
    variance: Tensor


def tracking_layers(model: nn.Module) -> list[_NormBase]:
    """The normalisation layers that update running statistics now: in training mode, with statistics to track."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
    ]


@contextmanager
def frozen_statistics(layers: Iterable[_NormBase]) -> Iterator[None]:
    """The layers still use their batch's statistics, but don't update the running ones."""
    layers = list(layers)
    _set_tracking(layers, False)
    try:
        yield
    finally:
        _set_tracking(layers, True)


def freeze_during_backward(loss: Tensor, layers: Sequence[_NormBase]) -> None:
    """From the moment that backward reaches `loss` until it ends, the layers' running statistics stay as they are."""
    if not layers or not loss.requires_grad:
        return

    def freeze(gradient: Tensor) -> None:
        _set_tracking(layers, False)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _set_tracking(layers, True))

    loss.register_hook(freeze)


@contextmanager
def record_statistics(layers: Iterable[_NormBase]) -> Iterator[list[BatchStatistics]]:
    """Every call of a layer appends its batch's statistics to the list; the running ones stay as they are."""
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
    for layer, mean, variance in updates:
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
        factor = (
            layer.momentum if layer.momentum is not None else 1.0 / layer.num_batches_tracked.to(mean.dtype)
        )
        for running, statistic in ((layer.running_mean, mean), (layer.running_var, variance)):
            running.mul_(1.0 - factor).add_(statistic * factor)


def _set_tracking(layers: Iterable[_NormBase], tracking: bool) -> None:
    for layer in layers:
        layer.track_running_stats = tracking
