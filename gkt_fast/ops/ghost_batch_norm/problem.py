"""What a backend of `ghost_batch_norm` is told besides tensors, in which memory layouts it gets them, what it fills."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..dtypes import accumulation_dtype

__all__ = [
    "Problem",
    "describe",
    "equal_parts",
    "gradient_outputs",
    "mask_size",
    "outputs",
    "readable",
    "readable_as",
    "strides_of",
]


class Problem(NamedTuple):
    """What a backend is told besides tensors. x, residual and the gradients are all in one layout."""

    sizes: tuple[int, int, int, int]  # ghost batches, rows of each but the first, channels, positions
    lead_rows: int  # of the first ghost batch
    dtype: torch.dtype
    channels_last: bool
    ghosts: int
    relu: bool
    eps: float
    use_running: bool
    momentum: float | None = None  # of the running statistics that are updated; None: none are
    strides: tuple[int, int, int] | None = None  # `strides_of` every activation; None: each has its own


class Part(NamedTuple):
    """Ghost batches of as many rows each: the problem that they are, and where they lie in the whole one."""

    problem: Problem
    ghosts: slice
    rows: slice

    def of_rows(self, tensor: Tensor | None) -> Tensor | None:
        """A view of (rows of all ghost batches, ...); None of None."""
        return None if tensor is None else tensor[self.rows]

    def of_ghosts(self, tensor: Tensor | None, dim: int = 0) -> Tensor | None:
        """A view of a tensor with the ghost batches in `dim`; None of None."""
        return None if tensor is None else tensor.narrow(dim, self.ghosts.start, self.problem.ghosts)


def equal_parts(problem: Problem) -> tuple[Part, ...]:
    """The first ghost batch and the others, or all of them where they have as many rows."""
    ghosts, rows, *rest = problem.sizes
    lead = problem.lead_rows
    if lead == rows:
        return (Part(problem, slice(0, ghosts), slice(0, ghosts * rows)),)
    first = problem._replace(sizes=(1, lead, *rest), ghosts=1)
    others = problem._replace(sizes=(ghosts - 1, rows, *rest), ghosts=ghosts - 1, lead_rows=rows)
    return (
        Part(first, slice(0, 1), slice(0, lead)),
        Part(others, slice(1, ghosts), slice(lead, lead + (ghosts - 1) * rows)),
    )


def describe(
    x: Tensor,
    channels_last: bool,
    ghosts: int,
    relu: bool,
    eps: float,
    use_running: bool,
    lead_rows: int | None = None,
    momentum: float | None = None,
) -> Problem:
    """The problem for an x in this layout; `lead_rows` and `momentum` as of `ghost_batch_norm`."""
    shape = x.shape
    rows = shape[0] // ghosts
    if lead_rows is None:
        lead_rows = rows
    elif ghosts > 1:
        rows = (shape[0] - lead_rows) // (ghosts - 1)
    sizes = (ghosts, rows, shape[1], math.prod(shape[2:]))
    return Problem(sizes, lead_rows, x.dtype, channels_last, ghosts, relu, eps, use_running, momentum)


def mask_size(shape: tuple[int, ...], channels_last: bool) -> int:
    """Bytes of the ReLU mask: one bit per element, lines of channels (channels_last) or of positions."""
    rows, channels, *spatial = shape
    positions = math.prod(spatial)
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
    if has_planes and math.prod(shape[2:]) > 1:
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
    return None if position_stride is None else (math.prod(shape[2:]) * position_stride, 1, position_stride)


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


def strides_of(x: Tensor, problem: Problem) -> tuple[int, int, int]:
    """Of batch, channel and position, for a tensor in the problem's layout."""
    return _cached_strides(x.shape, x.stride(), problem.channels_last)


def outputs(x: Tensor, channels_last: bool, ghosts: int, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for y, for the statistics (3, m, C), and for the ReLU mask; the latter is empty without ReLU.

    The statistics are the mean, what rounding took from the mean, and the variance. The mask has one bit per element
    of y, 1 where the ReLU passes the gradient (layout: csrc/gkt_abi.h).
    """
    y = torch.empty_like(x)
    statistics = x.new_empty((3, ghosts, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    mask = x.new_empty(mask_size(x.shape, channels_last) if relu else 0, dtype=torch.uint8)
    return y, statistics, mask


def gradient_outputs(
    x: Tensor, statistics: Tensor, with_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Memory for the gradients of x, residual (None without one), weight and bias."""
    channels = x.shape[1]
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if with_residual else None
    return grad_x, grad_residual, statistics.new_empty(channels), statistics.new_empty(channels)
