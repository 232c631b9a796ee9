"""The op's passes without its derivative, on one backend: memory for results, and layouts that kernels can read.

What follows from an activation's sizes and strides is found once. An op that consists of this one (`residual_block`)
calls the same passes, with nothing between its own node and the kernels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..registry import BackendWithBackward
from .problem import (
    Problem,
    describe,
    gradient_outputs,
    mask_size,
    outputs,
    readable,
    readable_as,
    strides_of,
)

__all__ = ["FAKE_PASSES", "Passes", "PassesOn"]


class Passes(Protocol):
    """The passes, real ones or those of fake tensors."""

    def forward(
        self, x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps,
        lead_rows=None, momentum=None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Arguments and results of the op, weight and bias in any dtype. With a momentum, which asks for one ghost
        batch, the running statistics are updated and not used."""

    def reapply(self, x, weight, bias, statistics, ghosts, relu, eps, lead_rows) -> tuple[Tensor, Tensor]:
        """y without residual, and the ReLU's mask, from the statistics (3, m, C) of an earlier forward pass."""

    def backward(
        self, grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, residual,
        lead_rows=None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
        """The gradients of x, residual, weight and bias; without `residual` none of it."""


class _Described(NamedTuple):
    """What an activation of some sizes and strides needs.

    Args:
        alike: the problem where the other activations have the same strides.
        apart: the problem where they have strides of their own.
        empty: whether there is nothing to compute.
        statistics: their shape.
        dtype: their dtype.
        mask: bytes of the ReLU's mask.
    """

    alike: Problem
    apart: Problem
    empty: bool
    statistics: tuple[int, int, int]
    dtype: torch.dtype
    mask: int


@functools.lru_cache(maxsize=4096)
def _describe(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    ghosts: int,
    relu: bool,
    eps: float,
    use_running: bool,
    lead_rows: int | None,
    momentum: float | None = None,
) -> _Described | None:
    """None where no kernel can read such an activation in place."""
    example = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    read, channels_last = readable(example)
    if read is not example:
        return None
    apart = describe(example, channels_last, ghosts, relu, eps, use_running, lead_rows, momentum)
    like_results = torch.empty_like(example).stride() == stride
    alike = apart._replace(strides=strides_of(example, apart)) if like_results else apart
    mask = mask_size(shape, channels_last) if relu else 0
    return _Described(alike, apart, 0 in shape, (3, ghosts, shape[1]), accumulation_dtype(dtype), mask)


class PassesOn:
    """The passes on a backend of `ghost_batch_norm`."""

    __slots__ = ("_backend",)

    def __init__(self, backend: BackendWithBackward) -> None:
        self._backend = backend

    def forward(
        self, x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps,
        lead_rows=None, momentum=None,
    ):  # fmt: skip
        use_running = running_mean is not None and momentum is None
        stride = x.stride()
        found = _describe(x.shape, stride, x.dtype, ghosts, relu, eps, use_running, lead_rows, momentum)
        if found is None:
            return self.forward(
                readable(x)[0], weight, bias, residual, keep, running_mean, running_var,
                ghosts, relu, eps, lead_rows, momentum,
            )  # fmt: skip
        problem = found.alike
        y = torch.empty_like(x)
        statistics = x.new_empty(found.statistics, dtype=found.dtype)
        mask = x.new_empty(found.mask, dtype=torch.uint8)
        if use_running:
            statistics[0] = running_mean
            statistics[1] = 0
            statistics[2] = running_var
        if found.empty:
            return y, statistics if use_running else statistics.zero_(), mask
        if residual is not None and residual.stride() != stride:
            problem = found.apart
            residual = readable_as(residual, problem.channels_last)
        weight, bias = _vector(weight, found.dtype), _vector(bias, found.dtype)
        keep = None if keep is None else keep.contiguous()
        tensors = x, residual, weight, bias, keep, y, statistics, mask
        if momentum is None:
            self._backend.forward(problem, *tensors)
        else:
            for running in (running_mean, running_var):  # which may have changed since they were looked at
                if running.dtype is not found.dtype or running.shape != x.shape[1:2]:
                    raise ValueError(
                        f"running statistics have shape {tuple(running.shape)} and dtype {running.dtype}; they must "
                        f"have ({x.shape[1]},) and {found.dtype}"
                    )
            dense = running_mean.contiguous(), running_var.contiguous()
            self._backend.forward(problem, *tensors, *dense)
            _written((running_mean, running_var), dense)
        return y, statistics, mask

    def reapply(self, x, weight, bias, statistics, ghosts, relu, eps, lead_rows):
        found = _describe(x.shape, x.stride(), x.dtype, ghosts, relu, eps, True, lead_rows)
        if found is None:
            return self.reapply(readable(x)[0], weight, bias, statistics, ghosts, relu, eps, lead_rows)
        y = torch.empty_like(x)
        mask = x.new_empty(found.mask, dtype=torch.uint8)
        if not found.empty:
            weight, bias = _vector(weight, found.dtype), _vector(bias, found.dtype)
            self._backend.forward(found.alike, x, None, weight, bias, None, y, statistics.contiguous(), mask)
        return y, mask

    def backward(
        self, grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, residual,
        lead_rows=None,
    ):  # fmt: skip
        stride = x.stride()
        found = _describe(x.shape, stride, x.dtype, ghosts, relu, eps, use_running, lead_rows)
        if found is None:
            return self.backward(
                grad_y, readable(x)[0], weight, statistics, mask, keep,
                ghosts, relu, eps, use_running, residual, lead_rows,
            )  # fmt: skip
        problem = found.alike
        gradients = gradient_outputs(x, statistics, residual)
        if found.empty:
            gradients[2].zero_(), gradients[3].zero_()
            return gradients
        if grad_y.stride() != stride:
            problem = found.apart
            grad_y = readable_as(grad_y, problem.channels_last)
        weight, keep = _vector(weight, found.dtype), None if keep is None else keep.contiguous()
        self._backend.backward(problem, grad_y, x, weight, statistics.contiguous(), mask, keep, *gradients)
        return gradients


def _vector(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Weight or bias as kernels read them: dense, and in the dtype of the arithmetic."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype is dtype else tensor.to(dtype)).contiguous()


def _written(running: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor]) -> None:
    """What a kernel wrote reaches the running statistics, and autograd is told."""
    for own, copy in zip(running, dense, strict=True):
        if own is not copy:
            own.copy_(copy)
    torch.autograd.graph.increment_version(running)


class _FakePasses:
    """What `PassesOn` returns, without values."""

    def forward(
        self, x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps,
        lead_rows=None, momentum=None,
    ):  # fmt: skip
        return outputs(*readable(x), ghosts, relu)

    def reapply(self, x, weight, bias, statistics, ghosts, relu, eps, lead_rows):
        y, _, mask = outputs(*readable(x), ghosts, relu)
        return y, mask

    def backward(
        self, grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, residual,
        lead_rows=None,
    ):  # fmt: skip
        return gradient_outputs(readable(x)[0], statistics, residual)


FAKE_PASSES: Passes = _FakePasses()
