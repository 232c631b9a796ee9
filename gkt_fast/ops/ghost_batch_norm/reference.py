"""`ghost_batch_norm` in plain torch: as a function that autograd differentiates, and as a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulation_dtype
from .problem import Part, Problem, describe, equal_parts

__all__ = ["TorchBackend", "ghost_batch_norm_reference"]


def ghost_batch_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ghosts: int,
    lead_rows: int | None = None,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch, differentiable by autograd as often as wanted; arguments of `ghost_batch_norm`."""
    use_running = running_mean is not None and momentum is None
    problem = describe(x, False, ghosts, activation == "relu", eps, use_running, lead_rows, momentum)
    running = (running_mean, running_var) if use_running else None
    parts = [_reference_part(part, x, weight, bias, residual, keep, running) for part in equal_parts(problem)]
    ys, means, variances = zip(*parts, strict=True)
    y = torch.cat(ys) if len(ys) > 1 else ys[0].reshape(x.shape)
    mean, var = torch.cat(means).detach(), torch.cat(variances).detach()
    if momentum is not None and x.numel():
        _update(problem, mean[0], var[0], running_mean, running_var)
    return y.to(x.dtype), mean, var


def _reference_part(
    part: Part,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and variance of ghost batches of as many rows."""
    problem, x, residual, keep = part.problem, part.of_rows(x), part.of_rows(residual), part.of_ghosts(keep)
    values = _by_ghost(x, problem)
    if running is not None:
        mean, var = (r.to(values.dtype).expand(problem.ghosts, -1) for r in running)
        statistics = mean, torch.zeros_like(mean), var
    elif x.numel() == 0:
        statistics = values.new_zeros(3, problem.ghosts, x.shape[1]).unbind()
    else:
        statistics = _statistics(values)
    z = _before_activation(values, statistics, weight, bias, residual, problem)
    mean, _, var = statistics
    return _activated(z, residual, keep, problem).reshape(x.shape), mean, var


class TorchBackend:
    """The reference, with the mask and the statistics of every backend, so that a backward pass may run elsewhere.

    Its backward pass is written out: autograd would keep several activations for it.
    """

    def forward(
        self,
        problem: Problem,
        x,
        residual,
        weight,
        bias,
        keep,
        y,
        statistics,
        mask,
        running_mean=None,
        running_var=None,
    ) -> None:
        for part in equal_parts(problem):
            rows, ghosts = part.of_rows, part.of_ghosts
            self._forward_part(
                part.problem, rows(x), rows(residual), weight, bias, ghosts(keep), rows(y),
                ghosts(statistics, 1), _mask_of(mask, problem, part),
            )  # fmt: skip

        if running_mean is not None:
            _update(problem, statistics[0, 0], statistics[2, 0], running_mean, running_var)

    def _forward_part(self, problem: Problem, x, residual, weight, bias, keep, y, statistics, mask) -> None:
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
        grad_weight.zero_(), grad_bias.zero_()
        for part in equal_parts(problem):
            rows, ghosts = part.of_rows, part.of_ghosts
            self._backward_part(
                part.problem, rows(grad_y), rows(x), weight, ghosts(statistics, 1),
                _mask_of(mask, problem, part), ghosts(keep), rows(grad_x), rows(grad_residual),
                grad_weight, grad_bias,
            )  # fmt: skip

    def _backward_part(
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
        """Adds to the gradients of weight and bias."""
        dz = _by_ghost(grad_y, problem)
        if problem.relu:
            dz = torch.where(_unpack(mask, problem), dz, 0)
        if grad_residual is not None:
            grad_residual.copy_(dz.reshape(x.shape))
        if keep is not None:
            dz = torch.where(_per_ghost(keep), dz, 0)
        normalized = _normalized(_by_ghost(x, problem), statistics.unbind(), problem.eps)
        sums, products = dz.sum((1, 3)), (dz * normalized).sum((1, 3))  # (m, C)
        grad_bias.add_(sums.sum(0))
        grad_weight.add_(products.sum(0))
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


@torch.no_grad()
def _update(problem: Problem, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Mixes the statistics (C,) of one ghost batch into the running ones."""
    values = problem.lead_rows * problem.sizes[3]
    for running, statistic in ((running_mean, mean), (running_var, var * (values / max(values - 1, 1)))):
        running.mul_(1 - problem.momentum).add_(statistic.to(running.dtype), alpha=problem.momentum)


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


def _mask_of(mask: Tensor, problem: Problem, part: Part) -> Tensor:
    """A part's bits, which lie row by row; empty without ReLU."""
    ghosts, rows, *_ = problem.sizes
    bytes_of_row = mask.numel() // (problem.lead_rows + (ghosts - 1) * rows)
    return mask[part.rows.start * bytes_of_row : part.rows.stop * bytes_of_row]


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
