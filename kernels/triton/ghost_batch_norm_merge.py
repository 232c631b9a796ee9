"""Triton kernels of `ghost_batch_norm` between its passes: sums of chunks become statistics or gradients of parameters.

In float64, as a tree of a fixed shape; the chunks are those of ghost_batch_norm_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ghost_batch_norm_kernels import NOT_SPECIALIZED

__all__ = ["merge_gradients_kernel", "merge_statistics_kernel"]


@triton.jit
def _chunks_before(ghost, lead_chunks, chunks):
    return tl.where(ghost == 0, 0, lead_chunks + (ghost - 1) * chunks).to(tl.int64)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_statistics_kernel(
    parts_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    coefficients_ptr,  # (2, ghosts, channels): scale, offset
    running_mean_ptr,  # (channels,); only with has_momentum, and then there is one ghost batch
    running_var_ptr,
    ghosts: tl.int32,
    lead_lines: tl.int32,
    lines: tl.int32,
    values_per_line: tl.int32,  # of one channel
    has_weight: tl.int32,
    has_bias: tl.int32,
    has_momentum: tl.int32,
    momentum: tl.float64,
    channels: tl.int32,
    chunk_lines: tl.int32,
    lead_chunks: tl.int32,
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
        part_ptr = parts_ptr + _chunks_before(ghost, lead_chunks, chunks) * 3 * channels + channel
        own_lines = tl.where(ghost == 0, lead_lines, lines)
        own_chunks = tl.where(ghost == 0, lead_chunks, chunks)
        # Numbers of values as float64: of a whole chunk, of the last one, of all.
        whole = tl.zeros([], tl.float64) + chunk_lines * values_per_line
        total = (tl.zeros([], tl.float64) + own_lines) * values_per_line
        rest = total - whole * (own_chunks - 1)
        inverse_whole, inverse_rest, inverse = 1.0 / whole, 1.0 / rest, 1.0 / total
        # Means are taken from that of the first chunk on, which keeps what their differences are.
        origin = tl.load(part_ptr + channels, mask=inside, other=0.0).to(tl.float64)
        origin = origin * tl.where(own_chunks > 1, inverse_whole, inverse_rest)
        origin += tl.load(part_ptr, mask=inside, other=0.0).to(tl.float64)
        sums = tl.zeros([LANES, BLOCK], tl.float64)
        squares = tl.zeros([LANES, BLOCK], tl.float64)
        for first in range(0, own_chunks, LANES):
            chunk = first + tl.arange(0, LANES)
            valid = (chunk < own_chunks)[:, None] & inside[None, :]
            part = part_ptr[None, :] + chunk[:, None] * 3 * channels
            shift = tl.load(part, mask=valid, other=0.0).to(tl.float64)
            part_sum = tl.load(part + channels, mask=valid, other=0.0).to(tl.float64)
            square = tl.load(part + 2 * channels, mask=valid, other=0.0).to(tl.float64)
            last = (chunk == own_chunks - 1)[:, None]
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
        updated = inside & (has_momentum != 0)
        unbiased = var * (total / tl.maximum(total - 1, 1))
        running = tl.load(running_mean_ptr + channel, mask=updated, other=0.0).to(tl.float64)
        running = (1 - momentum) * running + momentum * mean
        tl.store(running_mean_ptr + channel, running.to(DTYPE), mask=updated)
        running = tl.load(running_var_ptr + channel, mask=updated, other=0.0).to(tl.float64)
        running = (1 - momentum) * running + momentum * unbiased
        tl.store(running_var_ptr + channel, running.to(DTYPE), mask=updated)
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
    lead_lines: tl.int32,
    lines: tl.int32,
    values_per_line: tl.int32,
    has_weight: tl.int32,
    has_keep: tl.int32,
    channels: tl.int32,
    lead_chunks: tl.int32,
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
    weight = tl.load(weight_ptr + channel, mask=inside & (has_weight != 0), other=1.0).to(tl.float64)
    grad_weight = tl.zeros([BLOCK], tl.float64)
    grad_bias = tl.zeros([BLOCK], tl.float64)
    for ghost in range(ghosts):
        totals = tl.zeros([LANES, BLOCK], tl.float64)
        products = tl.zeros([LANES, BLOCK], tl.float64)
        own_chunks = tl.where(ghost == 0, lead_chunks, chunks)
        own_lines = tl.where(ghost == 0, lead_lines, lines)
        inverse = 1.0 / ((tl.zeros([BLOCK], tl.float64) + own_lines) * values_per_line)
        before = _chunks_before(ghost, lead_chunks, chunks)
        for first in range(0, own_chunks, LANES):
            chunk = first + tl.arange(0, LANES)
            valid = (chunk < own_chunks)[:, None] & inside[None, :]
            part = parts_ptr + (before + chunk[:, None]) * 3 * channels + channel[None, :]
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
