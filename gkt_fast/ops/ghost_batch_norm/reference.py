"""`ghost_batch_norm` in plain torch: as a function that autograd differentiates, and as a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulation_dtype
from .problem import Problem, describe

__all__ = ["TorchBackend", "ghost_batch_norm_reference"]


def ghost_batch_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ghosts: int,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch, differentiable by autograd as often as wanted; arguments of `ghost_batch_norm`."""
    problem = describe(x, False, ghosts, activation == "relu", eps, running_mean is not None)
    values = _by_ghost(x, problem)
    if running_mean is not None:
        mean, var = (r.to(values.dtype).expand(ghosts, -1) for r in (running_mean, running_var))
        statistics = mean, torch.zeros_like(mean), var
    elif x.numel() == 0:
        statistics = values.new_zeros(3, ghosts, x.shape[1]).unbind()
    else:
        statistics = _statistics(values)
    z = _before_activation(values, statistics, weight, bias, residual, problem)
    y = _activated(z, residual, keep, problem)
    mean, _, var = statistics
    return y.reshape(x.shape).to(x.dtype), mean.detach().clone(), var.detach().clone()


class TorchBackend:
    """The reference, with the mask and the statistics of every backend, so that a backward pass may run elsewhere.

    Its backward pass is written out: autograd would keep several activations for it.
    """

    def forward(self, problem: Problem, x, residual, weight, bias, keep, y, statistics, mask) -> None:
        values = _by_ghost(x, problem)
        if not problem.use_running:
            torch.stack(_statistics(values), out=statistics)
        z = _before_activation(values, statistics.unbind(), weight, bias, residual, problem)
        if problem.relu:
            passed = ~(z <= 0) if keep is None else ~(z <= 0) | ~_per_ghost(keep)
            mask.copy_(_pack(passed, problem))
        y.copy_(_activated(z, residual, keep, problem).reshape(y.shape))

    def backward(
        self,
        problem: Problem,
        grad_y,
        x,
        weight,
        statistics,
        mask,
        keep,
        grad_x,
        grad_residual,
        grad_weight,
        grad_bias,
    ) -> None:
        dz = _by_ghost(grad_y, problem)
        if problem.relu:
            dz = torch.where(_unpack(mask, problem), dz, 0)
        if grad_residual is not None:
            grad_residual.copy_(dz.reshape(x.shape))
        if keep is not None:
            dz = torch.where(_per_ghost(keep), dz, 0)
        normalized = _normalized(_by_ghost(x, problem), statistics.unbind(), problem.eps)
        sums, products = dz.sum((1, 3)), (dz * normalized).sum((1, 3))  # (m, C)
        grad_bias.copy_(sums.sum(0))
        grad_weight.copy_(products.sum(0))
        if not problem.use_running:
            n = dz.shape[1] * dz.shape[3]
            dz = dz - (sums[:, None, :, None] + normalized * products[:, None, :, None]) / n
        scale = torch.rsqrt(statistics[2] + problem.eps)
        if weight is not None:
            scale = scale * weight
        grad_x.copy_((dz * scale[:, None, :, None]).reshape(x.shape))


def _by_ghost(x: Tensor, problem: Problem) -> Tensor:
    """(m, B, C, positions) in the dtype of the statistics."""
    return x.reshape(problem.sizes).to(accumulation_dtype(x.dtype))


def _per_ghost(keep: Tensor) -> Tensor:
    return keep[:, None, None, None]


def _statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, C) each: mean, what rounding took from the mean, biased variance."""
    var, exact_mean = torch.var_mean(values.double(), (1, 3), correction=0)
    mean = exact_mean.to(values.dtype)
    return mean, (exact_mean - mean).to(values.dtype), var.to(values.dtype)


def _normalized(values: Tensor, statistics: tuple[Tensor, ...], eps: float) -> Tensor:
    mean, low, var = (statistic[:, None, :, None] for statistic in statistics)
    return ((values - mean) - low) * torch.rsqrt(var + eps)


def _before_activation(
    values: Tensor,
    statistics: tuple[Tensor, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    problem: Problem,
) -> Tensor:
    """z, (m, B, C, positions)."""
    z = _normalized(values, statistics, problem.eps)
    if weight is not None:
        z = z * weight.to(values.dtype)[:, None]
    if bias is not None:
        z = z + bias.to(values.dtype)[:, None]
    return z if residual is None else z + _by_ghost(residual, problem)


def _activated(z: Tensor, residual: Tensor | None, keep: Tensor | None, problem: Problem) -> Tensor:
    y = torch.relu(z) if problem.relu else z
    return y if keep is None else torch.where(_per_ghost(keep), y, _by_ghost(residual, problem))


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def _pack(passed: Tensor, problem: Problem) -> Tensor:
    lines = passed.transpose(2, 3) if problem.channels_last else passed
    lines = F.pad(lines.to(torch.uint8), (0, -lines.shape[-1] % 8))
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=passed.device)
    return (lines.reshape(-1, 8) * bits).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor, problem: Problem) -> Tensor:
    ghosts, rows, channels, positions = problem.sizes
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    shape = (positions, channels) if problem.channels_last else (channels, positions)
    lines = (mask[:, None] & bits).ne(0).reshape(ghosts, rows, shape[0], -1)[..., : shape[1]]
    return lines.transpose(2, 3) if problem.channels_last else lines
