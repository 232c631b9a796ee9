"""What runs `ghost_batch_norm`: memory layouts, the native kernels' addresses, plain torch."""

from __future__ import annotations

import functools
import os
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..native import DTYPES as NATIVE_DTYPES
from ..native import cuda_stream, native_cuda_module, native_module
from ..registry import Implementation, register
from ..triton_failures import reporting_failures
from .checks import DTYPES, statistics_dtype

__all__ = ["Problem", "describe", "mask_size", "readable", "readable_as"]


class Problem(NamedTuple):
    """What a backend is told besides tensors. x, residual and the gradients are all in one layout."""

    sizes: tuple[int, int, int, int]  # ghost batches, rows of one, channels, positions
    dtype: torch.dtype
    channels_last: bool
    ghosts: int
    relu: bool
    eps: float
    use_running: bool


def describe(
    x: Tensor, channels_last: bool, ghosts: int, relu: bool, eps: float, use_running: bool
) -> Problem:
    """The problem for an x in this layout."""
    shape = x.shape
    sizes = (ghosts, shape[0] // ghosts, shape[1], _product(shape[2:]))
    return Problem(sizes, x.dtype, channels_last, ghosts, relu, eps, use_running)


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def mask_size(shape: tuple[int, ...], channels_last: bool) -> int:
    """Bytes of the ReLU mask: one bit per element, lines of channels (channels_last) or of positions."""
    rows, channels, *spatial = shape
    positions = _product(spatial)
    lines, length = (rows * positions, channels) if channels_last else (rows * channels, positions)
    return lines * ((length + 7) // 8)


def _position_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The distance of neighbouring positions if channels_last kernels can read it in place, otherwise None."""
    channels = shape[1]
    if channels > 1 and stride[1] != 1:
        return None
    first = following = None
    for dim in (*range(len(shape) - 1, 1, -1), 0):
        if shape[dim] == 1:
            continue
        if first is None:
            first = stride[dim]
        elif stride[dim] != following:
            return None
        following = stride[dim] * shape[dim]
    return channels if first is None else first


def _has_planes(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the positions of each row and channel are neighbours in memory."""
    following = 1
    for dim in range(len(shape) - 1, 1, -1):
        if shape[dim] != 1:
            if stride[dim] != following:
                return False
            following *= shape[dim]
    return True


def _find_layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool | None:
    has_planes = _has_planes(shape, stride)
    if has_planes and _product(shape[2:]) > 1:
        return False
    if _position_stride(shape, stride) is not None:
        return True
    return False if has_planes else None


def _find_strides(
    shape: tuple[int, ...], stride: tuple[int, ...], channels_last: bool
) -> tuple[int, int, int] | None:
    if not channels_last:
        return (stride[0], stride[1], 1) if _has_planes(shape, stride) else None
    position_stride = _position_stride(shape, stride)
    return None if position_stride is None else (_product(shape[2:]) * position_stride, 1, position_stride)


_cached_layout = functools.lru_cache(maxsize=4096)(_find_layout)
_cached_strides = functools.lru_cache(maxsize=4096)(_find_strides)


def _layout(x: Tensor) -> bool | None:
    """True: channels_last, False: planes, None: neither."""
    find = _find_layout if isinstance(x, FakeTensor) else _cached_layout  # symbolic sizes have no hash
    return find(x.shape, x.stride())


def readable(x: Tensor) -> tuple[Tensor, bool]:
    """x, or a copy where no kernel can read it in place, and whether its layout is channels_last."""
    channels_last = _layout(x)
    if channels_last is None:
        x = x.clone()  # dense, its dimensions in the same order
        channels_last = _layout(x)
    if channels_last is None:
        x = x.contiguous()
        channels_last = _layout(x)
    return x, channels_last


def readable_as(x: Tensor, channels_last: bool) -> Tensor:
    """x, or a copy where it isn't in the given layout."""
    if _cached_strides(x.shape, x.stride(), channels_last) is not None:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _activation(tensor: Tensor | None, problem: Problem) -> tuple[int, int, int, int]:
    """Address and strides of batch, channel and position."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), *_cached_strides(tensor.shape, tensor.stride(), problem.channels_last)


def _native_shape(problem: Problem) -> tuple[int, ...]:
    return NATIVE_DTYPES[problem.dtype], problem.channels_last, *problem.sizes


class NativeBackend:
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

    def forward(self, problem: Problem, x, residual, weight, bias, keep, y, statistics, mask) -> None:
        weight, bias, keep = (None if v is None else v.contiguous() for v in (weight, bias, keep))
        scratch = self._scratch(problem, statistics)
        self._forward(
            _native_shape(problem),
            problem.eps,
            problem.relu,
            problem.use_running,
            _activation(x, problem),
            _activation(residual, problem),
            _address(weight),
            _address(bias),
            _address(keep),
            _activation(y, problem),
            _address(statistics),
            _address(mask),
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
        weight, keep = (None if v is None else v.contiguous() for v in (weight, keep))
        scratch = self._scratch(problem, statistics)
        self._backward(
            _native_shape(problem),
            problem.eps,
            problem.relu,
            problem.use_running,
            _activation(grad_y, problem),
            _activation(x, problem),
            _address(weight),
            _address(statistics.contiguous()),
            _address(mask),
            _address(keep),
            _activation(grad_x, problem),
            _activation(grad_residual, problem),
            _address(grad_weight),
            _address(grad_bias),
            _address(scratch),
            self._where(x),
        )


class TorchBackend:
    """The op in plain torch, with the same mask and statistics, so that a backward pass may run elsewhere."""

    def forward(self, problem: Problem, x, residual, weight, bias, keep, y, statistics, mask) -> None:
        values = _by_ghost(x, problem)
        if not problem.use_running:
            var, exact_mean = torch.var_mean(values.double(), (1, 3), correction=0)
            statistics[0], statistics[2] = exact_mean, var
            statistics[1] = exact_mean - statistics[0]
        z = _normalized(values, statistics, problem.eps)
        if weight is not None:
            z = z * weight[:, None]
        if bias is not None:
            z = z + bias[:, None]
        if residual is not None:
            z = z + _by_ghost(residual, problem)
        if problem.relu:
            passed = ~(z <= 0) if keep is None else ~(z <= 0) | ~keep[:, None, None, None]
            mask.copy_(_pack(passed, problem))
            z = torch.relu(z)
        if keep is not None:
            z = torch.where(keep[:, None, None, None], z, _by_ghost(residual, problem))
        y.copy_(z.reshape(y.shape))

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
            dz = torch.where(keep[:, None, None, None], dz, 0)
        normalized = _normalized(_by_ghost(x, problem), statistics, problem.eps)
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
    return x.reshape(problem.sizes).to(statistics_dtype(x.dtype))


def _normalized(values: Tensor, statistics: Tensor, eps: float) -> Tensor:
    mean, low, var = statistics[:, :, None, :, None]
    return ((values - mean) - low) * torch.rsqrt(var + eps)


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def _pack(passed: Tensor, problem: Problem) -> Tensor:
    lines = passed.transpose(2, 3) if problem.channels_last else passed
    lines = torch.nn.functional.pad(lines.to(torch.uint8), (0, -lines.shape[-1] % 8))
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=passed.device)
    return (lines.reshape(-1, 8) * bits).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor, problem: Problem) -> Tensor:
    ghosts, rows, channels, positions = problem.sizes
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    shape = (positions, channels) if problem.channels_last else (channels, positions)
    lines = (mask[:, None] & bits).ne(0).reshape(ghosts, rows, shape[0], -1)[..., : shape[1]]
    return lines.transpose(2, 3) if problem.channels_last else lines


def _cpp() -> NativeBackend:
    native = native_module()
    return NativeBackend(
        native.ghost_batch_norm_fwd_cpu, native.ghost_batch_norm_bwd_cpu, lambda x: torch.get_num_threads()
    )


register(Implementation("ghost_batch_norm", "cpp", ("cpu",), DTYPES, _cpp))


class CudaBackend(NativeBackend):
    """The CUDA kernels of a native module, on torch's current stream."""

    def __init__(self, native: ModuleType) -> None:
        super().__init__(
            native.ghost_batch_norm_fwd_cuda,
            native.ghost_batch_norm_bwd_cuda,
            cuda_stream,
            native.ghost_batch_norm_workspace_cuda,
        )

    def forward(self, problem: Problem, x: Tensor, *tensors) -> None:
        with torch.cuda.device_of(x):
            super().forward(problem, x, *tensors)

    def backward(self, problem: Problem, grad_y: Tensor, *tensors) -> None:
        with torch.cuda.device_of(grad_y):
            super().backward(problem, grad_y, *tensors)


def _triton() -> SimpleNamespace:
    from ...kernels.triton import ghost_batch_norm as kernels

    return SimpleNamespace(
        forward=reporting_failures(kernels.forward), backward=reporting_failures(kernels.backward)
    )


# Triton's interpreter runs the kernels on CPU tensors.
_TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

register(
    Implementation("ghost_batch_norm", "cuda", ("cuda",), DTYPES, lambda: CudaBackend(native_cuda_module()))
)
register(Implementation("ghost_batch_norm", "triton", _TRITON_DEVICES, DTYPES, _triton))
register(Implementation("ghost_batch_norm", "torch", ("cpu", "cuda"), DTYPES, TorchBackend))
