"""BatchNorm of stacked batches over several processes: every ghost batch is joined with its parts on the other ranks.

The processes exchange each ghost batch's mean, biased variance and number of values, all ghosts of a layer in one
collective; ghosts may have other rows than the first, and ranks other rows than each other; backward exchanges two
sums per channel. Means and variances are merged as in Chan, Golub and LeVeque (1979), which keeps the digits that a
sum of squares would lose.
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
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghosts: int,
    eps: float,
    group: dist.ProcessGroup,
    lead_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, unbiased variance): x normalised per ghost batch with the statistics of all ranks' parts.

    Every rank of the group calls this with as many ghosts and channels; the rows of a ghost batch may differ. The
    gradient of x is that of the sum of all ranks' losses; those of weight and bias are this rank's share.

    Args:
        x: (m*B, C, *spatial), or (lead_rows + (m-1)*B, C, *spatial).
        weight: (C,), or None.
        bias: (C,), or None.
        ghosts: m.
        eps: added to the variance.
        group: the processes.
        lead_rows: rows of the first ghost batch, if not as many as of each other one.

    Returns:
        y like x; mean and unbiased variance (m, C), detached, in float32 or x's wider dtype.
    """
    return _SynchronizedBatchNorm.apply(x, weight, bias, ghosts, eps, group, lead_rows)


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
        lead_rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = _of_equal_rows(x, ghosts, lead_rows)
        moments = [torch.var_mean(values, _rows(values), correction=0) for values in parts]
        var, mean = (torch.cat(statistic) for statistic in zip(*moments, strict=True))
        own = [
            m.new_full(m.shape[:1], v.numel() / m.numel()) for v, (_, m) in zip(parts, moments, strict=True)
        ]
        gathered = _gather(torch.cat([mean.flatten(), var.flatten(), *own]), group)
        means, variances = gathered[:, :-ghosts].unflatten(1, (2, *mean.shape)).unbind(1)
        counts = gathered[:, -ghosts:, None]
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        scale = torch.rsqrt(var + eps)
        normalized = []
        for values, ghost_mean, ghost_scale in zip(
            parts, _split(mean, parts), _split(scale, parts), strict=True
        ):
            y = (values - _like(ghost_mean, values)) * _like(ghost_scale, values)
            if weight is not None:
                y = y * _like(weight.to(values.dtype), values)
            if bias is not None:
                y = y + _like(bias.to(values.dtype), values)
            normalized.append(y.flatten(0, 1))
        unbiased = var * (total / (total - 1))
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.ghosts, ctx.eps, ctx.group, ctx.lead_rows = ghosts, eps, group, lead_rows
        ctx.mark_non_differentiable(mean, unbiased)
        return _joined(normalized).to(x.dtype), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        scale = torch.rsqrt(var + ctx.eps)
        parts, dys = (_of_equal_rows(tensor, ctx.ghosts, ctx.lead_rows) for tensor in (x, gradient))
        normalized = [
            (values - _like(ghost_mean, values)) * _like(ghost_scale, values)
            for values, ghost_mean, ghost_scale in zip(
                parts, _split(mean, parts), _split(scale, parts), strict=True
            )
        ]
        sums = torch.stack(
            [
                torch.cat([dy.sum(_rows(dy)) for dy in dys]),
                torch.cat([(dy * n).sum(_rows(dy)) for dy, n in zip(dys, normalized, strict=True)]),
            ]
        )
        d_bias, d_weight = sums.sum(1)
        dist.all_reduce(sums, group=ctx.group)
        means = (_split(mean_sum, parts) for mean_sum in sums / total)
        factors = _split(scale if weight is None else scale * weight.to(scale.dtype), parts)
        dx = [
            (dy - _like(mean_dy, dy) - n * _like(mean_dy_n, dy)) * _like(factor, dy)
            for dy, n, mean_dy, mean_dy_n, factor in zip(dys, normalized, *means, factors, strict=True)
        ]
        needs = ctx.needs_input_grad
        return (
            _joined([part.flatten(0, 1) for part in dx]).to(x.dtype) if needs[0] else None,
            d_weight if needs[1] else None,
            d_bias if needs[2] else None,
            *(None, None, None, None),
        )


def _of_equal_rows(x: Tensor, ghosts: int, lead_rows: int | None) -> list[Tensor]:
    """Each (m, B, C, *spatial) in the dtype in which statistics are taken: all ghosts, or the first and the others."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if lead_rows is None or ghosts == 1:
        return [x.unflatten(0, (ghosts, -1))]
    return [x[None, :lead_rows], x[lead_rows:].unflatten(0, (ghosts - 1, -1))]


def _split(statistic: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """(m, C) for each of the parts."""
    return statistic.split([len(part) for part in parts])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
