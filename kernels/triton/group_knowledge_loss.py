"""Triton kernel of `group_knowledge_loss`: a program takes a block of rows through all streams.

Classes are walked in tiles, with online softmax, so that a row may be longer than a tile; rows that fit
into one tile stay in the first-level cache between passes. A group's knowledge is not stored: it is a
weighted sum of the logits of the streams that visited the group, which are read again.

Shapes: S streams, R rows (batch and positions), C classes; partials (programs, S + 1); statistics (5, S, R).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["aot_configurations", "group_knowledge_loss"]

ROW_DIMS = 3


@triton.jit
def _row_offsets(rows, size_1, size_2, stride_0, stride_1, stride_2):
    return (
        (rows // (size_1 * size_2)) * stride_0
        + (rows // size_2 % size_1) * stride_1
        + rows % size_2 * stride_2
    )


@triton.jit
def _logits_tile(pointers, classes, class_stride, mask):
    """Logits (BLOCK_R, BLOCK_C) of one stream; -inf outside."""
    offsets = classes.to(tl.int64)[None, :] * class_stride
    return tl.load(pointers[:, None] + offsets, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _knowledge_tile(
    logits_ptr, statistics_ptr, row_offsets, rows, row_mask, classes, class_mask, group, visits,
    groups, plane, row_count, stream_stride, class_stride, ema,
    NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Knowledge (BLOCK_R, BLOCK_C) of a group after `visits` visits: 1 for group 0, the loops so far for others."""
    mask = row_mask[:, None] & class_mask[None, :]
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
            x = _logits_tile(pointers, classes, class_stride, mask)
            if NORMALIZE:
                at = statistics_ptr + stream * row_count + rows
                maximum = tl.load(at, mask=row_mask, other=0.0)
                slope = tl.load(at + 3 * plane, mask=row_mask, other=0.0)
                top = tl.load(at + 4 * plane, mask=row_mask, other=0.0)
                x = (x - maximum[:, None]) * slope[:, None] + top[:, None]
            knowledge += weight * x
    return knowledge


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


@triton.jit(do_not_specialize=["streams", "groups"])
def group_knowledge_loss_kernel(
    logits_ptr, gradient_ptr, targets_ptr, statistics_ptr, partials_ptr, inverse_rows_ptr,
    streams, groups, class_count, row_count, size_1, size_2,
    logits_stride_0, logits_stride_1, logits_stride_2, gradient_stride_0, gradient_stride_1,
    gradient_stride_2, targets_stride_0, targets_stride_1, targets_stride_2, logits_stream_stride,
    logits_class_stride, gradient_stream_stride, gradient_class_stride, targets_class_stride, ignore_index,
    ema, temperature, eps, ce_weight, kd_weight, subnet_ce_weight, label_smoothing, gradient_scale,
    WITH_GRADIENT: tl.constexpr, NORMALIZE: tl.constexpr, PROBABILITIES: tl.constexpr,
    DISTILL_IGNORED: tl.constexpr, ONE_LOOP: tl.constexpr,
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
    kd_counted = row_mask if DISTILL_IGNORED else ce_counted
    inverse_ce_rows = tl.load(inverse_rows_ptr).to(tl.float32)
    inverse_kd_rows = tl.load(inverse_rows_ptr + 1).to(tl.float32)
    subnet_ce = tl.zeros((BLOCK_R,), tl.float32)

    for index in range(streams):
        stream = zero + index
        pointers = logits_ptr + stream * logits_stream_stride + logits_rows
        shift = tl.load(pointers, mask=row_mask, other=0.0).to(
            tl.float32
        )  # keeps the mean of equal logits exact

        # 1. Maximum, sum of exp(x - maximum), mean of x - shift.
        maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        raw_sum = tl.zeros((BLOCK_R,), tl.float32)
        mean = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, class_count, BLOCK_C):
            classes = start + tl.arange(0, BLOCK_C)
            mask = row_mask[:, None] & (classes < class_count)[None, :]
            x = _logits_tile(pointers, classes, logits_class_stride, mask)
            larger = tl.maximum(maximum, tl.max(x, axis=1))
            base = tl.where(larger == -float("inf"), 0.0, larger)
            raw_sum = raw_sum * tl.exp(maximum - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
            maximum = larger
            mean += tl.sum(tl.where(mask, x - shift[:, None], 0.0), axis=1)
        mean = mean / class_count
        slope = tl.full((BLOCK_R,), 1.0, tl.float32)
        if NORMALIZE:
            squares = tl.zeros((BLOCK_R,), tl.float32)
            for start in range(0, class_count, BLOCK_C):
                classes = start + tl.arange(0, BLOCK_C)
                mask = row_mask[:, None] & (classes < class_count)[None, :]
                x = _logits_tile(pointers, classes, logits_class_stride, mask)
                deviation = tl.where(mask, x - shift[:, None] - mean[:, None], 0.0)
                squares += tl.sum(deviation * deviation, axis=1)
            slope = 1.0 / tl.sqrt(squares / class_count + eps)
        top = (maximum - shift - mean) * slope  # the normalised maximum
        scale = slope / temperature

        # 2. Sum of exp((n(x) - n(maximum)) / T).
        total = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, class_count, BLOCK_C):
            classes = start + tl.arange(0, BLOCK_C)
            mask = row_mask[:, None] & (classes < class_count)[None, :]
            x = _logits_tile(pointers, classes, logits_class_stride, mask)
            total += tl.sum(tl.where(mask, tl.exp((x - maximum[:, None]) * scale[:, None]), 0.0), axis=1)
        at = statistics_ptr + stream * row_count + rows
        tl.store(at, maximum, mask=row_mask)
        tl.store(at + plane, total, mask=row_mask)
        tl.store(at + 2 * plane, scale, mask=row_mask)
        tl.store(at + 3 * plane, slope, mask=row_mask)
        tl.store(at + 4 * plane, top, mask=row_mask)
        tl.debug_barrier()

        # 3. The teacher's maximum, scale and sum.
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
                    classes = start + tl.arange(0, BLOCK_C)
                    mask = row_mask[:, None] & (classes < class_count)[None, :]
                    k = _knowledge_tile(
                        logits_ptr, statistics_ptr, logits_rows, rows, row_mask, classes, classes <
                        class_count, group - 1, visits, groups, plane, row_count, logits_stream_stride,
                        logits_class_stride, ema, NORMALIZE, BLOCK_R, BLOCK_C,
                    )  # fmt: skip
                    k = tl.where(mask, k, -float("inf"))
                    larger = tl.maximum(teacher_maximum, tl.max(k, axis=1))
                    base = tl.where(larger == -float("inf"), 0.0, larger)
                    tile_sum = tl.sum(tl.exp((k - base[:, None]) * teacher_scale[:, None]), axis=1)
                    teacher_total = (
                        teacher_total * tl.exp((teacher_maximum - base) * teacher_scale) + tile_sum
                    )
                    teacher_maximum = larger

        # 4. The divergence, and with normalised logits the mean of n(x) * (q - p).
        log_ratio = tl.log(total) - tl.log(teacher_total)
        divergence = tl.zeros((BLOCK_R,), tl.float32)
        dot = tl.zeros((BLOCK_R,), tl.float32)
        cross_entropy = tl.zeros((BLOCK_R,), tl.float32)
        target_total = tl.zeros((BLOCK_R,), tl.float32)
        weight = tl.where(stream == 0, ce_weight, subnet_ce_weight)
        distilled = (stream > 0) & (kd_weight != 0)
        log_raw_sum = tl.log(raw_sum)
        for start in range(0, class_count, BLOCK_C):
            classes = start + tl.arange(0, BLOCK_C)
            mask = row_mask[:, None] & (classes < class_count)[None, :]
            x = _logits_tile(pointers, classes, logits_class_stride, mask)
            if stream > 0:
                if ONE_LOOP:
                    k = _logits_tile(pointers - logits_stream_stride, classes, logits_class_stride, mask)
                else:
                    k = _knowledge_tile(
                        logits_ptr, statistics_ptr, logits_rows, rows, row_mask, classes, classes <
                        class_count, group - 1, visits, groups, plane, row_count, logits_stream_stride,
                        logits_class_stride, ema, NORMALIZE, BLOCK_R, BLOCK_C,
                    )  # fmt: skip
                change, summand = _compare(
                    x, k, maximum, scale, total, teacher_maximum, teacher_scale, teacher_total, log_ratio
                )
                divergence += tl.sum(tl.where(mask, summand, 0.0), axis=1)
                if NORMALIZE:
                    n = (x - maximum[:, None]) * slope[:, None] + top[:, None]
                    dot += tl.sum(tl.where(mask, change * n, 0.0), axis=1)
            if (stream == 0) | (weight != 0):  # noqa: SIM102 (the inner condition is a constant)
                if PROBABILITIES:
                    offsets = targets_rows[:, None] + classes.to(tl.int64)[None, :] * targets_class_stride
                    t = tl.load(targets_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                    t = t * (1 - label_smoothing) + uniform
                    nll = (maximum[:, None] - x) + log_raw_sum[:, None]
                    cross_entropy += tl.sum(tl.where(mask, t * nll, 0.0), axis=1)
                    target_total += tl.sum(tl.where(mask, t, 0.0), axis=1)
        if not PROBABILITIES:
            target_total += 1.0
            label_offsets = tl.where(ce_counted, labels, 0) * logits_class_stride
            chosen = tl.load(pointers + label_offsets, mask=row_mask, other=0.0).to(tl.float32)
            cross_entropy = (maximum - chosen) + log_raw_sum
            if label_smoothing != 0:
                mean_nll = (maximum - shift - mean) + log_raw_sum
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

        # 5. The gradient.
        if WITH_GRADIENT:
            to = gradient_ptr + stream * gradient_stream_stride + gradient_rows
            ce_factor = tl.where(ce_counted, weight * inverse_ce_rows * gradient_scale, 0.0)
            kd_factor = kd_weight * temperature * inverse_kd_rows * gradient_scale
            kd_factor = tl.where(kd_counted, kd_factor, 0.0) * slope
            softmax_factor = ce_factor * target_total / raw_sum
            centre = dot / class_count
            for start in range(0, class_count, BLOCK_C):
                classes = start + tl.arange(0, BLOCK_C)
                mask = row_mask[:, None] & (classes < class_count)[None, :]
                x = _logits_tile(pointers, classes, logits_class_stride, mask)
                g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
                if distilled:
                    if ONE_LOOP:
                        k = _logits_tile(pointers - logits_stream_stride, classes, logits_class_stride, mask)
                    else:
                        k = _knowledge_tile(
                            logits_ptr, statistics_ptr, logits_rows, rows, row_mask, classes, classes <
                            class_count, group - 1, visits, groups, plane, row_count, logits_stream_stride,
                            logits_class_stride, ema, NORMALIZE, BLOCK_R, BLOCK_C,
                        )  # fmt: skip
                    change, _ = _compare(
                        x, k, maximum, scale, total, teacher_maximum, teacher_scale, teacher_total, log_ratio,
                    )  # fmt: skip
                    if NORMALIZE:
                        n = (x - maximum[:, None]) * slope[:, None] + top[:, None]
                        change -= n * centre[:, None]
                    g += change * kd_factor[:, None]
                if weight != 0:
                    g += tl.exp(x - maximum[:, None]) * softmax_factor[:, None]
                    if PROBABILITIES:
                        offsets = targets_rows[:, None] + classes.to(tl.int64)[None, :] * targets_class_stride
                        t = tl.load(targets_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                        g -= (t * (1 - label_smoothing) + uniform) * ce_factor[:, None]
                    else:
                        one_hot = tl.where(classes[None, :] == labels[:, None], 1 - label_smoothing, 0.0)
                        g -= (one_hot + uniform) * ce_factor[:, None]
                offsets = classes.to(tl.int64)[None, :] * gradient_class_stride
                tl.store(to[:, None] + offsets, g.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(partials_ptr + program * (streams + 1) + streams, tl.sum(subnet_ce, axis=0))


def group_knowledge_loss(
    logits: Tensor,
    targets: Tensor,
    gradient: Tensor | None,
    *,
    groups: int,
    ema: float,
    temperature: float,
    normalize_logits: bool,
    eps: float,
    ce_weight: float,
    kd_weight: float,
    subnet_ce_weight: float,
    ignore_index: int,
    label_smoothing: float,
    distill_ignored: bool,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel: fills `gradient`, returns the loss and the terms, in float32.

    Class indices must have been checked.
    """
    streams, classes = logits.shape[0], logits.shape[2]
    probabilities = targets.is_floating_point()
    sizes, *strides = _rows(logits, gradient, targets, probabilities)
    rows = sizes[0] * sizes[1] * sizes[2]
    if probabilities:
        ce_rows = logits.new_full((), rows, dtype=torch.float64)
    else:
        ce_rows = (targets != ignore_index).sum(dtype=torch.float64)
    kd_rows = torch.full_like(ce_rows, rows) if distill_ignored else ce_rows
    block_rows, block_classes, warps = _blocks(classes)
    programs = triton.cdiv(rows, block_rows)
    partials = logits.new_empty((programs, streams + 1), dtype=torch.float32)
    if rows:
        group_knowledge_loss_kernel[(programs,)](
            logits, logits if gradient is None else gradient, targets,
            logits.new_empty((5, streams, rows), dtype=torch.float32), partials,
            torch.stack([ce_rows, kd_rows]).reciprocal().float(),
            streams, groups, classes, rows, sizes[1], sizes[2],
            *strides[0], *strides[1], *strides[2],
            logits.stride(0), logits.stride(2),
            *((0, 0) if gradient is None else (gradient.stride(0), gradient.stride(2))),
            targets.stride(1) if probabilities else 0,
            ignore_index, ema, temperature, eps, ce_weight, kd_weight, subnet_ce_weight, label_smoothing,
            gradient_scale,
            WITH_GRADIENT=gradient is not None, NORMALIZE=normalize_logits, PROBABILITIES=probabilities,
            DISTILL_IGNORED=distill_ignored, ONE_LOOP=streams - 1 <= groups,
            BLOCK_R=block_rows, BLOCK_C=block_classes, num_warps=warps,
        )  # fmt: skip
    sums = partials.sum(dim=0, dtype=torch.float64)
    terms = torch.cat([sums[:1] / ce_rows, sums[1:streams] / kd_rows])
    loss = terms.new_zeros(())
    if ce_weight:
        loss = loss + ce_weight * terms[0]
    if kd_weight and streams > 1:
        loss = loss + kd_weight * terms[1:].sum()
    if subnet_ce_weight and streams > 1:
        loss = loss + subnet_ce_weight * sums[streams] / ce_rows
    return loss.float(), terms.float()


def _blocks(classes: int) -> tuple[int, int, int]:
    """Rows and classes of a tile, and warps."""
    if classes <= 32:
        return 64, 32, 4
    if classes <= 256:
        return 8, 256, 4
    if classes <= 1024:
        return 2, 1024, 4
    return 1, 4096, 8


def _rows(
    logits: Tensor, gradient: Tensor | None, targets: Tensor, probabilities: bool
) -> list[tuple[int, int, int]]:
    """Sizes of the rows' dimensions and their strides in logits, gradient and targets.

    Dimensions that one stride walks in all three tensors are merged; those left over are filled up with
    size 1.

    Raises:
        ValueError: more than three dimensions are left.
    """
    dims = [d for d in range(1, logits.dim()) if d != 2]
    target_dims = [0, *range(2 if probabilities else 1, targets.dim())]
    merged: list[list[int]] = []
    for d, target_dim in zip(dims, target_dims, strict=True):
        size = logits.shape[d]
        strides = [
            logits.stride(d),
            0 if gradient is None else gradient.stride(d),
            targets.stride(target_dim),
        ]
        if size == 1:
            continue
        if merged and all(
            outer == size * inner for outer, inner in zip(merged[-1][1:], strides, strict=True)
        ):
            merged[-1] = [merged[-1][0] * size, *strides]
        else:
            merged.append([size, *strides])
    if len(merged) > ROW_DIMS:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and strides {logits.stride()}; its rows must be walkable by "
            f"{ROW_DIMS} strides"
        )
    merged = [[1, 0, 0, 0]] * (ROW_DIMS - len(merged)) + merged
    return [tuple(column) for column in zip(*merged, strict=True)]


def aot_configurations() -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What the launcher can launch: every dtype and tile, and every flag once the other way (kernels/triton)."""
    flags = {
        "WITH_GRADIENT": True,
        "NORMALIZE": True,
        "PROBABILITIES": False,
        "DISTILL_IGNORED": True,
        "ONE_LOOP": True,
    }
    for dtype in ("fp32", "bf16", "fp16"):
        for classes in (21, 100, 1000, 32000):
            yield _aot(f"{dtype}_{classes}", dtype, classes, flags)
    for flag, value in flags.items():
        yield _aot(
            f"fp32_100_{flag.lower()}_{str(not value).lower()}", "fp32", 100, flags | {flag: not value}
        )


def _aot(name: str, dtype: str, classes: int, flags: dict[str, bool]) -> tuple:
    block_rows, block_classes, warps = _blocks(classes)
    constexprs = {**flags, "BLOCK_R": block_rows, "BLOCK_C": block_classes, "logits_class_stride": 1}
    constexprs["gradient_class_stride"] = 1
    pointers = {
        "logits_ptr": f"*{dtype}",
        "gradient_ptr": f"*{dtype}",
        "targets_ptr": "*fp32" if flags["PROBABILITIES"] else "*i64",
        "statistics_ptr": "*fp32",
        "partials_ptr": "*fp32",
        "inverse_rows_ptr": "*fp32",
    }
    floats = {"ema", "temperature", "eps", "ce_weight", "kd_weight", "subnet_ce_weight", "label_smoothing"}
    signature = {}
    for argument in group_knowledge_loss_kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = pointers[argument]
        else:
            signature[argument] = "fp32" if argument in floats | {"gradient_scale"} else "i32"
    options = {"num_warps": warps, "num_stages": 3, "divisible_by_16": tuple(pointers)}
    return name, group_knowledge_loss_kernel, signature, constexprs, options
