"""Tiles of rows and classes, as the Triton kernel of `group_knowledge_loss` reads and compares them.

The launcher says which dimension lies together in memory (INNERMOST: "classes", "rows" or "none") and how many
neighbours one access may move (STEP): all addresses and sizes along it are then multiples of STEP elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "compare",
    "logits_tile",
    "next_tile",
    "normalized",
    "row_offsets",
    "targets_tile",
    "tile_pointers",
]


@triton.jit
def row_offsets(rows, size_1, size_2, stride_0, stride_1, stride_2):
    return (
        (rows // (size_1 * size_2)) * stride_0
        + (rows // size_2 % size_1) * stride_1
        + rows % size_2 * stride_2
    )


@triton.jit
def tile_pointers(pointers, classes, class_stride, INNERMOST: tl.constexpr, STEP: tl.constexpr):
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
def tile_mask(row_mask, class_mask, INNERMOST: tl.constexpr, STEP: tl.constexpr):
    """Which of (BLOCK_R, BLOCK_C) exist: STEP neighbours do together."""
    mask = row_mask[:, None] & class_mask[None, :]
    if INNERMOST == "classes":
        mask = tl.max_constancy(mask, (1, STEP))
    if INNERMOST == "rows":
        mask = tl.max_constancy(mask, (STEP, 1))
    return mask


@triton.jit
def logits_tile(pointers, classes, class_stride, mask, INNERMOST: tl.constexpr, STEP: tl.constexpr):
    """Logits (BLOCK_R, BLOCK_C) of one stream; -inf outside."""
    tile = tile_pointers(pointers, classes, class_stride, INNERMOST, STEP)
    return tl.load(tile, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def next_tile(
    start, row_mask, class_count, INNERMOST: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The classes from `start` on, and which of (BLOCK_R, BLOCK_C) exist."""
    classes = start + tl.arange(0, BLOCK_C)
    return classes, tile_mask(row_mask, classes < class_count, INNERMOST, STEP)


@triton.jit
def normalized(x, maximum, slope, top):
    """n(x) (BLOCK_R, BLOCK_C): `top` is that of the maximum."""
    return (x - maximum[:, None]) * slope[:, None] + top[:, None]


@triton.jit
def targets_tile(
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
    tile = tile_pointers(pointers, classes, class_stride, INNERMOST, STEP)
    return tl.load(tile, mask=mask, other=0.0) * (1 - label_smoothing) + uniform


@triton.jit
def compare(x, k, maximum, scale, total, teacher_maximum, teacher_scale, teacher_total, log_ratio):
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
