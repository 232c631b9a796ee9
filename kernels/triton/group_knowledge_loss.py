"""Launches the Triton kernel of `group_knowledge_loss` (group_knowledge_loss_kernel.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .group_knowledge_loss_kernel import group_knowledge_loss_kernel

__all__ = ["aot_configurations", "group_knowledge_loss"]

ROW_DIMS = 3


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
    innermost, step = _innermost(logits, gradient, targets if probabilities else None, sizes, strides)
    tile = _tile(innermost, step, classes)
    if probabilities:
        ce_rows = logits.new_full((), rows, dtype=torch.float64)
    else:
        ce_rows = (targets != ignore_index).sum(dtype=torch.float64)
    kd_rows = torch.full_like(ce_rows, rows) if distill_ignored else ce_rows
    programs = triton.cdiv(rows, tile.rows)
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
            ignore_index, int(gradient is not None), int(normalize_logits), int(distill_ignored),
            ema, temperature, eps, ce_weight, kd_weight, subnet_ce_weight, label_smoothing, gradient_scale,
            PROBABILITIES=probabilities, ONE_LOOP=streams - 1 <= groups, INNERMOST=innermost, STEP=step,
            BLOCK_R=tile.rows, BLOCK_C=tile.classes, num_warps=tile.warps, maxnreg=tile.registers,
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


class _Tile(NamedTuple):
    """What a program holds at once, 4 or 8 elements per thread.

    `registers` are those that a thread may have. Left to itself, ptxas makes room for one more block on a
    multiprocessor and spills a few for it.
    """

    rows: int
    classes: int
    warps: int
    registers: int = 128


def _tile(innermost: str, step: int, classes: int) -> _Tile:
    """Small, since each row that a thread has a share in costs it some thirty registers."""
    if innermost == "rows":  # as many rows as one access moves
        return _Tile(64, 32, 8, 168 if step == 1 else 255)
    if innermost == "none" or classes <= 32:
        return _Tile(4 * max(step, 2), 32, 4)
    if classes <= 256:
        return _Tile(1, 256, 1, 168) if step == 1 else _Tile(2, 256, 2)
    return _Tile(1, 1024, 4) if classes <= 1024 else _Tile(1, 2048, 8)


def _innermost(
    logits: Tensor,
    gradient: Tensor | None,
    probabilities: Tensor | None,
    sizes: tuple[int, ...],
    strides: list[tuple[int, ...]],
) -> tuple[str, int]:
    """Which dimension lies together in all tensors, and how many neighbours 16 bytes of logits hold, or 1.

    The latter where everything is a multiple of 16 bytes: addresses, the dimension's size, all other strides.
    """
    tensors = []  # address, stride of classes, of rows, and of streams
    for tensor, row_strides, class_dim in (
        (logits, strides[0], 2),
        (gradient, strides[1], 2),
        (probabilities, strides[2], 1),
    ):
        if tensor is not None:
            stream_stride = tensor.stride(0) if class_dim == 2 else 0
            tensors.append((tensor.data_ptr(), tensor.stride(class_dim), row_strides, stream_stride))
    width = 16 // logits.element_size()
    classes = logits.shape[2]
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
    """Everything that the launcher can launch (kernels/triton)."""
    for dtype, width in (("fp32", 4), ("bf16", 8), ("fp16", 8)):
        layouts = [("classes", step, classes) for step in (width, 1) for classes in (32, 256, 1024, 32000)]
        layouts += [("rows", width, 21), ("rows", 1, 21), ("none", 1, 21)]
        for innermost, step, classes in layouts:
            for one_loop in (True, False):
                for probabilities in (False, True):
                    yield _aot(dtype, innermost, step, classes, one_loop, probabilities)


def _aot(dtype: str, innermost: str, step: int, classes: int, one_loop: bool, probabilities: bool) -> tuple:
    tile = _tile(innermost, step, classes)
    constexprs = {"PROBABILITIES": probabilities, "ONE_LOOP": one_loop, "INNERMOST": innermost, "STEP": step}
    constexprs |= {"BLOCK_R": tile.rows, "BLOCK_C": tile.classes}
    pointers = {"logits_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}"}
    pointers |= {"targets_ptr": "*fp32" if probabilities else "*i64"}
    pointers |= dict.fromkeys(("statistics_ptr", "partials_ptr", "inverse_rows_ptr"), "*fp32")
    signature = {
        parameter.name: pointers.get(parameter.name, parameter.annotation)
        for parameter in group_knowledge_loss_kernel.params
    }
    name = f"{dtype}_{innermost}_{f'{tile.classes}_' if innermost == 'classes' else ''}"
    name += f"{'vectors' if step > 1 else 'scalars'}_{'one_loop' if one_loop else 'loops'}"
    name += "_probabilities" if probabilities else ""
    options = {"num_warps": tile.warps, "maxnreg": tile.registers}
    return name, group_knowledge_loss_kernel, signature, constexprs, options
