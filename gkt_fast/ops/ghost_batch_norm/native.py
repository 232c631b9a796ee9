"""Hands `ghost_batch_norm` to its C++ and CUDA kernels: addresses, strides, scratch memory."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..native import DTYPES, check_capability, cuda_stream
from .problem import Problem, strides_of

__all__ = ["CppBackend", "CudaBackend"]


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _activation(tensor: Tensor | None, problem: Problem) -> tuple[int, int, int, int]:
    """Address and strides of batch, channel and position."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), *strides_of(tensor, problem)


def _activations(problem: Problem, *tensors: Tensor | None) -> list[tuple[int, int, int, int]]:
    """`_activation` of each; mostly all have the strides of the first."""
    first, found = tensors[0].stride(), strides_of(tensors[0], problem)
    return [
        (tensor.data_ptr(), *found)
        if tensor is not None and tensor.stride() == first
        else _activation(tensor, problem)
        for tensor in tensors
    ]


@functools.lru_cache(maxsize=4096)
def _native_shape(problem: Problem) -> tuple[int, ...]:
    return DTYPES[problem.dtype], problem.channels_last, *problem.sizes, problem.lead_rows


class _NativeBackend:
    """Hands addresses to a pair of native functions.

    Args:
        forward: e.g. `ghost_batch_norm_fwd_cpu` of the native module.
        backward: the same for the backward pass.
        where: gives the last argument, the number of threads or the stream, for x.
        workspace: number of elements of scratch memory for a shape; None where the functions need none.
    """

    def __init__(self, forward, backward, where, workspace=None) -> None:
        self._forward, self._backward, self._where, self._workspace = forward, backward, where, workspace

    def _scratch(self, problem: Problem, statistics: Tensor) -> Tensor | None:
        return (
            None if self._workspace is None else statistics.new_empty(self._workspace(_native_shape(problem)))
        )

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
        weight, bias, keep = _dense(weight), _dense(bias), _dense(keep)
        scratch = self._scratch(problem, statistics)
        at_x, at_residual, at_y = _activations(problem, x, residual, y)
        self._forward(
            _native_shape(problem),
            problem.eps,
            problem.relu,
            problem.use_running,
            at_x,
            at_residual,
            _address(weight),
            _address(bias),
            _address(keep),
            at_y,
            _address(statistics),
            _address(mask),
            _address(running_mean),
            _address(running_var),
            problem.momentum or 0.0,
            _address(scratch),
            self._where(x),
        )

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
        statistics = statistics.contiguous()
        weight, keep = _dense(weight), _dense(keep)
        scratch = self._scratch(problem, statistics)
        at_x, at_grad_y, at_grad_x, at_grad_residual = _activations(problem, x, grad_y, grad_x, grad_residual)
        self._backward(
            _native_shape(problem),
            problem.eps,
            problem.relu,
            problem.use_running,
            at_grad_y,
            at_x,
            _address(weight),
            _address(statistics),
            _address(mask),
            _address(keep),
            at_grad_x,
            at_grad_residual,
            _address(grad_weight),
            _address(grad_bias),
            _address(scratch),
            self._where(x),
        )


class CppBackend(_NativeBackend):
    """The C++ kernels of a native module."""

    def __init__(self, native: ModuleType) -> None:
        super().__init__(
            native.ghost_batch_norm_fwd_cpu,
            native.ghost_batch_norm_bwd_cpu,
            lambda x: torch.get_num_threads(),
        )


class CudaBackend(_NativeBackend):
    """The CUDA kernels of a native module, on torch's current stream."""

    def __init__(self, native: ModuleType) -> None:
        super().__init__(
            native.ghost_batch_norm_fwd_cuda,
            native.ghost_batch_norm_bwd_cuda,
            cuda_stream,
            native.ghost_batch_norm_workspace_cuda,
        )
        self._architectures = str(native.build_info()["cuda_architectures"])

    def _check_device(self, tensor: Tensor) -> None:
        if tensor.is_cuda:  # CUDA on the host takes CPU tensors
            check_capability(self._architectures, tensor.device.index)

    def forward(self, problem: Problem, x: Tensor, *tensors: Tensor | None) -> None:
        self._check_device(x)
        with torch.cuda.device_of(x):
            super().forward(problem, x, *tensors)

    def backward(self, problem: Problem, grad_y: Tensor, *tensors: Tensor | None) -> None:
        self._check_device(grad_y)
        with torch.cuda.device_of(grad_y):
            super().backward(problem, grad_y, *tensors)
