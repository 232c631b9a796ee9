"""BatchNorm of stacked batches over several processes: every ghost batch is joined with its parts on the other ranks.

The processes exchange each ghost batch's mean, biased variance and number of values, all ghosts of a layer in one
collective; backward exchanges two sums per channel. Means and variances are merged as in Chan, Golub and LeVeque
(1979), which keeps the digits that a sum of squares would lose.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["group_of", "synchronized_batch_norm"]


def group_of(layer: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which `layer` joins its batch; None: it is no SyncBatchNorm, or there is only this process."""
    if not isinstance(layer, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    if getattr(layer, "unsynchronized", False):
        return None
    group = layer.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def synchronized_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, ghosts: int, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, unbiased variance): x normalised per ghost batch with the statistics of all ranks' parts.

    Every rank of the group calls this with as many ghosts and channels; the rows of a ghost batch may differ. The
    gradient of x is that of the sum of all ranks' losses; those of weight and bias are this rank's share.

    Args:
        x: (m*B, C, *spatial).
        weight: (C,), or None.
        bias: (C,), or None.
        ghosts: m.
        eps: added to the variance.
        group: the processes.

    Returns:
        y like x; mean and unbiased variance (m, C), detached, in float32 or x's wider dtype.
    """
    return _SynchronizedBatchNorm.apply(x, weight, bias, ghosts, eps, group)


class _SynchronizedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        ghosts: int,
        eps: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = _per_ghost(x, ghosts)
        var, mean = torch.var_mean(values, _rows(values), correction=0)
        count = mean.new_full((1,), values.numel() / mean.numel())
        parts = _gather(torch.cat([mean.flatten(), var.flatten(), count]), group)
        means, variances = parts[:, :-1].unflatten(1, (2, *mean.shape)).unbind(1)
        counts = parts[:, -1].view(-1, 1, 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        y = (values - _like(mean, values)) * _like(torch.rsqrt(var + eps), values)
        if weight is not None:
            y = y * _like(weight.to(values.dtype), values)
        if bias is not None:
            y = y + _like(bias.to(values.dtype), values)
        unbiased = var * (total / (total - 1))
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.ghosts, ctx.eps, ctx.group = ghosts, eps, group
        ctx.mark_non_differentiable(mean, unbiased)
        return y.flatten(0, 1).to(x.dtype), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        values, dy = _per_ghost(x, ctx.ghosts), _per_ghost(gradient, ctx.ghosts)
        scale = torch.rsqrt(var + ctx.eps)
        normalized = (values - _like(mean, values)) * _like(scale, values)
        sums = torch.stack([dy.sum(_rows(dy)), (dy * normalized).sum(_rows(dy))])
        d_bias, d_weight = sums.sum(1)
        dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_normalized = sums / total
        dx = dy - _like(mean_dy, dy) - normalized * _like(mean_dy_normalized, dy)
        dx = dx * _like(scale if weight is None else scale * weight.to(scale.dtype), dx)
        needs = ctx.needs_input_grad
        return (
            dx.flatten(0, 1).to(x.dtype) if needs[0] else None,
            d_weight if needs[1] else None,
            d_bias if needs[2] else None,
            *(None, None, None),
        )


def _per_ghost(x: Tensor, ghosts: int) -> Tensor:
    """(m, B, C, *spatial) in the dtype in which statistics are taken."""
    return x.unflatten(0, (ghosts, -1)).to(torch.promote_types(x.dtype, torch.float32))


def _rows(values: Tensor) -> list[int]:
    """The dimensions of (m, B, C, *spatial) that statistics run over."""
    return [1, *range(3, values.ndim)]


def _like(statistic: Tensor, values: Tensor) -> Tensor:
    """(m, C) or (C,), shaped to be broadcast over (m, B, C, *spatial)."""
    return statistic.view(-1, 1, statistic.shape[-1], *(1,) * (values.ndim - 3))


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, n): every rank's part."""
    parts = part.new_empty(dist.get_world_size(group), part.numel())
    dist.all_gather(list(parts.unbind()), part, group=group)
    return parts
