"""Launches the Triton kernels of `group_knowledge_loss` (group_knowledge_loss_kernel.py and _counts.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .group_knowledge_loss_counts import COUNTERS, count_kernel, finish_kernel
from .group_knowledge_loss_kernel import (
    DISTILL_IGNORED,
    NORMALIZE,
    WITH_GRADIENT,
    group_knowledge_loss_kernel,
)

__all__ = ["Results", "Streams", "aot_configurations", "group_knowledge_loss"]

ROW_DIMS = 3
COUNT_BLOCK, FINISH_BLOCK = 1024, 4096


class Streams(NamedTuple):
    """Logits (B, C, *spatial) of the full network, or (S - 1, m, C, *spatial) of the subnets, and their gradient."""

    logits: Tensor
    gradient: Tensor | None


class Results(NamedTuple):
    """What is filled beside the gradients: the loss, the terms (S,), and the report of class indices (2,)."""

    loss: Tensor
    terms: Tensor
    report: Tensor


def group_knowledge_loss(
    full: Streams,
    subnets: Streams,
    targets: Tensor,
    results: Results,
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
) -> None:
    """Launches the kernels: fills the gradients and the results.

    A class index out of range goes into the report, and makes the loss and the cross entropies' gradient NaN.
    """
    logits = full.logits
    classes, streams = logits.shape[1], 1 + subnets.logits.shape[0]
    probabilities, one_loop = targets.is_floating_point(), streams - 1 <= groups
    sizes, *strides = _rows(full, subnets, targets, probabilities)
    rows = sizes[0] * sizes[1] * sizes[2]
    subnet_rows = rows // logits.shape[0] * subnets.logits.shape[1] if rows else 0
    innermost, step = _innermost(full, subnets, targets if probabilities else None, sizes, strides)
    step = _fitting(innermost, step, one_loop)
    tile = _tile(innermost, step, classes)
    programs = triton.cdiv(rows, tile.rows)
    with_statistics = normalize_logits and not one_loop
    counters = 0 if probabilities else min(triton.cdiv(rows, COUNT_BLOCK), COUNTERS.value)
    counts = logits.new_empty((max(counters, 1), 4), dtype=torch.int64)
    sums = logits.new_empty((streams + 1, programs), dtype=torch.float32)
    statistics = logits.new_empty((2, streams, rows), dtype=torch.float32) if with_statistics else sums
    if counters:
        count_kernel[(counters,)](
            targets, counts, classes, rows, subnet_rows, sizes[1], sizes[2], *strides[4], ignore_index,
            BLOCK=COUNT_BLOCK, num_warps=4,
        )  # fmt: skip
    if rows:
        with_gradient = full.gradient is not None
        flags = WITH_GRADIENT.value * with_gradient + NORMALIZE.value * normalize_logits
        full_gradient = full.gradient if with_gradient else logits
        gradient = subnets.gradient if with_gradient else subnets.logits
        group_knowledge_loss_kernel[(programs,)](
            logits, full_gradient, subnets.logits, gradient, targets, counts, sums, statistics,
            counters, streams, groups, classes, rows, subnet_rows, sizes[1], sizes[2],
            *strides[0], logits.stride(1), *strides[1], full_gradient.stride(1),
            *strides[2], subnets.logits.stride(2), *strides[3], gradient.stride(2),
            *strides[4], targets.stride(1) if probabilities else 0,
            subnets.logits.stride(0), gradient.stride(0),
            ignore_index, flags + DISTILL_IGNORED.value * distill_ignored,
            ema, temperature, eps, label_smoothing,
            ce_weight * gradient_scale, kd_weight * temperature * gradient_scale, subnet_ce_weight * gradient_scale,
            PROBABILITIES=probabilities, ONE_LOOP=one_loop, HELD=_held(tile, classes), INNERMOST=innermost,
            STEP=step, BLOCK_R=tile.rows, BLOCK_C=tile.classes, num_warps=tile.warps,
            maxnreg=tile.registers,
        )  # fmt: skip
    finish_kernel[(1,)](
        sums, counts, results.loss, results.terms, results.report, programs, counters, streams, classes, rows,
        subnet_rows, int(distill_ignored), ce_weight, kd_weight, subnet_ce_weight,
        PROBABILITIES=probabilities, BLOCK=FINISH_BLOCK, num_warps=8,
    )  # fmt: skip


class _Tile(NamedTuple):
    """What a program holds at once, 4 or 8 elements per thread.

    `registers` are those that a thread may have. Left to itself, ptxas makes room for one more block on a
    multiprocessor and spills a few for it.
    """

    rows: int
    classes: int
    warps: int
    registers: int = 128


def _fitting(innermost: str, step: int, one_loop: bool) -> int:
    """Neighbours to an access: with several loops eight rows, and what each knows, don't fit a thread's registers."""
    return 1 if innermost == "rows" and step > 4 and not one_loop else step


def _tile(innermost: str, step: int, classes: int) -> _Tile:
    """Small, since each row that a thread has a share in costs it some thirty registers."""
    if innermost == "rows":  # as many rows as one access moves
        return _Tile(64, 32, 8, 168 if step == 1 else 255)
    if innermost == "none" or classes <= 32:
        return _Tile(4 * max(step, 2), 32, 4, 168)
    if classes <= 256:
        return _Tile(1, 256, 1, 168) if step == 1 else _Tile(2, 256, 2, 200)
    return _Tile(1, 1024, 4, 168) if classes <= 1024 else _Tile(1, 2048, 8, 168)


def _held(tile: _Tile, classes: int) -> bool:
    """Whether a row stays in registers."""
    return classes <= min(tile.classes, 1024)


def _innermost(
    full: Streams,
    subnets: Streams,
    probabilities: Tensor | None,
    sizes: tuple[int, ...],
    strides: list[tuple[int, ...]],
) -> tuple[str, int]:
    """Which dimension lies together in all tensors, and how many neighbours 16 bytes of logits hold, or 1.

    The latter where everything is a multiple of 16 bytes: addresses, the dimension's size, all other strides.
    """
    tensors = []  # address, stride of classes, of rows, and of streams
    for tensor, row_strides, class_dim in (
        (full.logits, strides[0], 1),
        (full.gradient, strides[1], 1),
        (subnets.logits, strides[2], 2),
        (subnets.gradient, strides[3], 2),
        (probabilities, strides[4], 1),
    ):
        if tensor is not None and tensor.numel():
            stream_stride = tensor.stride(0) if class_dim == 2 else 0
            tensors.append((tensor.data_ptr(), tensor.stride(class_dim), row_strides, stream_stride))
    width = 16 // full.logits.element_size()
    classes = full.logits.shape[1]
    if all(class_stride == 1 for _, class_stride, _, _ in tensors):
        whole = [classes, *(n for _, _, rows, stream in tensors for n in (*rows, stream))]
        innermost = "classes"
    elif all(rows[2] == 1 for _, _, rows, _ in tensors):
        whole = [sizes[2]]
        for _, class_stride, rows, stream_stride in tensors:
            whole += [class_stride, rows[0], rows[1], stream_stride]
        innermost = "rows"
    else:
        return "none", 1
    aligned = all(address % 16 == 0 for address, *_ in tensors) and all(n % width == 0 for n in whole)
    return innermost, width if aligned else 1


def _rows(
    full: Streams, subnets: Streams, targets: Tensor, probabilities: bool
) -> list[tuple[int, int, int]]:
    """Sizes of the rows' dimensions and their strides in the full network's logits and gradient, the subnets', targets.

    The batch comes first, so that the subnets' rows are the first ones. Dimensions that one stride walks in all tensors
    are merged; those left over are filled up with size 1.

    Raises:
        ValueError: more than three dimensions are left.
    """
    places = []  # (tensor, place of the batch, place of the first spatial dimension)
    for streams, batch in ((full, 0), (subnets, 1)):
        gradient = streams.logits if streams.gradient is None else streams.gradient
        places += [(streams.logits, batch, batch + 2), (gradient, batch, batch + 2)]
    places.append((targets, 0, 2 if probabilities else 1))
    shape = full.logits.shape
    merged: list[list[int]] = []
    for d in range(len(shape) - 1):
        size = shape[0] if d == 0 else shape[d + 1]
        if size == 1:
            continue
        strides = [tensor.stride(batch if d == 0 else spatial + d - 1) for tensor, batch, spatial in places]
        if merged and all(
            outer == size * inner for outer, inner in zip(merged[-1][1:], strides, strict=True)
        ):
            merged[-1] = [merged[-1][0] * size, *strides]
        else:
            merged.append([size, *strides])
    if len(merged) > ROW_DIMS:
        raise ValueError(
            f"logits has shape {tuple(shape)} and strides {full.logits.stride()}; its rows must be walkable by "
            f"{ROW_DIMS} strides"
        )
    merged = [[1, *[0] * len(places)]] * (ROW_DIMS - len(merged)) + merged
    return [tuple(column) for column in zip(*merged, strict=True)]


def aot_configurations() -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """Everything that the launcher can launch (kernels/triton)."""
    for dtype, width in (("fp32", 4), ("bf16", 8), ("fp16", 8)):
        layouts = [("classes", step, classes) for step in (width, 1) for classes in (32, 256, 1024, 32000)]
        layouts += [("rows", step, classes) for step in (width, 1) for classes in (21, 64)]
        layouts += [("none", 1, 21), ("none", 1, 64)]
        for innermost, step, classes in layouts:
            for one_loop in (True, False):
                if step != _fitting(innermost, step, one_loop):
                    continue
                for probabilities in (False, True):
                    yield _aot(dtype, innermost, step, classes, one_loop, probabilities)
    yield _aot_small("count", count_kernel, {"BLOCK": COUNT_BLOCK}, 4)
    for probabilities in (False, True):
        constexprs = {"PROBABILITIES": probabilities, "BLOCK": FINISH_BLOCK}
        yield _aot_small(f"finish{'_probabilities' if probabilities else ''}", finish_kernel, constexprs, 8)


def _aot(dtype: str, innermost: str, step: int, classes: int, one_loop: bool, probabilities: bool) -> tuple:
    tile = _tile(innermost, step, classes)
    held = _held(tile, classes)
    constexprs = {"PROBABILITIES": probabilities, "ONE_LOOP": one_loop, "HELD": held, "INNERMOST": innermost}
    constexprs |= {"STEP": step, "BLOCK_R": tile.rows, "BLOCK_C": tile.classes}
    pointers = dict.fromkeys(("full_ptr", "full_gradient_ptr", "logits_ptr", "gradient_ptr"), f"*{dtype}")
    pointers |= {"targets_ptr": "*fp32" if probabilities else "*i64"}
    name = f"{dtype}_{innermost}_{f'{tile.classes}_' if innermost == 'classes' else ''}"
    name += f"{'held_' if held else ''}{'vectors' if step > 1 else 'scalars'}_{'one_loop' if one_loop else 'loops'}"
    name += "_probabilities" if probabilities else ""
    options = {"num_warps": tile.warps, "maxnreg": tile.registers}
    signature = _signature(group_knowledge_loss_kernel, pointers)
    return name, group_knowledge_loss_kernel, signature, constexprs, options


def _aot_small(name: str, kernel: triton.JITFunction, constexprs: dict, warps: int) -> tuple:
    return name, kernel, _signature(kernel, {"targets_ptr": "*i64"}), constexprs, {"num_warps": warps}


def _signature(kernel: triton.JITFunction, pointers: dict[str, str]) -> dict[str, str]:
    own = {"counts_ptr": "*i64", "report_ptr": "*i64"}
    own |= dict.fromkeys(("sums_ptr", "statistics_ptr", "loss_ptr", "terms_ptr"), "*fp32")
    types = own | pointers
    return {parameter.name: types.get(parameter.name, parameter.annotation) for parameter in kernel.params}
