"""Triton kernels of `ghost_batch_norm`: two passes each way, sums per chunk of lines and then the affine map.

A line is what lies together in memory: the channels of one position (channels_last, `length` = C, one line per batch
row and position) or the positions of one channel (planes, `length` = positions, one line per batch row, a program
per channel). Sums are shifted by values of the data and merged in float64, as a tree of a fixed shape. The mean keeps
what its rounding loses, see csrc/cpu/ghost_batch_norm.cpp. Mask and statistics: csrc/gkt_abi.h.

STEP neighbours of a line are accessed together: 16 bytes of them, or as many as divide every size and address.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["affine_kernel", "merge_gradients_kernel", "merge_statistics_kernel", "sums_kernel"]

NOT_SPECIALIZED = [
    *("x_ptr", "grad_ptr", "other_ptr", "out_ptr", "grad_residual_ptr", "grad_weight_ptr", "grad_bias_ptr"),
    *("mask_ptr", "keep_ptr", "weight_ptr", "bias_ptr", "statistics_ptr", "coefficients_ptr", "parts_ptr"),
    *(f"{tensor}_{unit}_stride" for tensor in ("x", "grad", "other", "out") for unit in ("line", "channel")),
    *("ghosts", "lines", "length", "channels", "chunk_lines", "chunks", "values_per_line", "values"),
    *("has_weight", "has_bias", "has_keep"),
]


@triton.jit
def _tile(pointer, lines, columns, STEP: tl.constexpr):
    """Pointers (ROWS, COLUMNS)."""
    tile = pointer + lines[:, None] + columns[None, :]
    if STEP > 1:
        tile = tl.multiple_of(tile, (1, STEP * (pointer.dtype.element_ty.primitive_bitwidth // 8)))
    return tile


@triton.jit
def _valid(rows, columns, STEP: tl.constexpr):
    """Which of (ROWS, COLUMNS) exist: STEP neighbours do together."""
    return tl.max_constancy(rows[:, None] & columns[None, :], (1, STEP))


@triton.jit
def _place(program, channels, chunks, CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """Ghost batch, chunk, and block of columns (channels_last) or channel (planes) of a program."""
    blocks = channels
    if CHANNELS_LAST:
        blocks = tl.cdiv(channels, COLUMNS)
    index = program // blocks
    return (index // chunks).to(tl.int64), index % chunks, program % blocks


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sums_kernel(
    x_ptr,  # (lines of all ghost batches, length) at x_line_stride, planes: one such matrix per channel
    grad_ptr,  # the same; only with BACKWARD
    mask_ptr,  # (lines, [channels,] ceil(length / 8)) bits
    statistics_ptr,  # (3, ghosts, channels); only with BACKWARD
    parts_ptr,  # (ghosts, chunks, 3, channels): shift, sum, sum of squares; BACKWARD: 0, sum, sum of products
    x_line_stride: tl.int64,
    x_channel_stride: tl.int64,
    grad_line_stride: tl.int64,
    grad_channel_stride: tl.int64,
    lines: tl.int32,  # of one ghost batch
    length: tl.int32,
    channels: tl.int32,
    chunk_lines: tl.int32,
    chunks: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
    RELU: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,  # of the sums
):
    ghost, chunk, block = _place(tl.program_id(0), channels, chunks, CHANNELS_LAST, COLUMNS)
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
            valid = _valid(row < last, column < length, STEP)
            x = tl.load(_tile(x_ptr, line * x_line_stride, column, STEP), mask=valid, other=0.0)
            centered = tl.where(valid, x.to(DTYPE) - shift[None, :], 0.0)
            if BACKWARD:
                address = _tile(grad_ptr, line * grad_line_stride, column, STEP)
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_statistics_kernel(
    parts_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    coefficients_ptr,  # (2, ghosts, channels): scale, offset
    ghosts: tl.int32,
    lines: tl.int32,
    values_per_line: tl.int32,  # of one channel
    has_weight: tl.int32,
    has_bias: tl.int32,
    channels: tl.int32,
    chunk_lines: tl.int32,
    chunks: tl.int32,
    USE_RUNNING: tl.constexpr,
    EPS: tl.constexpr,
    LANES: tl.constexpr,  # that share the chunks of a channel
    BLOCK: tl.constexpr,  # channels
    DTYPE: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK)
    ghost = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    statistic = statistics_ptr + ghost * channels + channel
    plane = ghosts * channels
    zeros = tl.zeros([BLOCK], tl.float64)
    if USE_RUNNING:
        low = zeros
        var = tl.load(statistic + 2 * plane, mask=inside, other=1.0).to(tl.float64)
    else:
        part_ptr = parts_ptr + ghost * chunks * 3 * channels + channel
        # Numbers of values as float64: of a whole chunk, of the last one, of all.
        whole = tl.zeros([], tl.float64) + tl.minimum(chunk_lines, lines) * values_per_line
        total = (tl.zeros([], tl.float64) + lines) * values_per_line
        rest = total - whole * (chunks - 1)
        inverse_whole, inverse_rest, inverse = 1.0 / whole, 1.0 / rest, 1.0 / total
        # Means are taken from that of the first chunk on, which keeps what their differences are.
        origin = tl.load(part_ptr + channels, mask=inside, other=0.0).to(tl.float64)
        origin = origin * tl.where(chunks > 1, inverse_whole, inverse_rest)
        origin += tl.load(part_ptr, mask=inside, other=0.0).to(tl.float64)
        sums = tl.zeros([LANES, BLOCK], tl.float64)
        squares = tl.zeros([LANES, BLOCK], tl.float64)
        for first in range(0, chunks, LANES):
            chunk = first + tl.arange(0, LANES)
            valid = (chunk < chunks)[:, None] & inside[None, :]
            part = part_ptr[None, :] + chunk[:, None] * 3 * channels
            shift = tl.load(part, mask=valid, other=0.0).to(tl.float64)
            part_sum = tl.load(part + channels, mask=valid, other=0.0).to(tl.float64)
            square = tl.load(part + 2 * channels, mask=valid, other=0.0).to(tl.float64)
            last = (chunk == chunks - 1)[:, None]
            n = tl.where(last, rest, whole)
            part_mean = part_sum * tl.where(last, inverse_rest, inverse_whole)
            distance = tl.where(valid, shift + part_mean - origin[None, :], 0.0)
            square = square - part_mean * part_sum
            sums += n * distance
            squares += tl.where(square < 0, 0.0, square) + n * distance * distance
        moved = tl.sum(sums, 0) * inverse
        mean = origin + moved
        var = (tl.sum(squares, 0) - tl.sum(sums, 0) * moved) * inverse
        var = tl.where(var < 0, 0.0, var)
        rounded = mean.to(DTYPE)
        low = (mean - rounded.to(tl.float64)).to(DTYPE).to(tl.float64)
        tl.store(statistic, rounded, mask=inside)
        tl.store(statistic + plane, low.to(DTYPE), mask=inside)
        tl.store(statistic + 2 * plane, var.to(DTYPE), mask=inside)
        var = var.to(DTYPE).to(tl.float64)
    scale = tl.load(weight_ptr + channel, mask=inside & (has_weight != 0), other=1.0).to(tl.float64)
    scale = scale / tl.sqrt(var + EPS)
    offset = tl.load(bias_ptr + channel, mask=inside & (has_bias != 0), other=0.0).to(tl.float64)
    offset = offset - low * scale
    coefficient = coefficients_ptr + ghost * channels + channel
    tl.store(coefficient, scale.to(DTYPE), mask=inside)
    tl.store(coefficient + plane, offset.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_gradients_kernel(
    parts_ptr,
    weight_ptr,
    statistics_ptr,
    keep_ptr,
    coefficients_ptr,  # (3, ghosts, channels): scale, slope, offset
    grad_weight_ptr,
    grad_bias_ptr,
    ghosts: tl.int32,
    values: tl.int64,  # of one channel and ghost batch
    has_weight: tl.int32,
    has_keep: tl.int32,
    channels: tl.int32,
    chunks: tl.int32,
    USE_RUNNING: tl.constexpr,
    EPS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    plane = ghosts * channels
    inverse = 1.0 / (tl.zeros([BLOCK], tl.float64) + values)
    weight = tl.load(weight_ptr + channel, mask=inside & (has_weight != 0), other=1.0).to(tl.float64)
    grad_weight = tl.zeros([BLOCK], tl.float64)
    grad_bias = tl.zeros([BLOCK], tl.float64)
    for ghost in range(ghosts):
        totals = tl.zeros([LANES, BLOCK], tl.float64)
        products = tl.zeros([LANES, BLOCK], tl.float64)
        for first in range(0, chunks, LANES):
            chunk = first + tl.arange(0, LANES)
            valid = (chunk < chunks)[:, None] & inside[None, :]
            part = parts_ptr + (ghost * chunks + chunk[:, None]) * 3 * channels + channel[None, :]
            totals += tl.load(part + channels, mask=valid, other=0.0).to(tl.float64)
            products += tl.load(part + 2 * channels, mask=valid, other=0.0).to(tl.float64)
        total, product = tl.sum(totals, 0), tl.sum(products, 0)
        statistic = statistics_ptr + ghost * channels + channel
        low = tl.load(statistic + plane, mask=inside, other=0.0).to(tl.float64)
        var = tl.load(statistic + 2 * plane, mask=inside, other=1.0).to(tl.float64)
        rstd = 1.0 / tl.sqrt(var + EPS)
        scale = weight * rstd
        product = product - low * total
        slope = tl.zeros([BLOCK], tl.float64)
        offset = tl.zeros([BLOCK], tl.float64)
        if not USE_RUNNING:
            slope = -scale * rstd * rstd * product * inverse
            offset = -scale * total * inverse - slope * low
        coefficient = coefficients_ptr + ghost * channels + channel
        tl.store(coefficient, scale.to(DTYPE), mask=inside)
        tl.store(coefficient + plane, slope.to(DTYPE), mask=inside)
        tl.store(coefficient + 2 * plane, offset.to(DTYPE), mask=inside)
        kept = tl.load(keep_ptr + ghost, mask=has_keep != 0, other=1) != 0
        total = tl.where(kept, total, 0.0)
        product = tl.where(kept, product, 0.0)
        grad_weight += product * rstd
        grad_bias += total
    tl.store(grad_weight_ptr + channel, grad_weight.to(DTYPE), mask=inside)
    tl.store(grad_bias_ptr + channel, grad_bias.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def affine_kernel(
    x_ptr,
    other_ptr,  # residual; BACKWARD: grad_y
    mask_ptr,
    statistics_ptr,
    coefficients_ptr,  # (2 or 3, ghosts, channels)
    keep_ptr,  # (ghosts,); only with has_keep
    out_ptr,  # y; BACKWARD: grad_x
    grad_residual_ptr,
    x_line_stride: tl.int64,
    x_channel_stride: tl.int64,
    other_line_stride: tl.int64,
    other_channel_stride: tl.int64,
    out_line_stride: tl.int64,
    out_channel_stride: tl.int64,
    ghosts: tl.int32,
    lines: tl.int32,
    length: tl.int32,
    channels: tl.int32,
    chunk_lines: tl.int32,
    chunks: tl.int32,
    has_keep: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
    RELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    # From the last chunk to the first, to meet what the first pass has left in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    ghost, chunk, block = _place(program, channels, chunks, CHANNELS_LAST, COLUMNS)
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
    kept = tl.load(keep_ptr + ghost, mask=has_keep != 0, other=1) != 0
    mask_bytes = (length + 7) // 8

    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        line = ghost * lines + row.to(tl.int64)
        mask_line = line
        if not CHANNELS_LAST:
            mask_line = line * channels + block
        for column_start in range(column_first, column_end, COLUMNS):
            column = column_start + tl.arange(0, COLUMNS)
            valid = _valid(row < last, column < length, STEP)
            address = _tile(x_ptr, line * x_line_stride, column, STEP)
            x = tl.load(address, mask=valid, other=0.0).to(DTYPE)
            other = x
            if HAS_RESIDUAL or BACKWARD:
                address = _tile(other_ptr, line * other_line_stride, column, STEP)
                other = tl.load(address, mask=valid, other=0.0).to(DTYPE)
            if BACKWARD:
                if RELU:
                    byte = mask_ptr + mask_line[:, None] * mask_bytes + (column // 8)[None, :]
                    bits = tl.load(byte, mask=valid, other=0).to(tl.int32)
                    other = tl.where((bits >> (column % 8)[None, :]) & 1 != 0, other, 0.0)
                out = other * scale[None, :] + ((x - mean[None, :]) * slope[None, :] + offset[None, :])
                out = tl.where(kept, out, 0.0)
                if HAS_RESIDUAL:
                    address = _tile(grad_residual_ptr, line * out_line_stride, column, STEP)
                    tl.store(
                        address,
                        other.to(grad_residual_ptr.dtype.element_ty),
                        mask=valid,
                        cache_modifier=".cs",
                    )
            else:
                out = (x - mean[None, :]) * scale[None, :] + offset[None, :]
                if HAS_RESIDUAL:
                    out += other
                if RELU:
                    passed = out > 0
                    passed = passed | (out != out)
                    out = tl.where(passed, out, 0.0)
                    passed = passed | (kept == 0)
                    bits = tl.reshape((passed & valid).to(tl.int32), [ROWS, COLUMNS // 8, 8])
                    bits = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
                    byte = column_start // 8 + tl.arange(0, COLUMNS // 8)
                    tl.store(
                        mask_ptr + mask_line[:, None] * mask_bytes + byte[None, :],
                        bits.to(tl.uint8),
                        mask=(row < last)[:, None] & (byte * 8 < length)[None, :],
                    )
                if HAS_RESIDUAL:
                    out = tl.where(kept, out, other)
            address = _tile(out_ptr, line * out_line_stride, column, STEP)
            tl.store(address, out.to(out_ptr.dtype.element_ty), mask=valid, cache_modifier=".cs")
