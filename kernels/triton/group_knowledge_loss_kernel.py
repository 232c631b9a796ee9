"""Triton kernel of `group_knowledge_loss`: a program takes a block of rows through all streams.

Classes are walked in tiles, with online softmax, so that a row may be longer than a tile; rows that fit
into one tile stay in the first-level cache between passes. A group's knowledge is not stored: it is a
weighted sum of the logits of the streams that visited the group, which are read again.

The launcher says which dimension lies together in memory (INNERMOST: "classes", "rows" or "none") and how many
neighbours one access may move (STEP): all addresses and sizes along it are then multiples of STEP elements. Triton
specialises on no argument, so that these and the other constants are all that distinguishes two compilations.

Shapes: S streams, R rows (batch and positions), C classes; partials (programs, S + 1); statistics (5, S, R).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["group_knowledge_loss_kernel"]

NOT_SPECIALIZED = [
    *("logits_ptr", "gradient_ptr", "targets_ptr", "statistics_ptr", "partials_ptr", "inverse_rows_ptr"),
    *("streams", "groups", "class_count", "row_count", "size_1", "size_2"),
    *(f"{tensor}_stride_{dim}" for tensor in ("logits", "gradient", "targets") for dim in range(3)),
    *("logits_stream_stride", "logits_class_stride", "gradient_stream_stride", "gradient_class_stride"),
    *("targets_class_stride", "ignore_index", "with_gradient", "normalize", "distill_ignored"),
]


@triton.jit
def _row_offsets(rows, size_1, size_2, stride_0, stride_1, stride_2):
    return (
        (rows // (size_1 * size_2)) * stride_0
        + (rows // size_2 % size_1) * stride_1
        + rows % size_2 * stride_2
    )


@triton.jit
def _tile_pointers(pointers, classes, class_stride, INNERMOST: tl.constexpr, STEP: tl.constexpr):
    """Pointers (BLOCK_R, BLOCK_C) from those of the rows; says what lies together, 16 bytes at a time."""
    if INNERMOST == "classes":
        tile = pointers[:, None] + classes[None, :]
        if STEP > 1:
            tile = tl.multiple_of(tile, (1, 16))
    else:
        tile = pointers[:, None] + classes.to(tl.int64)[None, :] * class_stride
    if INNERMOST == "rows":
        # Not true where a dimension ends, but then it is a multiple of STEP, and only STEP are accessed together.
        tile = tl.max_contiguous(tile, (tile.shape[0], 1))
        tile = tl.multiple_of(tile, (16 if STEP > 1 else 1, 1))
    return tile


@triton.jit
def _tile_mask(row_mask, class_mask, INNERMOST: tl.constexpr, STEP: tl.constexpr):
    """Which of (BLOCK_R, BLOCK_C) exist: STEP neighbours do together."""
    mask = row_mask[:, None] & class_mask[None, :]
    if INNERMOST == "classes":
        mask = tl.max_constancy(mask, (1, STEP))
    if INNERMOST == "rows":
        mask = tl.max_constancy(mask, (STEP, 1))
    return mask


@triton.jit
def _logits_tile(pointers, classes, class_stride, mask, INNERMOST: tl.constexpr, STEP: tl.constexpr):
    """Logits (BLOCK_R, BLOCK_C) of one stream; -inf outside."""
    tile = _tile_pointers(pointers, classes, class_stride, INNERMOST, STEP)
    return tl.load(tile, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _tile(start, row_mask, class_count, INNERMOST: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr):
    """The classes from `start` on, and which of (BLOCK_R, BLOCK_C) exist."""
    classes = start + tl.arange(0, BLOCK_C)
    return classes, _tile_mask(row_mask, classes < class_count, INNERMOST, STEP)


@triton.jit
def _normalized(x, maximum, slope, top):
    """n(x) (BLOCK_R, BLOCK_C): `top` is that of the maximum."""
    return (x - maximum[:, None]) * slope[:, None] + top[:, None]


@triton.jit
def _targets_tile(
    pointers,
    classes,
    class_stride,
    mask,
    label_smoothing,
    uniform,
    INNERMOST: tl.constexpr,
    STEP: tl.constexpr,
):
    """Smoothed probabilities (BLOCK_R, BLOCK_C)."""
    tile = _tile_pointers(pointers, classes, class_stride, INNERMOST, STEP)
    return tl.load(tile, mask=mask, other=0.0) * (1 - label_smoothing) + uniform


@triton.jit
def _knowledge_tile(
    logits_ptr, statistics_ptr, row_offsets, rows, row_mask, classes, mask, group, visits,
    groups, plane, row_count, stream_stride, class_stride, ema, normalize,
    INNERMOST: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Knowledge (BLOCK_R, BLOCK_C) of a group after `visits` visits: 1 for group 0, the loops so far for others."""
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
            pointers = logits_ptr + stream * stream_stride + row_offsets
            x = _logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
            if normalize:
                at = statistics_ptr + stream * row_count + rows
                maximum = tl.load(at, mask=row_mask, other=0.0)
                slope = tl.load(at + 3 * plane, mask=row_mask, other=0.0)
                top = tl.load(at + 4 * plane, mask=row_mask, other=0.0)
                x = _normalized(x, maximum, slope, top)
            knowledge += weight * x
    return knowledge


@triton.jit
def _teacher_tile(
    pointers, logits_ptr, statistics_ptr, row_offsets, rows, row_mask, classes, mask, group, visits,
    groups, plane, row_count, stream_stride, class_stride, ema, normalize, ONE_LOOP: tl.constexpr,
    INNERMOST: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the stream at `pointers` learns from: the one before with one loop, else the group's knowledge."""
    if ONE_LOOP:
        tile = _logits_tile(pointers - stream_stride, classes, class_stride, mask, INNERMOST, STEP)
    else:
        tile = _knowledge_tile(
            logits_ptr, statistics_ptr, row_offsets, rows, row_mask, classes, mask, group, visits, groups, plane,
            row_count, stream_stride, class_stride, ema, normalize, INNERMOST, STEP, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    return tile


@triton.jit
def _compare(x, k, maximum, scale, total, teacher_maximum, teacher_scale, teacher_total, log_ratio):
    """q - p, and the divergence's summand p (exp(d) - 1 - d) for d = log q - log p, both accurate for small d."""
    student_d = (x - maximum[:, None]) * scale[:, None]
    teacher_d = (k - teacher_maximum[:, None]) * teacher_scale[:, None]
    q = tl.exp(student_d) / total[:, None]
    p = tl.exp(teacher_d) / teacher_total[:, None]
    d = student_d - teacher_d - log_ratio[:, None]
    series = d * (1.0 / 5040) + 1.0 / 720
    series = series * d + 1.0 / 120
    series = series * d + 1.0 / 24
    series = series * d + 1.0 / 6
    series = series * d + 0.5
    series = p * (series * (d * d))
    near = (d < 0.5) & (d > -0.5)
    apart = q - p
    change = tl.where(near, series + p * d, apart)
    summand = tl.where(near, series, apart - tl.where(p == 0, 0.0, p * d))  # 0 log 0 = 0
    return change, summand


@triton.jit
def _measure(
    pointers, row_mask, class_count, class_stride, normalize, eps,
    INNERMOST: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of each row the maximum, the sum of exp(x - maximum), the maximum above the mean, and the slope of n(x)."""
    shift = tl.load(pointers, mask=row_mask, other=0.0).to(tl.float32)  # keeps the mean of equal logits exact
    maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    raw_sum = tl.zeros((BLOCK_R,), tl.float32)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, class_count, BLOCK_C):
        classes, mask = _tile(start, row_mask, class_count, INNERMOST, STEP, BLOCK_C)
        x = _logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
        larger = tl.maximum(maximum, tl.max(x, axis=1))
        base = tl.where(larger == -float("inf"), 0.0, larger)
        raw_sum = raw_sum * tl.exp(maximum - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
        maximum = larger
        mean += tl.sum(tl.where(mask, x - shift[:, None], 0.0), axis=1)
    mean = mean / class_count
    slope = tl.full((BLOCK_R,), 1.0, tl.float32)
    if normalize:
        squares = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, class_count, BLOCK_C):
            classes, mask = _tile(start, row_mask, class_count, INNERMOST, STEP, BLOCK_C)
            x = _logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
            deviation = tl.where(mask, x - shift[:, None] - mean[:, None], 0.0)
            squares += tl.sum(deviation * deviation, axis=1)
        slope = 1.0 / tl.sqrt(squares / class_count + eps)
    return maximum, raw_sum, maximum - shift - mean, slope


@triton.jit
def _sum_softened(
    pointers, row_mask, class_count, class_stride, maximum, scale,
    INNERMOST: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of exp((n(x) - n(maximum)) / T) of each row."""
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, class_count, BLOCK_C):
        classes, mask = _tile(start, row_mask, class_count, INNERMOST, STEP, BLOCK_C)
        x = _logits_tile(pointers, classes, class_stride, mask, INNERMOST, STEP)
        total += tl.sum(tl.where(mask, tl.exp((x - maximum[:, None]) * scale[:, None]), 0.0), axis=1)
    return total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def group_knowledge_loss_kernel(
    logits_ptr, gradient_ptr, targets_ptr, statistics_ptr, partials_ptr, inverse_rows_ptr,
    streams: tl.int32, groups: tl.int32, class_count: tl.int32, row_count: tl.int64, size_1: tl.int64,
    size_2: tl.int64, logits_stride_0: tl.int64, logits_stride_1: tl.int64, logits_stride_2: tl.int64,
    gradient_stride_0: tl.int64, gradient_stride_1: tl.int64, gradient_stride_2: tl.int64,
    targets_stride_0: tl.int64, targets_stride_1: tl.int64, targets_stride_2: tl.int64,
    logits_stream_stride: tl.int64, logits_class_stride: tl.int64, gradient_stream_stride: tl.int64,
    gradient_class_stride: tl.int64, targets_class_stride: tl.int64, ignore_index: tl.int64,
    with_gradient: tl.int32, normalize: tl.int32, distill_ignored: tl.int32,
    ema: tl.float32, temperature: tl.float32, eps: tl.float32, ce_weight: tl.float32, kd_weight: tl.float32,
    subnet_ce_weight: tl.float32, label_smoothing: tl.float32, gradient_scale: tl.float32,
    PROBABILITIES: tl.constexpr, ONE_LOOP: tl.constexpr, INNERMOST: tl.constexpr, STEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < row_count
    logits_rows = _row_offsets(rows, size_1, size_2, logits_stride_0, logits_stride_1, logits_stride_2)
    gradient_rows = _row_offsets(
        rows, size_1, size_2, gradient_stride_0, gradient_stride_1, gradient_stride_2
    )
    targets_rows = _row_offsets(rows, size_1, size_2, targets_stride_0, targets_stride_1, targets_stride_2)
    zero = program * 0  # makes 64-bit integers of what is added to it
    plane = (zero + streams) * row_count  # of one statistic
    uniform = label_smoothing / class_count
    ce_counted = row_mask
    if not PROBABILITIES:
        labels = tl.load(targets_ptr + targets_rows, mask=row_mask, other=ignore_index)
        ce_counted = row_mask & (labels != ignore_index)
        labels = tl.where(ce_counted, labels, 0).to(tl.int32)
    kd_counted = row_mask & (ce_counted | (distill_ignored != 0))
    inverse_ce_rows = tl.load(inverse_rows_ptr).to(tl.float32)
    inverse_kd_rows = tl.load(inverse_rows_ptr + 1).to(tl.float32)
    subnet_ce = tl.zeros((BLOCK_R,), tl.float32)

    for index in range(streams):
        stream = zero + index
        pointers = logits_ptr + stream * logits_stream_stride + logits_rows
        maximum, raw_sum, above_mean, slope = _measure(
            pointers, row_mask, class_count, logits_class_stride, normalize, eps, INNERMOST, STEP, BLOCK_R, BLOCK_C
        )  # fmt: skip
        top = above_mean * slope  # the normalised maximum
        scale = slope / temperature
        total = _sum_softened(
            pointers, row_mask, class_count, logits_class_stride, maximum, scale, INNERMOST, STEP, BLOCK_R, BLOCK_C
        )  # fmt: skip
        at = statistics_ptr + stream * row_count + rows
        tl.store(at, maximum, mask=row_mask)
        tl.store(at + plane, total, mask=row_mask)
        tl.store(at + 2 * plane, scale, mask=row_mask)
        tl.store(at + 3 * plane, slope, mask=row_mask)
        tl.store(at + 4 * plane, top, mask=row_mask)
        tl.debug_barrier()

        # The teacher's maximum, scale and sum.
        group = (stream - 1) % tl.maximum(groups, 1) + 1
        visits = tl.where(group == 1, 1, (stream - 1) // tl.maximum(groups, 1) + 1)
        teacher_maximum = maximum
        teacher_scale = scale
        teacher_total = total
        if stream > 0:
            if ONE_LOOP:
                at = at - row_count
                teacher_maximum = tl.load(at, mask=row_mask, other=0.0)
                teacher_total = tl.load(at + plane, mask=row_mask, other=1.0)
                teacher_scale = tl.load(at + 2 * plane, mask=row_mask, other=0.0)
            else:
                teacher_scale = tl.full((BLOCK_R,), 1.0, tl.float32) / temperature
                teacher_maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
                teacher_total = tl.zeros((BLOCK_R,), tl.float32)
                for start in range(0, class_count, BLOCK_C):
                    classes, mask = _tile(start, row_mask, class_count, INNERMOST, STEP, BLOCK_C)
                    k = _knowledge_tile(
                        logits_ptr, statistics_ptr, logits_rows, rows, row_mask, classes, mask, group - 1, visits,
                        groups, plane, row_count, logits_stream_stride, logits_class_stride, ema, normalize,
                        INNERMOST, STEP, BLOCK_R, BLOCK_C,
                    )  # fmt: skip
                    k = tl.where(mask, k, -float("inf"))
                    larger = tl.maximum(teacher_maximum, tl.max(k, axis=1))
                    base = tl.where(larger == -float("inf"), 0.0, larger)
                    tile_sum = tl.sum(tl.exp((k - base[:, None]) * teacher_scale[:, None]), axis=1)
                    teacher_total = (
                        teacher_total * tl.exp((teacher_maximum - base) * teacher_scale) + tile_sum
                    )
                    teacher_maximum = larger

        # The divergence, and with normalised logits the mean of n(x) * (q - p).
        log_ratio = tl.log(total) - tl.log(teacher_total)
        divergence = tl.zeros((BLOCK_R,), tl.float32)
        dot = tl.zeros((BLOCK_R,), tl.float32)
        cross_entropy = tl.zeros((BLOCK_R,), tl.float32)
        target_total = tl.zeros((BLOCK_R,), tl.float32)
        weight = tl.where(stream == 0, ce_weight, subnet_ce_weight)
        distilled = (stream > 0) & (kd_weight != 0)
        log_raw_sum = tl.log(raw_sum)
        for start in range(0, class_count, BLOCK_C):
            classes, mask = _tile(start, row_mask, class_count, INNERMOST, STEP, BLOCK_C)
            x = _logits_tile(pointers, classes, logits_class_stride, mask, INNERMOST, STEP)
            if stream > 0:
                k = _teacher_tile(
                    pointers, logits_ptr, statistics_ptr, logits_rows, rows, row_mask, classes, mask, group - 1, visits,
                    groups, plane, row_count, logits_stream_stride, logits_class_stride, ema, normalize, ONE_LOOP,
                    INNERMOST, STEP, BLOCK_R, BLOCK_C,
                )  # fmt: skip
                change, summand = _compare(
                    x, k, maximum, scale, total, teacher_maximum, teacher_scale, teacher_total, log_ratio
                )  # fmt: skip
                divergence += tl.sum(tl.where(mask, summand, 0.0), axis=1)
                if normalize:
                    n = _normalized(x, maximum, slope, top)
                    dot += tl.sum(tl.where(mask, change * n, 0.0), axis=1)
            if (stream == 0) | (weight != 0):  # noqa: SIM102 (the inner condition is a constant)
                if PROBABILITIES:
                    t = _targets_tile(
                        targets_ptr + targets_rows, classes, targets_class_stride, mask, label_smoothing, uniform,
                        INNERMOST, STEP,
                    )  # fmt: skip
                    nll = (maximum[:, None] - x) + log_raw_sum[:, None]
                    cross_entropy += tl.sum(tl.where(mask, t * nll, 0.0), axis=1)
                    target_total += tl.sum(tl.where(mask, t, 0.0), axis=1)
        if not PROBABILITIES:
            target_total += 1.0
            label_offsets = labels if INNERMOST == "classes" else labels.to(tl.int64) * logits_class_stride
            chosen = tl.load(pointers + label_offsets, mask=row_mask, other=0.0).to(tl.float32)
            cross_entropy = (maximum - chosen) + log_raw_sum
            if label_smoothing != 0:
                mean_nll = above_mean + log_raw_sum
                cross_entropy = cross_entropy * (1 - label_smoothing) + mean_nll * label_smoothing
        cross_entropy = tl.where(ce_counted, cross_entropy, 0.0)
        divergence = tl.where(kd_counted, divergence * temperature * temperature, 0.0)
        partial = partials_ptr + program * (streams + 1) + stream
        if stream == 0:
            tl.store(partial, tl.sum(cross_entropy, axis=0))
        else:
            tl.store(partial, tl.sum(divergence, axis=0))
            if weight != 0:
                subnet_ce += cross_entropy

        # The gradient.
        if with_gradient:
            to = gradient_ptr + stream * gradient_stream_stride + gradient_rows
            ce_factor = tl.where(ce_counted, weight * inverse_ce_rows * gradient_scale, 0.0)
            kd_factor = kd_weight * temperature * inverse_kd_rows * gradient_scale
            kd_factor = tl.where(kd_counted, kd_factor, 0.0) * slope
            softmax_factor = ce_factor * target_total / raw_sum
            centre = dot / class_count
            for start in range(0, class_count, BLOCK_C):
                classes, mask = _tile(start, row_mask, class_count, INNERMOST, STEP, BLOCK_C)
                x = _logits_tile(pointers, classes, logits_class_stride, mask, INNERMOST, STEP)
                g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
                if distilled:
                    k = _teacher_tile(
                        pointers, logits_ptr, statistics_ptr, logits_rows, rows, row_mask, classes, mask, group - 1,
                        visits, groups, plane, row_count, logits_stream_stride, logits_class_stride, ema, normalize,
                        ONE_LOOP, INNERMOST, STEP, BLOCK_R, BLOCK_C,
                    )  # fmt: skip
                    change, _ = _compare(
                        x, k, maximum, scale, total, teacher_maximum, teacher_scale, teacher_total, log_ratio
                    )  # fmt: skip
                    if normalize:
                        n = _normalized(x, maximum, slope, top)
                        change -= n * centre[:, None]
                    g += change * kd_factor[:, None]
                if weight != 0:
                    g += tl.exp(x - maximum[:, None]) * softmax_factor[:, None]
                    if PROBABILITIES:
                        t = _targets_tile(
                            targets_ptr + targets_rows, classes, targets_class_stride, mask, label_smoothing, uniform,
                            INNERMOST, STEP,
                        )  # fmt: skip
                        g -= t * ce_factor[:, None]
                    else:
                        one_hot = tl.where(classes[None, :] == labels[:, None], 1 - label_smoothing, 0.0)
                        g -= (one_hot + uniform) * ce_factor[:, None]
                tile = _tile_pointers(to, classes, gradient_class_stride, INNERMOST, STEP)
                tl.store(tile, g.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(partials_ptr + program * (streams + 1) + streams, tl.sum(subnet_ce, axis=0))
