"""BatchNorm layers on stacked batches: how many ghost batches run, and who receives their statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..ops import ghost_batch_norm
from ..ops.dtypes import accumulation_dtype
from .kinds import carries_activation
from .synchronized import group_of, synchronized_batch_norm

__all__ = [
    "OnStatistics",
    "Report",
    "count_batches",
    "ghost_batches",
    "is_updated_by_the_op",
    "report_statistics",
    "run_batch_norm",
    "run_batch_norm_layer",
    "running_buffers",
    "surrounding_ghost_batches",
    "values_per_ghost",
]


class Report(NamedTuple):
    """What a BatchNorm layer saw of m ghost batches in one call. Nothing is computed before it is asked for.

    Args:
        layer: the layer.
        statistics: mean and variance, (m, C) each, or in one tensor (3, m, C) the first and the last; detached.
        values: per channel, of the first ghost batch and of each other one; None: the variance is unbiased already.
    """

    layer: nn.Module
    statistics: tuple[Tensor, Tensor] | Tensor
    values: tuple[int, int] | None

    def of_ghost(self, ghost: int) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) of a ghost batch, the variance as it is in `statistics`."""
        if isinstance(self.statistics, Tensor):
            mean, *_, variance = self.statistics.select(1, ghost).unbind()
            return mean, variance
        mean, variance = self.statistics
        return mean[ghost], variance[ghost]

    def correction(self, ghost: int) -> float:
        """What the variance of a ghost batch is multiplied by to become unbiased."""
        if self.values is None:
            return 1.0
        values = self.values[ghost > 0]
        return values / max(values - 1, 1)

    @property
    def mean(self) -> Tensor:
        """(m, C)."""
        return self.statistics[0]

    @property
    def variance(self) -> Tensor:
        """(m, C), unbiased."""
        biased = self.statistics[-1]
        return torch.stack([biased[ghost] * self.correction(ghost) for ghost in range(len(biased))])


OnStatistics = Callable[[Report], None]


class _Ghosts(NamedTuple):
    number: int
    on_statistics: OnStatistics | None
    rows: tuple[int, int] | None

    def lead_rows(self, rows: int) -> int | None:
        """How many of a layer's rows are of the first ghost batch; None: as many as of each other one.

        A layer may see several rows for each of the batch's (patches, frames).
        """
        if self.rows is None or self.number == 1:
            return None
        lead, other = self.rows
        times, rest = divmod(rows, lead + (self.number - 1) * other)
        if rest:
            raise ValueError(
                f"x has {rows} rows; they must be a multiple of the {lead} rows of the first ghost batch and "
                f"{self.number - 1} times {other} of the others"
            )
        return times * lead


_current: ContextVar[_Ghosts | None] = ContextVar("gkt_fast_ghosts", default=None)


@contextmanager
def ghost_batches(
    ghosts: int, on_statistics: OnStatistics | None = None, rows: tuple[int, int] | None = None
) -> Iterator[None]:
    """Inside, every batch is `ghosts` batches stacked along dim 0, for fused blocks and `run_batch_norm`.

    No running statistics are updated inside. Instead `on_statistics` gets a report of each BatchNorm layer that would
    update its own: in training mode and with `track_running_stats`, read at every call. The context belongs to the
    thread and task that entered it; what a checkpointed block recomputes during backward must enter its own.

    Args:
        ghosts: m, at least 1.
        on_statistics: receives the reports; None: nobody does.
        rows: rows of the first ghost batch and of each other one; None: all have as many.

    Raises:
        ValueError: ghosts is less than 1.
    """
    if ghosts < 1:
        raise ValueError(f"ghosts is {ghosts}; it must be at least 1")
    token = _current.set(_Ghosts(ghosts, on_statistics, rows))
    try:
        yield
    finally:
        _current.reset(token)


def surrounding_ghost_batches() -> _Ghosts | None:
    """The innermost `ghost_batches` that this runs in."""
    return _current.get()


def run_batch_norm(
    layer: _BatchNorm, x: Tensor, *, residual: Tensor | None = None, activation: str = "identity"
) -> Tensor:
    """activation(layer(x) + residual) per ghost batch of the surrounding `ghost_batches`.

    Outside such a context the whole batch is one, and running statistics are updated by torch's own rule. A layer
    in eval mode uses its running statistics. SyncBatchNorm joins each ghost batch with its parts on the other ranks.

    Args:
        layer: BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm, whose parameters, buffers and options are used;
            its hooks are not called.
        x: (m*B, C, *spatial), or with other rows of the first ghost batch as `ghost_batches` was told.
        residual: added before the activation, of x's shape and dtype.
        activation: "relu" or "identity".

    Raises:
        TypeError, ValueError: as `ghost_batch_norm`.
    """
    ghosts = _current.get()
    options = {"residual": residual, "activation": activation, "eps": layer.eps}
    if not layer.training and layer.running_mean is not None:
        running = {"running_mean": layer.running_mean, "running_var": layer.running_var}
        return ghost_batch_norm(x, layer.weight, layer.bias, ghosts=1, **running, **options)[0]
    number, lead = (1, None) if ghosts is None else (ghosts.number, ghosts.lead_rows(x.shape[0]))
    group = group_of(layer) if layer.training else None
    values = None
    if group is not None:
        y, mean, var = synchronized_batch_norm(x, layer.weight, layer.bias, number, layer.eps, group, lead)
        y = y if residual is None else y + residual
        y = relu(y) if activation == "relu" else y
    elif ghosts is None and is_updated_by_the_op(layer, x.dtype):
        running = {"running_mean": layer.running_mean, "running_var": layer.running_var}
        y = ghost_batch_norm(
            x, layer.weight, layer.bias, ghosts=1, **running, momentum=layer.momentum, **options
        )[0]
        if layer.num_batches_tracked is not None and x.numel():
            layer.num_batches_tracked.add_(1)
        return y
    else:
        y, mean, var = ghost_batch_norm(x, layer.weight, layer.bias, ghosts=number, lead_rows=lead, **options)
        values = values_per_ghost(x.shape, number, lead)
    if _tracks(layer) and x.numel():
        report_statistics(Report(layer, (mean, var), values))
    return y


def values_per_ghost(shape: torch.Size, ghosts: int, lead_rows: int | None) -> tuple[int, int]:
    """How many values per channel the first ghost batch of an x of this shape has, and each other one."""
    rows, positions = shape[0], shape[2:].numel()
    if lead_rows is None:
        return (rows // ghosts * positions,) * 2
    return lead_rows * positions, (rows - lead_rows) // (ghosts - 1) * positions


def run_batch_norm_layer(layer: _BatchNorm, x: Tensor) -> Tensor:
    """layer(x) per ghost batch of the surrounding `ghost_batches`, for a layer of `is_batch_norm`."""
    if not carries_activation(layer):
        return run_batch_norm(layer, x)
    if type(layer.act) is nn.ReLU and type(layer.drop) is nn.Identity:
        return run_batch_norm(layer, x, activation="relu")
    return layer.act(layer.drop(run_batch_norm(layer, x)))


def _tracks(layer: _BatchNorm) -> bool:
    return layer.training and layer.track_running_stats and layer.running_mean is not None


def is_updated_by_the_op(layer: _BatchNorm, dtype: torch.dtype) -> bool:
    """Whether the kernel can write the running statistics: a given momentum, and the dtype of its own statistics."""
    if not (layer.training and layer.track_running_stats and type(layer.momentum) in (float, int)):
        return False
    mean, var, _ = running_buffers(layer)
    return (
        mean is not None
        and var is not None
        and mean.dtype == var.dtype == accumulation_dtype(dtype)
        and not (mean.requires_grad or var.requires_grad)
    )


def running_buffers(layer: _NormBase) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Running mean, running variance and the number of batches."""
    buffers = layer._buffers  # as attributes they take longer, in every step
    try:
        return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # put there as plain tensors
        return layer.running_mean, layer.running_var, layer.num_batches_tracked


def count_batches(layers: Iterable[_BatchNorm]) -> None:
    """Distinct layers have seen one more batch; those without a counter don't count."""
    counters = [running_buffers(layer)[2] for layer in layers]
    counters = [counter for counter in counters if counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)


def report_statistics(report: Report) -> None:
    """Hands on what a layer saw that tracks running statistics: to the surrounding `ghost_batches`, or to the layer."""
    ghosts = _current.get()
    if ghosts is None:
        _update_running_statistics(report.layer, report.mean[0], report.variance[0])
    elif ghosts.on_statistics is not None:
        ghosts.on_statistics(report)


@torch.no_grad()
def _update_running_statistics(layer: _BatchNorm, mean: Tensor, unbiased_var: Tensor) -> None:
    factor = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / layer.num_batches_tracked.to(layer.running_mean.dtype)
    if factor is None:  # cumulative average without a counter: torch leaves the statistics alone
        return
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), factor)
    layer.running_var.lerp_(unbiased_var.to(layer.running_var.dtype), factor)
