"""The passes of `ghost_batch_norm` on one backend, with as little as possible between a block's node and its kernels.

What follows from a tensor's sizes and strides alone is found once. What is unusual goes by the op's own passes, which
copy and choose as they do for everyone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..ghost_batch_norm.op import PASSES
from ..ghost_batch_norm.problem import Problem, describe, mask_size, readable
from ..registry import BackendWithBackward

__all__ = ["NormsOn"]


class _Prepared(NamedTuple):
    """What an activation of these sizes and strides needs."""

    problem: Problem
    dtype: torch.dtype
    statistics: tuple[int, int, int]
    mask: int


@functools.lru_cache(maxsize=4096)
def _prepare(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    ghosts: int,
    relu: bool,
    eps: float,
    use_running: bool,
    lead_rows: int | None,
    momentum: float | None = None,
) -> _Prepared | None:
    """None where kernels can't read it in place, or it is empty."""
    if 0 in shape:
        return None
    example = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    read, channels_last = readable(example)
    if read is not example or torch.empty_like(example).stride() != stride:
        return None
    problem = describe(example, channels_last, ghosts, relu, eps, use_running, lead_rows, momentum)
    mask = mask_size(shape, channels_last) if relu else 0
    return _Prepared(problem, accumulation_dtype(dtype), (3, ghosts, shape[1]), mask)


class NormsOn:
    """The passes on a backend; arguments and results are those of `ghost_batch_norm.op.PASSES`.

    Args:
        backend: of `ghost_batch_norm`.
    """

    __slots__ = ("_backend",)

    def __init__(self, backend: BackendWithBackward) -> None:
        self._backend = backend

    def forward(
        self,
        x,
        weight,
        bias,
        residual,
        keep,
        running_mean,
        running_var,
        ghosts,
        relu,
        eps,
        lead_rows,
        momentum=None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stride, updates = x.stride(), momentum is not None
        prepared = None
        if updates == (running_mean is not None) and (residual is None or residual.stride() == stride):
            prepared = _prepare(x.shape, stride, x.dtype, ghosts, relu, eps, False, lead_rows, momentum)
        if prepared is None or (
            updates and not (running_mean.is_contiguous() and running_var.is_contiguous())
        ):
            return PASSES.forward(
                x, weight, bias, residual, keep, running_mean, running_var,
                ghosts, relu, eps, lead_rows, momentum,
            )  # fmt: skip
        y = torch.empty_like(x)
        statistics = x.new_empty(prepared.statistics, dtype=prepared.dtype)
        mask = x.new_empty(prepared.mask, dtype=torch.uint8)
        running = (running_mean, running_var) if updates else ()
        self._backend.forward(
            prepared.problem, x, residual, weight, bias, keep, y, statistics, mask, *running
        )
        if updates:
            torch.autograd.graph.increment_version(running)
        return y, statistics, mask

    def reapply(self, x, weight, bias, statistics, ghosts, relu, eps, lead_rows) -> tuple[Tensor, Tensor]:
        prepared = None
        if statistics.is_contiguous():
            prepared = _prepare(x.shape, x.stride(), x.dtype, ghosts, relu, eps, True, lead_rows)
        if prepared is None:
            return PASSES.reapply(x, weight, bias, statistics, ghosts, relu, eps, lead_rows)
        y = torch.empty_like(x)
        mask = x.new_empty(prepared.mask, dtype=torch.uint8)
        self._backend.forward(prepared.problem, x, None, weight, bias, None, y, statistics, mask)
        return y, mask

    def backward(
        self, grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, residual, lead_rows
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        stride = x.stride()
        prepared = None
        if grad_y.stride() == stride:
            prepared = _prepare(x.shape, stride, x.dtype, ghosts, relu, eps, use_running, lead_rows)
        if prepared is None:
            return PASSES.backward(
                grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, residual, lead_rows
            )
        grad_x = torch.empty_like(x)
        grad_residual = torch.empty_like(x) if residual else None
        grad_weight, grad_bias = statistics.new_empty((2, prepared.statistics[2])).unbind()
        self._backend.backward(
            prepared.problem, grad_y, x, weight, statistics, mask, keep,
            grad_x, grad_residual, grad_weight, grad_bias,
        )  # fmt: skip
        return grad_x, grad_residual, grad_weight, grad_bias
