"""ghost_batch_norm in Triton: two passes each way, sums per chunk of lines and then the affine map.

A line is what lies together in memory: the channels of one position (channels_last, `length` = C, one line per batch
row and position) or the positions of one channel (planes, `length` = positions, one line per batch row, a program
per channel). Sums are shifted by values of the data and merged in float64 in the order of the chunks. The mean keeps
what its rounding loses, see csrc/cpu/ghost_batch_norm.cpp. Mask and statistics: csrc/gkt_abi.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["aot_configurations", "backward", "forward"]

TILE = 2048  # elements that a program holds at once
TILES_PER_CHUNK = 16
MERGED_CHANNELS = 32
WARPS = 4


@triton.jit
def _sums_kernel(
    x_ptr,  # (lines of all ghost batches, length) at x_line_stride, planes: one such matrix per channel
    grad_ptr,  # the same; only with BACKWARD
    mask_ptr,  # (lines, [channels,] ceil(length / 8)) bits
    statistics_ptr,  # (3, ghosts, channels); only with BACKWARD
    parts_ptr,  # (ghosts, chunks, 3, channels): shift, sum, sum of squares; BACKWARD: 0, sum, sum of products
    x_line_stride,
    x_channel_stride,
    grad_line_stride,
    grad_channel_stride,
    lines,  # of one ghost batch
    length,
    channels,
    chunk_lines,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,  # of the sums
):
    ghost = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(1)
    first, last = chunk * chunk_lines, tl.minimum(lines, (chunk + 1) * chunk_lines)
    if CHANNELS_LAST:
        channel = block * COLUMNS + tl.arange(0, COLUMNS)
        column_first, column_end = block * COLUMNS, block * COLUMNS + COLUMNS
        x_ptr += ghost * lines * x_line_stride
        grad_ptr += ghost * lines * grad_line_stride
    else:
        channel = block + tl.zeros([COLUMNS], tl.int32)
        column_first, column_end = 0, length
        x_ptr += ghost * lines * x_line_stride + block.to(tl.int64) * x_channel_stride
        grad_ptr += ghost * lines * grad_line_stride + block.to(tl.int64) * grad_channel_stride
    inside = channel < channels
    mask_bytes = (length + 7) // 8

    if BACKWARD:
        shift = tl.load(statistics_ptr + ghost * channels + channel, mask=inside, other=0.0)
    else:
        # The mean of four values spread over the chunk: near its mean, and exact for equal values.
        apart = (last - first) // 4
        if CHANNELS_LAST:  # noqa: SIM108
            sample_column = channel
        else:
            sample_column = length // 2 + tl.zeros([COLUMNS], tl.int32)
        shift = tl.zeros([COLUMNS], DTYPE)
        for sample in tl.static_range(4):
            sample_line = (first + sample * apart).to(tl.int64)
            shift += tl.load(x_ptr + sample_line * x_line_stride + sample_column, mask=inside, other=0.0).to(
                DTYPE
            )
        shift = shift * 0.25

    sums = tl.zeros([ROWS, COLUMNS], DTYPE)
    products = tl.zeros([ROWS, COLUMNS], DTYPE)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        line = row.to(tl.int64)
        for column_start in range(column_first, column_end, COLUMNS):
            column = column_start + tl.arange(0, COLUMNS)
            valid = (row < last)[:, None] & (column < length)[None, :]
            x = tl.load(x_ptr + line[:, None] * x_line_stride + column[None, :], mask=valid, other=0.0)
            centered = tl.where(valid, x.to(DTYPE) - shift[None, :], 0.0)
            if BACKWARD:
                address = grad_ptr + line[:, None] * grad_line_stride + column[None, :]
                dz = tl.load(address, mask=valid, other=0.0).to(DTYPE)
                if RELU:
                    mask_line = ghost * lines + line
                    if not CHANNELS_LAST:
                        mask_line = mask_line * channels + block
                    bits = tl.load(
                        mask_ptr + mask_line[:, None] * mask_bytes + (column // 8)[None, :],
                        mask=valid,
                        other=0,
                    )
                    dz = tl.where((bits.to(tl.int32) >> (column % 8)[None, :]) & 1 != 0, dz, 0.0)
                sums += dz
                products += dz * centered
            else:
                sums += centered
                products += centered * centered

    total, product = tl.sum(sums, 0), tl.sum(products, 0)
    if not CHANNELS_LAST:
        total, product = (
            tl.sum(total, 0) + tl.zeros([COLUMNS], DTYPE),
            tl.sum(product, 0) + tl.zeros([COLUMNS], DTYPE),
        )
        inside = inside & (tl.arange(0, COLUMNS) == 0)
    part_ptr = parts_ptr + (ghost * chunks + chunk) * 3 * channels + channel
    tl.store(part_ptr, shift, mask=inside)
    tl.store(part_ptr + channels, total, mask=inside)
    tl.store(part_ptr + 2 * channels, product, mask=inside)


@triton.jit
def _merge_statistics_kernel(
    parts_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    coefficients_ptr,  # (2, ghosts, channels): scale, offset
    ghosts,
    lines,
    values_per_line,  # of one channel
    channels,
    chunk_lines,
    chunks,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    USE_RUNNING: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ghost = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    statistic = statistics_ptr + ghost * channels + channel
    plane = ghosts * channels
    zeros = tl.zeros([BLOCK], tl.float64)
    if USE_RUNNING:
        low = zeros
        var = tl.load(statistic + 2 * plane, mask=inside, other=1.0).to(tl.float64)
    else:
        part_ptr = parts_ptr + ghost * chunks * 3 * channels + channel
        mean = zeros
        for chunk in range(chunks):
            n = zeros + tl.minimum(chunk_lines, lines - chunk * chunk_lines) * values_per_line
            part = part_ptr + chunk * 3 * channels
            mean += n * tl.load(part, mask=inside, other=0.0).to(tl.float64)
            mean += tl.load(part + channels, mask=inside, other=0.0).to(tl.float64)
        total = (zeros + lines) * values_per_line
        mean = mean / total
        squares = zeros
        for chunk in range(chunks):
            n = zeros + tl.minimum(chunk_lines, lines - chunk * chunk_lines) * values_per_line
            part = part_ptr + chunk * 3 * channels
            total_sum = tl.load(part + channels, mask=inside, other=0.0).to(tl.float64)
            part_mean = total_sum / n
            distance = tl.load(part, mask=inside, other=0.0).to(tl.float64) + part_mean - mean
            square = (
                tl.load(part + 2 * channels, mask=inside, other=0.0).to(tl.float64) - part_mean * total_sum
            )
            squares += tl.where(square < 0, 0.0, square) + n * distance * distance
        var = squares / total
        rounded = mean.to(DTYPE)
        low = (mean - rounded.to(tl.float64)).to(DTYPE).to(tl.float64)
        tl.store(statistic, rounded, mask=inside)
        tl.store(statistic + plane, low.to(DTYPE), mask=inside)
        tl.store(statistic + 2 * plane, var.to(DTYPE), mask=inside)
        var = var.to(DTYPE).to(tl.float64)
    scale = 1.0 / tl.sqrt(var + EPS)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    offset = -low * scale
    if HAS_BIAS:
        offset = offset + tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    coefficient = coefficients_ptr + ghost * channels + channel
    tl.store(coefficient, scale.to(DTYPE), mask=inside)
    tl.store(coefficient + plane, offset.to(DTYPE), mask=inside)


@triton.jit
def _merge_gradients_kernel(
    parts_ptr,
    weight_ptr,
    statistics_ptr,
    keep_ptr,
    coefficients_ptr,  # (3, ghosts, channels): scale, slope, offset
    grad_weight_ptr,
    grad_bias_ptr,
    ghosts,
    values,  # of one channel and ghost batch
    channels,
    chunks,
    HAS_WEIGHT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    USE_RUNNING: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    plane = ghosts * channels
    weight = tl.full([BLOCK], 1.0, tl.float64)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    grad_weight = tl.zeros([BLOCK], tl.float64)
    grad_bias = tl.zeros([BLOCK], tl.float64)
    for ghost in range(ghosts):
        total = tl.zeros([BLOCK], tl.float64)
        product = tl.zeros([BLOCK], tl.float64)
        for chunk in range(chunks):
            part = parts_ptr + (ghost * chunks + chunk) * 3 * channels + channel
            total += tl.load(part + channels, mask=inside, other=0.0).to(tl.float64)
            product += tl.load(part + 2 * channels, mask=inside, other=0.0).to(tl.float64)
        statistic = statistics_ptr + ghost * channels + channel
        low = tl.load(statistic + plane, mask=inside, other=0.0).to(tl.float64)
        var = tl.load(statistic + 2 * plane, mask=inside, other=1.0).to(tl.float64)
        rstd = 1.0 / tl.sqrt(var + EPS)
        scale = weight * rstd
        product = product - low * total
        slope = tl.zeros([BLOCK], tl.float64)
        offset = tl.zeros([BLOCK], tl.float64)
        if not USE_RUNNING:
            slope = -scale * rstd * rstd * product / values
            offset = -scale * total / values - slope * low
        coefficient = coefficients_ptr + ghost * channels + channel
        tl.store(coefficient, scale.to(DTYPE), mask=inside)
        tl.store(coefficient + plane, slope.to(DTYPE), mask=inside)
        tl.store(coefficient + 2 * plane, offset.to(DTYPE), mask=inside)
        if HAS_KEEP:
            kept = tl.load(keep_ptr + ghost) != 0
            total = tl.where(kept, total, 0.0)
            product = tl.where(kept, product, 0.0)
        grad_weight += product * rstd
        grad_bias += total
    tl.store(grad_weight_ptr + channel, grad_weight.to(DTYPE), mask=inside)
    tl.store(grad_bias_ptr + channel, grad_bias.to(DTYPE), mask=inside)


@triton.jit
def _affine_kernel(
    x_ptr,
    other_ptr,  # residual; BACKWARD: grad_y
    mask_ptr,
    statistics_ptr,
    coefficients_ptr,  # (2 or 3, ghosts, channels)
    keep_ptr,
    out_ptr,  # y; BACKWARD: grad_x
    grad_residual_ptr,
    x_line_stride,
    x_channel_stride,
    other_line_stride,
    other_channel_stride,
    out_line_stride,
    out_channel_stride,
    ghosts,
    lines,
    length,
    channels,
    chunk_lines,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
    RELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ghost = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(1)
    first, last = chunk * chunk_lines, tl.minimum(lines, (chunk + 1) * chunk_lines)
    if CHANNELS_LAST:
        channel = block * COLUMNS + tl.arange(0, COLUMNS)
        column_first, column_end = block * COLUMNS, block * COLUMNS + COLUMNS
    else:
        channel = block + tl.zeros([COLUMNS], tl.int32)
        column_first, column_end = 0, length
        x_ptr += block.to(tl.int64) * x_channel_stride
        other_ptr += block.to(tl.int64) * other_channel_stride
        out_ptr += block.to(tl.int64) * out_channel_stride
        grad_residual_ptr += block.to(tl.int64) * out_channel_stride
    inside = channel < channels
    plane = ghosts * channels
    mean = tl.load(statistics_ptr + ghost * channels + channel, mask=inside, other=0.0)
    coefficient = coefficients_ptr + ghost * channels + channel
    scale = tl.load(coefficient, mask=inside, other=0.0)
    offset = tl.load(coefficient + plane, mask=inside, other=0.0)
    if BACKWARD:
        slope = offset
        offset = tl.load(coefficient + 2 * plane, mask=inside, other=0.0)
    kept = True
    if HAS_KEEP:
        kept = tl.load(keep_ptr + ghost) != 0
    mask_bytes = (length + 7) // 8

    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        line = ghost * lines + row.to(tl.int64)
        mask_line = line
        if not CHANNELS_LAST:
            mask_line = line * channels + block
        for column_start in range(column_first, column_end, COLUMNS):
            column = column_start + tl.arange(0, COLUMNS)
            valid = (row < last)[:, None] & (column < length)[None, :]
            x = tl.load(x_ptr + line[:, None] * x_line_stride + column[None, :], mask=valid, other=0.0).to(
                DTYPE
            )
            other = x
            if HAS_RESIDUAL or BACKWARD:
                address = other_ptr + line[:, None] * other_line_stride + column[None, :]
                other = tl.load(address, mask=valid, other=0.0).to(DTYPE)
            if BACKWARD:
                if RELU:
                    byte = mask_ptr + mask_line[:, None] * mask_bytes + (column // 8)[None, :]
                    bits = tl.load(byte, mask=valid, other=0).to(tl.int32)
                    other = tl.where((bits >> (column % 8)[None, :]) & 1 != 0, other, 0.0)
                out = other * scale[None, :] + ((x - mean[None, :]) * slope[None, :] + offset[None, :])
                if HAS_KEEP:
                    out = tl.where(kept, out, 0.0)
                if HAS_RESIDUAL:
                    address = grad_residual_ptr + line[:, None] * out_line_stride + column[None, :]
                    tl.store(address, other.to(grad_residual_ptr.dtype.element_ty), mask=valid)
            else:
                out = (x - mean[None, :]) * scale[None, :] + offset[None, :]
                if HAS_RESIDUAL:
                    out += other
                if RELU:
                    passed = out > 0
                    passed = passed | (out != out)
                    out = tl.where(passed, out, 0.0)
                    if HAS_KEEP:
                        passed = passed | (kept == 0)
                    bits = tl.reshape((passed & valid).to(tl.int32), [ROWS, COLUMNS // 8, 8])
                    bits = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
                    byte = column_start // 8 + tl.arange(0, COLUMNS // 8)
                    tl.store(
                        mask_ptr + mask_line[:, None] * mask_bytes + byte[None, :],
                        bits.to(tl.uint8),
                        mask=(row < last)[:, None] & (byte * 8 < length)[None, :],
                    )
                if HAS_KEEP:
                    out = tl.where(kept, out, other)
            address = out_ptr + line[:, None] * out_line_stride + column[None, :]
            tl.store(address, out.to(out_ptr.dtype.element_ty), mask=valid)


def _power_of_two(number: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(number), least), most)


class _Plan:
    """Sizes and grids of one call."""

    def __init__(self, problem) -> None:
        ghosts, rows, channels, positions = problem.sizes
        self.problem, self.ghosts, self.channels = problem, ghosts, channels
        self.lines, self.length = (rows * positions, channels) if problem.channels_last else (rows, positions)
        self.values_per_line = 1 if problem.channels_last else positions
        self.columns = _power_of_two(self.length, 16, 128 if problem.channels_last else 1024)
        self.rows = _power_of_two(self.lines, 1, TILE // self.columns)
        tiles_across = 1 if problem.channels_last else triton.cdiv(positions, self.columns)
        self.chunk_lines = self.rows * max(1, TILES_PER_CHUNK // tiles_across)
        self.chunks = triton.cdiv(self.lines, self.chunk_lines)
        blocks = triton.cdiv(channels, self.columns) if problem.channels_last else channels
        self.grid = (ghosts * self.chunks, blocks)
        self.double = problem.dtype == torch.float64
        self.dtype = tl.float64 if self.double else tl.float32

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.lines, self.length, self.channels, self.chunk_lines, self.chunks

    @property
    def tile(self) -> dict[str, object]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DTYPE": self.dtype, "num_warps": WARPS}

    @property
    def merge(self) -> dict[str, object]:
        options = {"USE_RUNNING": self.problem.use_running, "EPS": self.problem.eps, "DTYPE": self.dtype}
        return {**options, "BLOCK": MERGED_CHANNELS, "num_warps": 1}

    def strides(self, tensor: torch.Tensor) -> tuple[int, int]:
        """From line to line, and in planes from channel to channel."""
        if not self.problem.channels_last:
            return tensor.stride(0), tensor.stride(1)
        steps = (tensor.stride(d) for d in (*range(tensor.dim() - 1, 1, -1), 0) if tensor.shape[d] > 1)
        return next(steps, self.channels), 0

    def scratch(self, x: torch.Tensor, *shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.float64 if self.double else torch.float32)


def forward(problem, x, residual, weight, bias, keep, y, statistics, mask) -> None:
    """Fills y, mask, and, unless running statistics are used, statistics. Tensors are in the problem's layout."""
    plan = _Plan(problem)
    ghosts, channels = plan.ghosts, plan.channels
    parts = plan.scratch(x, ghosts, plan.chunks, 3, channels)
    coefficients = plan.scratch(x, 2, ghosts, channels)
    layout = {"CHANNELS_LAST": problem.channels_last}
    with torch.cuda.device_of(x):
        if not problem.use_running:
            _sums_kernel[plan.grid](
                x, x, x, x, parts, *plan.strides(x), *plan.strides(x), *plan.sizes,
                BACKWARD=False, RELU=False, **layout, **plan.tile,
            )  # fmt: skip
        _merge_statistics_kernel[ghosts, triton.cdiv(channels, MERGED_CHANNELS)](
            parts, x if weight is None else weight, x if bias is None else bias, statistics, coefficients,
            ghosts, plan.lines, plan.values_per_line, channels, plan.chunk_lines, plan.chunks,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **plan.merge,
        )  # fmt: skip
        other = x if residual is None else residual
        _affine_kernel[plan.grid](
            x, other, mask, statistics, coefficients, mask if keep is None else keep, y, y,
            *plan.strides(x), *plan.strides(other), *plan.strides(y), ghosts, *plan.sizes,
            BACKWARD=False, RELU=problem.relu, HAS_RESIDUAL=residual is not None, HAS_KEEP=keep is not None,
            **layout, **plan.tile,
        )  # fmt: skip


def backward(
    problem, grad_y, x, weight, statistics, mask, keep, grad_x, grad_residual, grad_weight, grad_bias
) -> None:
    """Fills the gradients; grad_residual may be None. grad_x and grad_residual have the same strides."""
    plan = _Plan(problem)
    ghosts, channels = plan.ghosts, plan.channels
    parts = plan.scratch(x, ghosts, plan.chunks, 3, channels)
    coefficients = plan.scratch(x, 3, ghosts, channels)
    layout = {"CHANNELS_LAST": problem.channels_last}
    strides = (*plan.strides(x), *plan.strides(grad_y))
    with torch.cuda.device_of(x):
        _sums_kernel[plan.grid](
            x, grad_y, mask, statistics, parts, *strides, *plan.sizes,
            BACKWARD=True, RELU=problem.relu, **layout, **plan.tile,
        )  # fmt: skip
        _merge_gradients_kernel[(triton.cdiv(channels, MERGED_CHANNELS),)](
            parts, x if weight is None else weight, statistics, mask if keep is None else keep, coefficients,
            grad_weight, grad_bias, ghosts, plan.lines * plan.values_per_line, channels, plan.chunks,
            HAS_WEIGHT=weight is not None, HAS_KEEP=keep is not None, **plan.merge,
        )  # fmt: skip
        _affine_kernel[plan.grid](
            x, grad_y, mask, statistics, coefficients, mask if keep is None else keep, grad_x,
            grad_x if grad_residual is None else grad_residual, *strides, *plan.strides(grad_x), ghosts, *plan.sizes,
            BACKWARD=True, RELU=problem.relu, HAS_RESIDUAL=grad_residual is not None, HAS_KEEP=keep is not None,
            **layout, **plan.tile,
        )  # fmt: skip


_POINTERS = {"x", "grad", "other", "out", "grad_residual"}  # of activations; of bits: mask and keep
_BYTES = {"mask", "keep"}


def aot_configurations() -> Iterator[tuple]:
    """What the launchers can launch, one representative per dtype, layout, flags and shape of the tile."""
    for dtype, name in (
        (torch.float32, "fp32"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float64, "fp64"),
    ):
        yield from _aot_merge(dtype, name)
        for channels_last, sizes in (
            (True, (1, 64, 64, 3136)),  # columns 64
            (True, (1, 64, 2048, 49)),  # columns 128
            (False, (1, 64, 64, 3136)),  # columns 1024
            (False, (1, 64, 512, 49)),  # columns 64
        ):
            yield from _aot_tiles(dtype, name, channels_last, sizes)


def _aot_tiles(dtype: torch.dtype, name: str, channels_last: bool, sizes: tuple[int, ...]) -> Iterator[tuple]:
    for relu, residual, keep in (
        (True, True, False),
        (True, False, False),
        (False, False, False),
        (True, True, True),
    ):
        plan = _Plan(_AotProblem(sizes, dtype, channels_last, relu))
        tile = plan.tile
        tile.pop("num_warps")
        layout = f"{name}_{'channels_last' if channels_last else 'planes'}_{plan.columns}"
        flags = (
            "_".join(n for n, on in (("relu", relu), ("residual", residual), ("keep", keep)) if on) or "plain"
        )
        for backward in (False, True):
            direction = "backward" if backward else "forward"
            if not keep and not residual:
                constants = {
                    "CHANNELS_LAST": channels_last,
                    "BACKWARD": backward,
                    "RELU": relu and backward,
                    **tile,
                }
                if backward or not relu:
                    yield _aot(f"sums_{direction}_{layout}_{flags}", _sums_kernel, name, constants, WARPS)
            constants = {
                "CHANNELS_LAST": channels_last, "BACKWARD": backward, "RELU": relu,
                "HAS_RESIDUAL": residual, "HAS_KEEP": keep, **tile,
            }  # fmt: skip
            yield _aot(f"affine_{direction}_{layout}_{flags}", _affine_kernel, name, constants, WARPS)


def _aot_merge(dtype: torch.dtype, name: str) -> Iterator[tuple]:
    accumulated = tl.float64 if dtype == torch.float64 else tl.float32
    common = {"EPS": 1e-5, "BLOCK": MERGED_CHANNELS, "DTYPE": accumulated}
    for affine, running in ((True, False), (False, True)):
        constants = {"HAS_WEIGHT": affine, "HAS_BIAS": affine, "USE_RUNNING": running, **common}
        flags = "running" if running else "batch"
        yield _aot(f"merge_statistics_{name}_{flags}", _merge_statistics_kernel, name, constants, 1)
        constants = {"HAS_WEIGHT": affine, "HAS_KEEP": affine, "USE_RUNNING": running, **common}
        yield _aot(f"merge_gradients_{name}_{flags}", _merge_gradients_kernel, name, constants, 1)


class _AotProblem(NamedTuple):
    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    channels_last: bool
    relu: bool


def _aot(name: str, function, dtype: str, constants: dict[str, object], warps: int) -> tuple:
    accumulated = "fp64" if dtype == "fp64" else "fp32"
    signature = {}
    for argument in function.arg_names:
        stem = argument.removesuffix("_ptr")
        if argument in constants:
            signature[argument] = "constexpr"
        elif stem == argument:
            signature[argument] = "i32"
        else:
            signature[argument] = (
                f"*{dtype if stem in _POINTERS else 'u8' if stem in _BYTES else accumulated}"
            )
    whole = (
        "_line_stride",
        "length",
        "channels",
        "x_ptr",
        "grad_ptr",
        "other_ptr",
        "out_ptr",
        "residual_ptr",
    )
    divisible = tuple(argument for argument in signature if argument.endswith(whole))
    options = {"num_warps": warps, "num_stages": 3, "divisible_by_16": divisible}
    return name, function, signature, constants, options
