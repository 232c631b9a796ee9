"""Triton kernel of `group_knowledge_loss`: a program takes a block of rows through all streams.

Rows that fit into one tile are HELD: their logits are read once and stay in registers, as the next stream's teacher
with one loop. Longer ones are walked in tiles, in two passes with an online softmax; in four where logits are
normalised. With several loops a group's knowledge is a weighted sum of the logits of the streams that visited the
group, which are read again.

Triton specialises on no argument, so that the constants are all that distinguishes two compilations.

Shapes: S streams, R rows (batch and positions), of which subnets have the first subnet_rows, C classes; sums (S + 1,
programs), float32; statistics (2, S, R), float32, only for normalised logits with several loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_knowledge_loss_counts import counted_rows
from .group_knowledge_loss_tiles import (
    compare,
    logits_tile,
    next_tile,
    normalized,
    row_offsets,
    targets_tile,
    tile_pointers,
)

__all__ = ["DISTILL_IGNORED", "NORMALIZE", "WITH_GRADIENT", "group_knowledge_loss_kernel"]

# Bits of `flags`.
WITH_GRADIENT, NORMALIZE, DISTILL_IGNORED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)

TENSORS = "full", "full_gradient", "logits", "gradient", "targets"
NOT_SPECIALIZED = [
    *(f"{tensor}_ptr" for tensor in (*TENSORS, "counts", "sums", "statistics")),
    *("counters", "streams", "groups", "class_count", "row_count", "subnet_rows", "size_1", "size_2"),
    *(f"{tensor}_stride_{dim}" for tensor in TENSORS for dim in (*range(3), "class")),
    *("logits_stride_stream", "gradient_stride_stream", "ignore_index", "flags"),
]


@triton.jit
def _knowledge_tile(
    full_rows, logits_rows, statistics, row_mask, classes, mask, group, visits, groups, plane, row_count,
    full_class_stride, class_stride, stream_stride, ema, normalize,
    INNERMOST: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Knowledge (BLOCK_R, BLOCK_C) of a group after `visits` visits: 1 for group 0, the loops so far for others.

    That of normalised logits is short of a number for each row, which no softmax of it sees.
    """
    knowledge = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for visit in range(visits):
        stream = visit * groups + group
        # The first visit counts ema^(visits - 1), a later one (1 - ema) * ema^(visits - 1 - visit).
        weight = 1.0 + 0.0 * ema
        for _ in range(visits - 1 - visit):
            weight *= ema
        if visit > 0:
            weight *= 1 - ema
        if weight != 0:
            pointers = logits_rows + (stream - 1) * stream_stride
            step = class_stride
            if stream == 0:
                pointers = full_rows
                step = full_class_stride
            x = logits_tile(pointers, classes, step, mask, INNERMOST, STEP)
            if normalize:
                at = statistics + stream * row_count
                maximum = tl.load(at, mask=row_mask, other=0.0)
                slope = tl.load(at + plane, mask=row_mask, other=0.0)
                x = (x - maximum[:, None]) * slope[:, None]
            knowledge += weight * x
    return knowledge


@triton.jit
def _add_online(total, x, before, maximum, scale):
    """Adds exp((x - maximum) * scale) of a tile to each row's total, which is for the maximum `before`."""
    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    return total * tl.exp((before - base) * scale) + tl.sum(
        tl.exp((x - base[:, None]) * scale[:, None]), axis=1
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def group_knowledge_loss_kernel(
    full_ptr, full_gradient_ptr, logits_ptr, gradient_ptr, targets_ptr, counts_ptr, sums_ptr, statistics_ptr,
    counters: tl.int32, streams: tl.int32, groups: tl.int32, class_count: tl.int32, row_count: tl.int64,
    subnet_rows: tl.int64, size_1: tl.int64, size_2: tl.int64,
    full_stride_0: tl.int64, full_stride_1: tl.int64, full_stride_2: tl.int64, full_stride_class: tl.int64,
    full_gradient_stride_0: tl.int64, full_gradient_stride_1: tl.int64, full_gradient_stride_2: tl.int64,
    full_gradient_stride_class: tl.int64,
    logits_stride_0: tl.int64, logits_stride_1: tl.int64, logits_stride_2: tl.int64, logits_stride_class: tl.int64,
    gradient_stride_0: tl.int64, gradient_stride_1: tl.int64, gradient_stride_2: tl.int64,
    gradient_stride_class: tl.int64,
    targets_stride_0: tl.int64, targets_stride_1: tl.int64, targets_stride_2: tl.int64, targets_stride_class: tl.int64,
    logits_stride_stream: tl.int64, gradient_stride_stream: tl.int64, ignore_index: tl.int64, flags: tl.int32,
    ema: tl.float32, temperature: tl.float32, eps: tl.float32, label_smoothing: tl.float32,
    ce_factor: tl.float32, kd_factor: tl.float32, subnet_ce_factor: tl.float32,
    PROBABILITIES: tl.constexpr, ONE_LOOP: tl.constexpr, HELD: tl.constexpr, INNERMOST: tl.constexpr,
    STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`ce_factor`, `kd_factor` and `subnet_ce_factor`: the terms' weights, times what their gradients are scaled by."""
    with_gradient = (flags & WITH_GRADIENT) != 0
    normalize = (flags & NORMALIZE) != 0
    distill_ignored = (flags & DISTILL_IGNORED) != 0
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < row_count
    full_rows = full_ptr + row_offsets(rows, size_1, size_2, full_stride_0, full_stride_1, full_stride_2)
    logits_rows = logits_ptr + row_offsets(
        rows, size_1, size_2, logits_stride_0, logits_stride_1, logits_stride_2
    )
    full_to = full_gradient_ptr + row_offsets(
        rows, size_1, size_2, full_gradient_stride_0, full_gradient_stride_1, full_gradient_stride_2
    )  # fmt: skip
    to_rows = gradient_ptr + row_offsets(
        rows, size_1, size_2, gradient_stride_0, gradient_stride_1, gradient_stride_2
    )
    targets_rows = targets_ptr + row_offsets(
        rows, size_1, size_2, targets_stride_0, targets_stride_1, targets_stride_2
    )
    zero = program * 0  # makes 64-bit integers of what is added to it
    plane = (zero + streams) * row_count  # of one statistic
    statistics = statistics_ptr + rows
    uniform = label_smoothing / class_count
    ce_counted = row_mask
    labels = tl.zeros((BLOCK_R,), tl.int32)
    target_total = tl.full((BLOCK_R,), 1.0, tl.float32)
    if PROBABILITIES:
        target_total = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, class_count, BLOCK_C):
            classes, mask = next_tile(start, row_mask, class_count, INNERMOST, STEP, BLOCK_C)
            t = targets_tile(
                targets_rows, classes, targets_stride_class, mask, label_smoothing, uniform, INNERMOST, STEP
            )
            target_total += tl.sum(tl.where(mask, t, 0.0), axis=1)
    else:
        indices = tl.load(targets_rows, mask=row_mask, other=ignore_index)
        ce_counted = row_mask & (indices != ignore_index)
        # One out of range was counted, which makes everything NaN.
        labels = tl.where(ce_counted & (indices >= 0) & (indices < class_count), indices, 0).to(tl.int32)
    kd_counted = row_mask & (ce_counted | distill_ignored)
    ce_rows, kd_rows, subnet_ce_rows = counted_rows(
        counts_ptr, counters, row_count, subnet_rows, distill_ignored, PROBABILITIES
    )
    subnet_ce = tl.zeros((BLOCK_R,), tl.float32)
    teacher_maximum = tl.zeros((BLOCK_R,), tl.float32)
    teacher_scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    teacher_total = teacher_scale
    held_x = tl.zeros((BLOCK_R, BLOCK_C if HELD else 1), tl.float32)
    held_k = held_x
    # Without a row of the subnets the full network is all there is.
    present = tl.where(program * BLOCK_R < subnet_rows, streams, 1)

    for index in range(present):
        stream = zero + index
        pointers = logits_rows + (stream - 1) * logits_stride_stream
        to = to_rows + (stream - 1) * gradient_stride_stream
        class_stride = logits_stride_class
        to_class_stride = gradient_stride_class
        weight = subnet_ce_factor
        counted = subnet_ce_rows
        rows_here = row_mask & (rows < subnet_rows)
        if index == 0:
            pointers = full_rows
            to = full_to
            class_stride = full_stride_class
            to_class_stride = full_gradient_stride_class
            weight = ce_factor
            counted = ce_rows
            rows_here = row_mask
        has_ce = (index == 0) | (weight != 0)
        raw_apart = has_ce & (normalize | (temperature != 1))

        # Maximum and mean of each row, and the sums of its softmaxes.
        shift = tl.load(pointers, mask=rows_here, other=0.0).to(
            tl.float32
        )  # keeps the mean of equal logits exact
        scale = tl.full((BLOCK_R,), 1.0, tl.float32)
        raw_scale = scale
        scale = scale / temperature
        maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        raw_total = tl.zeros((BLOCK_R,), tl.float32)
        mean = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, class_count, BLOCK_C):
            classes, mask = next_tile(start, rows_here, class_count, INNERMOST, STEP, BLOCK_C)
            x = logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
            if HELD:
                held_x = x
            larger = tl.maximum(maximum, tl.max(x, axis=1))
            mean += tl.sum(tl.where(mask, x - shift[:, None], 0.0), axis=1)
            if not normalize:
                total = _add_online(total, x, maximum, larger, scale)
            if raw_apart:
                raw_total = _add_online(raw_total, x, maximum, larger, raw_scale)
            maximum = larger
        above_mean = maximum - shift - mean / class_count
        slope = tl.full((BLOCK_R,), 1.0, tl.float32)
        if normalize:
            squares = tl.zeros((BLOCK_R,), tl.float32)
            for start in range(0, class_count, BLOCK_C):
                classes, mask = next_tile(start, rows_here, class_count, INNERMOST, STEP, BLOCK_C)
                if HELD:  # noqa: SIM108
                    x = held_x
                else:
                    x = logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
                deviation = tl.where(mask, x - shift[:, None] - (mean / class_count)[:, None], 0.0)
                squares += tl.sum(deviation * deviation, axis=1)
            slope = 1.0 / tl.sqrt(squares / class_count + eps)
            # A variance that overflows must not pass for an infinite one, which would leave no logits.
            slope = tl.where(slope > 0, slope, float("nan"))
            scale = slope * scale
            for start in range(0, class_count, BLOCK_C):
                classes, mask = next_tile(start, rows_here, class_count, INNERMOST, STEP, BLOCK_C)
                if HELD:  # noqa: SIM108
                    x = held_x
                else:
                    x = logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
                e = tl.exp((x - maximum[:, None]) * scale[:, None])
                total += tl.sum(tl.where(mask, e, 0.0), axis=1)
        if not raw_apart:
            raw_total = total
        top = above_mean * slope  # the normalised maximum

        # The teacher. With one loop it is the stream before.
        group = (stream - 1) % tl.maximum(groups, 1)
        visits = tl.where(group == 0, 1, (stream - 1) // tl.maximum(groups, 1) + 1)
        if not ONE_LOOP:
            if normalize:
                at = statistics + stream * row_count
                tl.store(at, maximum, mask=rows_here)
                tl.store(at + plane, slope, mask=rows_here)
                tl.debug_barrier()
            if index > 0:
                teacher_scale = tl.full((BLOCK_R,), 1.0, tl.float32) / temperature
                teacher_maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
                teacher_total = tl.zeros((BLOCK_R,), tl.float32)
                for start in range(0, class_count, BLOCK_C):
                    classes, mask = next_tile(start, rows_here, class_count, INNERMOST, STEP, BLOCK_C)
                    k = _knowledge_tile(
                        full_rows, logits_rows, statistics, rows_here, classes, mask, group, visits, groups, plane,
                        row_count, full_stride_class, logits_stride_class, logits_stride_stream, ema, normalize,
                        INNERMOST, STEP, BLOCK_R, BLOCK_C,
                    )  # fmt: skip
                    k = tl.where(mask, k, -float("inf"))
                    if HELD:
                        held_k = k
                    larger = tl.maximum(teacher_maximum, tl.max(k, axis=1))
                    teacher_total = _add_online(teacher_total, k, teacher_maximum, larger, teacher_scale)
                    teacher_maximum = larger
        teacher_pointers = pointers - logits_stride_stream
        teacher_stride = logits_stride_class
        if index == 1:
            teacher_pointers = full_rows
            teacher_stride = full_stride_class
        log_ratio = tl.log(total) - tl.log(teacher_total)
        log_raw_total = tl.log(raw_total)

        # With normalised logits the mean of n(x) * (q - p), then divergence, cross entropy and gradient.
        dot = tl.zeros((BLOCK_R,), tl.float32)
        divergence = tl.zeros((BLOCK_R,), tl.float32)
        cross_entropy = tl.zeros((BLOCK_R,), tl.float32)
        ce = tl.where(ce_counted, weight / counted, 0.0)
        kd = tl.where(kd_counted, kd_factor / kd_rows, 0.0) * slope
        softmax_factor = ce * target_total / raw_total
        first_pass = tl.where(normalize & with_gradient & (index > 0), 0, 1)
        for phase in range(first_pass, 2):
            centre = dot / class_count
            for start in range(0, class_count, BLOCK_C):
                classes, mask = next_tile(start, rows_here, class_count, INNERMOST, STEP, BLOCK_C)
                if HELD:  # noqa: SIM108
                    x = held_x
                else:
                    x = logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
                g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
                if index > 0:
                    if HELD:
                        k = held_k
                    elif ONE_LOOP:
                        k = logits_tile(teacher_pointers, classes, teacher_stride, mask, INNERMOST, STEP)
                    else:
                        k = _knowledge_tile(
                            full_rows, logits_rows, statistics, rows_here, classes, mask, group, visits, groups, plane,
                            row_count, full_stride_class, logits_stride_class, logits_stride_stream, ema, normalize,
                            INNERMOST, STEP, BLOCK_R, BLOCK_C,
                        )  # fmt: skip
                    change, summand = compare(
                        x, k, maximum, scale, total, teacher_maximum, teacher_scale, teacher_total, log_ratio
                    )  # fmt: skip
                    if phase == 0:
                        n = normalized(x, maximum, slope, top)
                        dot += tl.sum(tl.where(mask, change * n, 0.0), axis=1)
                    else:
                        divergence += tl.sum(tl.where(mask, summand, 0.0), axis=1)
                        if normalize:
                            change -= normalized(x, maximum, slope, top) * centre[:, None]
                        if kd_factor != 0:
                            g += change * kd[:, None]
                if phase == 1:
                    if has_ce:  # noqa: SIM102 (the inner condition is a constant)
                        if PROBABILITIES:
                            t = targets_tile(
                                targets_rows, classes, targets_stride_class, mask, label_smoothing, uniform,
                                INNERMOST, STEP,
                            )  # fmt: skip
                            nll = (maximum[:, None] - x) + log_raw_total[:, None]
                            cross_entropy += tl.sum(tl.where(mask, t * nll, 0.0), axis=1)
                            if weight != 0:
                                g -= t * ce[:, None]
                    if weight != 0:
                        g += tl.exp(x - maximum[:, None]) * softmax_factor[:, None]
                        if not PROBABILITIES:
                            one_hot = tl.where(classes[None, :] == labels[:, None], 1 - label_smoothing, 0.0)
                            g -= (one_hot + uniform) * ce[:, None]
                    if with_gradient:
                        tile = tile_pointers(to, classes, to_class_stride, INNERMOST, STEP)
                        tl.store(tile, g.to(gradient_ptr.dtype.element_ty), mask=mask)
        if not PROBABILITIES:
            label_offsets = labels if INNERMOST == "classes" else labels.to(tl.int64) * class_stride
            chosen = tl.load(pointers + label_offsets, mask=rows_here, other=0.0).to(tl.float32)
            cross_entropy = (maximum - chosen) + log_raw_total
            if label_smoothing != 0:
                mean_nll = above_mean + log_raw_total
                cross_entropy = cross_entropy * (1 - label_smoothing) + mean_nll * label_smoothing
        cross_entropy = tl.where(ce_counted & rows_here, cross_entropy, 0.0)
        divergence = tl.where(kd_counted & rows_here, divergence * temperature * temperature, 0.0)
        term = tl.where(index == 0, tl.sum(cross_entropy, axis=0), tl.sum(divergence, axis=0))
        tl.store(sums_ptr + stream * tl.num_programs(0) + program, term)
        if (index > 0) & (weight != 0):
            subnet_ce += cross_entropy
        if ONE_LOOP:
            teacher_maximum = maximum
            teacher_scale = scale
            teacher_total = total
            if HELD:
                held_k = held_x
    for index in range(present, streams):
        tl.store(sums_ptr + (zero + index) * tl.num_programs(0) + program, 0.0)
    tl.store(sums_ptr + (zero + streams) * tl.num_programs(0) + program, tl.sum(subnet_ce, axis=0))
