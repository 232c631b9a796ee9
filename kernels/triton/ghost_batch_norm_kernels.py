"""Triton kernels of `ghost_batch_norm`: two passes each way, sums per chunk of lines and then the affine map.

Between them the sums are merged (ghost_batch_norm_merge.py).

A line is what lies together in memory: the channels of one position (channels_last, `length` = C, one line per batch
row and position) or the positions of one channel (planes, `length` = positions, one line per batch row, a program
per channel). Sums are shifted by values of the data and merged in float64, as a tree of a fixed shape. The mean keeps
what its rounding loses, see csrc/cpu/ghost_batch_norm.cpp. Mask and statistics: csrc/gkt_abi.h.

STEP neighbours of a line are accessed together: 16 bytes of them, or as many as divide every size and address.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NOT_SPECIALIZED", "affine_kernel", "sums_kernel"]

NOT_SPECIALIZED = [
    *("x_ptr", "grad_ptr", "other_ptr", "out_ptr", "grad_residual_ptr", "grad_weight_ptr", "grad_bias_ptr"),
    *("mask_ptr", "keep_ptr", "weight_ptr", "bias_ptr", "statistics_ptr", "coefficients_ptr", "parts_ptr"),
    *(f"{tensor}_{unit}_stride" for tensor in ("x", "grad", "other", "out") for unit in ("line", "channel")),
    *("ghosts", "lead_lines", "lines", "length", "channels", "chunk_lines", "lead_chunks", "chunks"),
    *("values_per_line", "has_weight", "has_bias", "has_keep", "running_mean_ptr", "running_var_ptr"),
    *("momentum", "has_momentum"),
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
def _place(
    program,
    lead_lines,
    lines,
    channels,
    chunk_lines,
    lead_chunks,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Where a program works.

    Ghost batch; chunk among those of all ghost batches; block of columns (channels_last) or channel (planes); number of
    lines before the ghost batch; the chunk's first line and its end, counted from there.
    """
    blocks = channels
    if CHANNELS_LAST:
        blocks = tl.cdiv(channels, COLUMNS)
    chunk = program // blocks
    other = tl.maximum(chunk - lead_chunks, 0)  # among those of the other ghost batches
    is_lead = chunk < lead_chunks
    ghost = tl.where(is_lead, 0, 1 + other // chunks).to(tl.int64)
    own = tl.where(is_lead, chunk, other % chunks)
    first_line = tl.where(is_lead, 0, lead_lines + (ghost - 1) * lines)
    end = tl.minimum(tl.where(is_lead, lead_lines, lines), (own + 1) * chunk_lines)
    return ghost, chunk, program % blocks, first_line, own * chunk_lines, end


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sums_kernel(
    x_ptr,  # (lines of all ghost batches, length) at x_line_stride, planes: one such matrix per channel
    grad_ptr,  # the same; only with BACKWARD
    mask_ptr,  # (lines, [channels,] ceil(length / 8)) bits
    statistics_ptr,  # (3, ghosts, channels); only with BACKWARD
    parts_ptr,  # (all chunks, 3, channels): shift, sum, sum of squares; BACKWARD: 0, sum, sum of products
    x_line_stride: tl.int64,
    x_channel_stride: tl.int64,
    grad_line_stride: tl.int64,
    grad_channel_stride: tl.int64,
    lead_lines: tl.int32,  # of the first ghost batch
    lines: tl.int32,  # of each other one
    length: tl.int32,
    channels: tl.int32,
    chunk_lines: tl.int32,
    lead_chunks: tl.int32,  # as for lines
    chunks: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
    RELU: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,  # of the sums
):
    ghost, chunk, block, first_line, first, last = _place(
        tl.program_id(0),
        lead_lines,
        lines,
        channels,
        chunk_lines,
        lead_chunks,
        chunks,
        CHANNELS_LAST,
        COLUMNS,
    )
    if CHANNELS_LAST:
        channel = block * COLUMNS + tl.arange(0, COLUMNS)
        column_first, column_end = block * COLUMNS, block * COLUMNS + COLUMNS
        x_ptr += first_line * x_line_stride
        grad_ptr += first_line * grad_line_stride
    else:
        channel = block + tl.zeros([COLUMNS], tl.int32)
        column_first, column_end = 0, length
        x_ptr += first_line * x_line_stride + block.to(tl.int64) * x_channel_stride
        grad_ptr += first_line * grad_line_stride + block.to(tl.int64) * grad_channel_stride
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
                    mask_line = first_line + line
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
    part_ptr = parts_ptr + chunk.to(tl.int64) * 3 * channels + channel
    tl.store(part_ptr, shift, mask=inside)
    tl.store(part_ptr + channels, total, mask=inside)
    tl.store(part_ptr + 2 * channels, product, mask=inside)


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
    lead_lines: tl.int32,
    lines: tl.int32,
    length: tl.int32,
    channels: tl.int32,
    chunk_lines: tl.int32,
    lead_chunks: tl.int32,
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
    ghost, _, block, first_line, first, last = _place(
        program, lead_lines, lines, channels, chunk_lines, lead_chunks, chunks, CHANNELS_LAST, COLUMNS
    )
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
        line = first_line + row.to(tl.int64)
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
