"""Hands `ghost_batch_norm` to its C++ and CUDA kernels: strides once for each problem, then tensors."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..native import DTYPES, check_capability, cuda_stream
from .problem import Problem, strides_of

__all__ = ["CppBackend", "CudaBackend"]

_ABSENT = (0, 0, 0)
"""The strides of an activation that isn't given."""


class _NativeBackend:
    """Keeps what the native module knows of each problem.

    Args:
        native: the native module.
    """

    def __init__(self, native: ModuleType) -> None:
        self.native = native
        keep = functools.lru_cache(maxsize=4096)
        self._prepare = keep(functools.partial(_prepare, native))
        self._prepare_alike = keep(lambda problem: _prepare(native, problem, *[problem.strides] * 6))

    def _for_forward(self, problem: Problem, x: Tensor, residual: Tensor | None, y: Tensor) -> Any:
        """The problem as the native module holds it."""
        if problem.strides is not None:
            return self._prepare_alike(problem)
        own, *others = (_strides(tensor, problem) for tensor in (x, residual, y))
        return self._prepare(problem, own, *others, own, own, own)

    def _for_backward(
        self, problem: Problem, grad_y: Tensor, x: Tensor, grad_x: Tensor, grad_residual: Tensor | None
    ) -> Any:
        """The same for a backward pass."""
        if problem.strides is not None:
            return self._prepare_alike(problem)
        own, *others = (_strides(tensor, problem) for tensor in (x, grad_y, grad_x, grad_residual))
        return self._prepare(problem, own, own, own, *others)


def _prepare(native: ModuleType, problem: Problem, *strides: tuple[int, int, int]) -> Any:
    """With the strides of x, residual, y, grad_y, grad_x and grad_residual."""
    shape = DTYPES[problem.dtype], problem.channels_last, *problem.sizes, problem.lead_rows
    options = problem.eps, problem.relu, problem.use_running, problem.momentum or 0.0
    return native.GhostBatchNorm(shape, *options, *strides)


def _strides(tensor: Tensor | None, problem: Problem) -> tuple[int, int, int]:
    return _ABSENT if tensor is None else strides_of(tensor, problem)


class CppBackend(_NativeBackend):
    """The C++ kernels of a native module."""

    def call(self, prepared: Any, name: str, x: Tensor, *arguments: Any) -> Any:
        """A method of what the native module has prepared for x, by these kernels."""
        return getattr(prepared, f"{name}_cpu")(*arguments, torch.get_num_threads())

    def forward(
        self, problem: Problem, x, residual, weight, bias, keep, y, statistics, mask,
        running_mean=None, running_var=None,
    ) -> None:  # fmt: skip
        self._for_forward(problem, x, residual, y).forward_cpu(
            x, residual, weight, bias, keep, y, statistics, mask, running_mean, running_var,
            None, torch.get_num_threads(),
        )  # fmt: skip

    def backward(
        self, problem: Problem, grad_y, x, weight, statistics, mask, keep,
        grad_x, grad_residual, grad_weight, grad_bias,
    ) -> None:  # fmt: skip
        self._for_backward(problem, grad_y, x, grad_x, grad_residual).backward_cpu(
            grad_y, x, weight, statistics, mask, keep, grad_x, grad_residual, grad_weight, grad_bias,
            None, torch.get_num_threads(),
        )  # fmt: skip


class CudaBackend(_NativeBackend):
    """The CUDA kernels of a native module, on torch's current stream."""

    def __init__(self, native: ModuleType) -> None:
        super().__init__(native)
        self._architectures = str(native.build_info()["cuda_architectures"])

    def call(self, prepared: Any, name: str, x: Tensor, *arguments: Any) -> Any:
        """As of `CppBackend`."""
        self._check_device(x)
        with torch.cuda.device_of(x):
            return getattr(prepared, f"{name}_cuda")(*arguments, cuda_stream(x))

    def forward(
        self, problem: Problem, x, residual, weight, bias, keep, y, statistics, mask,
        running_mean=None, running_var=None,
    ) -> None:  # fmt: skip
        self._check_device(x)
        prepared = self._for_forward(problem, x, residual, y)
        with torch.cuda.device_of(x):
            scratch = statistics.new_empty(prepared.workspace_cuda())
            prepared.forward_cuda(
                x, residual, weight, bias, keep, y, statistics, mask, running_mean, running_var,
                scratch, cuda_stream(x),
            )  # fmt: skip

    def backward(
        self, problem: Problem, grad_y, x, weight, statistics, mask, keep,
        grad_x, grad_residual, grad_weight, grad_bias,
    ) -> None:  # fmt: skip
        self._check_device(x)
        prepared = self._for_backward(problem, grad_y, x, grad_x, grad_residual)
        with torch.cuda.device_of(x):
            scratch = statistics.new_empty(prepared.workspace_cuda())
            prepared.backward_cuda(
                grad_y, x, weight, statistics, mask, keep, grad_x, grad_residual, grad_weight, grad_bias,
                scratch, cuda_stream(x),
            )  # fmt: skip

    def _check_device(self, tensor: Tensor) -> None:
        if tensor.is_cuda:  # CUDA on the host takes CPU tensors
            check_capability(self._architectures, tensor.device.index)
