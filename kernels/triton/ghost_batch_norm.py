"""Launches the Triton kernels of `ghost_batch_norm` (ghost_batch_norm_kernels.py, ghost_batch_norm_merge.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .ghost_batch_norm_kernels import affine_kernel, sums_kernel
from .ghost_batch_norm_merge import merge_gradients_kernel, merge_statistics_kernel

__all__ = ["aot_configurations", "backward", "forward"]

TILE_BYTES = 8192  # of a tensor that a program holds at once: two 16-byte accesses of each thread
NARROW_TILE = 2048  # elements at most where accesses are narrower and each takes registers for its address
CHUNK_ELEMENTS = 8192  # of a program, at least
MOST_CHUNKS = 1024  # of all ghost batches, unless there are more of these
MERGE_TILE = {"LANES": 64, "BLOCK": 8}  # 64 lanes share the chunks of a channel, one element per thread
MERGE_OPTIONS = {"num_warps": 16, "maxnreg": 64}
WARPS = 8
# Left to itself, ptxas makes room for one more block on a multiprocessor and spills a register for it.
VECTOR_REGISTERS, SCALAR_REGISTERS = 80, 168  # at most, of a thread, with 16-byte accesses or without
HALF_AFFINE_REGISTERS = 128  # of the affine pass with eight elements in 16 bytes, of two tensors, twice
PLANES_COLUMNS = (64, 256)
CHANNELS_LAST_COLUMNS = (16, 64)


class _Plan:
    """Sizes and grids of one call.

    Args:
        problem: what the backend was told.
        activations: all tensors in the problem's layout.
    """

    def __init__(self, problem, activations: tuple[torch.Tensor | None, ...]) -> None:
        ghosts, rows, channels, positions = problem.sizes
        self.problem, self.ghosts, self.channels = problem, ghosts, channels
        self.device = activations[0].device
        per_row, self.length = (positions, channels) if problem.channels_last else (1, positions)
        self.lead_lines, self.lines = problem.lead_rows * per_row, rows * per_row
        self.values_per_line = 1 if problem.channels_last else positions
        widths = CHANNELS_LAST_COLUMNS if problem.channels_last else PLANES_COLUMNS
        self.columns = next((width for width in widths if self.length <= width), widths[-1])
        self.double = problem.dtype == torch.float64
        self.step = self._step([tensor for tensor in activations if tensor is not None])
        size = problem.dtype.itemsize
        self.rows, most_rows = (_tile_rows(self.columns, size, step) for step in (self.step, _steps(size)[0]))
        width = self.columns if problem.channels_last else positions
        all_lines = self.lead_lines + (ghosts - 1) * self.lines
        lines = max(CHUNK_ELEMENTS // width, triton.cdiv(all_lines, MOST_CHUNKS), 1)
        longest = max(self.lead_lines, self.lines)
        self.chunk_lines = min(most_rows * triton.cdiv(lines, most_rows), longest)
        self.lead_chunks, self.chunks = (
            triton.cdiv(n, self.chunk_lines) for n in (self.lead_lines, self.lines)
        )
        self.all_chunks = self.lead_chunks + (ghosts - 1) * self.chunks
        blocks = triton.cdiv(channels, self.columns) if problem.channels_last else channels
        self.grid = (self.all_chunks * blocks,)
        self.sums_options, self.affine_options = (
            _tile_options(self.step, size, affine) for affine in (False, True)
        )
        self.merge_blocks = triton.cdiv(channels, MERGE_TILE["BLOCK"])
        self.dtype = tl.float64 if self.double else tl.float32

    def _step(self, activations: list[torch.Tensor]) -> int:
        size = activations[0].element_size()
        whole = [self.length, *(stride for tensor in activations for stride in self.strides(tensor))]
        whole += [tensor.data_ptr() // size for tensor in activations]
        return next(step for step in _steps(size) if all(number % step == 0 for number in whole))

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            *(self.lead_lines, self.lines, self.length, self.channels),
            *(self.chunk_lines, self.lead_chunks, self.chunks),
        )

    @property
    def tile(self) -> dict[str, object]:
        sizes = {"STEP": self.step, "ROWS": self.rows, "COLUMNS": self.columns}
        return {**sizes, "DTYPE": self.dtype}

    @property
    def merge(self) -> dict[str, object]:
        options = {"USE_RUNNING": self.problem.use_running, "EPS": self.problem.eps, "DTYPE": self.dtype}
        return {**options, **MERGE_TILE, **MERGE_OPTIONS}

    def strides(self, tensor: torch.Tensor) -> tuple[int, int]:
        """From line to line, and in planes from channel to channel."""
        if not self.problem.channels_last:
            return tensor.stride(0), tensor.stride(1)
        steps = (tensor.stride(d) for d in (*range(tensor.dim() - 1, 1, -1), 0) if tensor.shape[d] > 1)
        return next(steps, self.channels), 0

    def is_new(self, has_residual: bool) -> bool:
        """Whether no pass of these kernels, on this device, has updated running statistics so far; asked once."""
        problem = self.problem
        kernels = (
            self.device,
            problem.dtype,
            problem.channels_last,
            problem.relu,
            problem.eps,
            self.step,
            self.columns,
        )
        is_new = (*kernels, has_residual) not in _launched
        _launched.add((*kernels, has_residual))
        return is_new

    def scratch(self, x: torch.Tensor, *shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.float64 if self.double else torch.float32)


_launched: set[tuple] = set()
"""The forward passes that have begun to update running statistics."""


def forward(
    problem, x, residual, weight, bias, keep, y, statistics, mask, running_mean=None, running_var=None
) -> None:
    """Fills y, mask, and, unless running statistics are used, statistics. Tensors are in the problem's layout.

    Running statistics that are given are updated; they are dense.
    """
    plan = _Plan(problem, (x, residual, y))
    if running_mean is not None and plan.is_new(residual is not None):
        # A kernel that doesn't work here must fail before anything is updated.
        forward(problem, x, residual, weight, bias, keep, y, statistics, mask)
    ghosts, channels = plan.ghosts, plan.channels
    parts = plan.scratch(x, plan.all_chunks, 3, channels)
    coefficients = plan.scratch(x, 2, ghosts, channels)
    layout = {"CHANNELS_LAST": problem.channels_last}
    with torch.cuda.device_of(x):
        if not problem.use_running:
            sums_kernel[plan.grid](
                x, x, mask, statistics, parts, *plan.strides(x), *plan.strides(x), *plan.sizes,
                BACKWARD=False, RELU=False, **layout, **plan.tile, **plan.sums_options,
            )  # fmt: skip
        merge_statistics_kernel[(ghosts * plan.merge_blocks,)](
            parts, statistics if weight is None else weight, statistics if bias is None else bias, statistics,
            coefficients, statistics if running_mean is None else running_mean,
            statistics if running_var is None else running_var, ghosts, plan.lead_lines, plan.lines,
            plan.values_per_line, int(weight is not None), int(bias is not None), int(running_mean is not None),
            problem.momentum or 0.0, channels, plan.chunk_lines, plan.lead_chunks, plan.chunks, **plan.merge,
        )  # fmt: skip
        other = x if residual is None else residual
        affine_kernel[plan.grid](
            x, other, mask, statistics, coefficients, _bytes(keep, mask), y, y,
            *plan.strides(x), *plan.strides(other), *plan.strides(y), ghosts, *plan.sizes,
            int(keep is not None), BACKWARD=False, RELU=problem.relu, HAS_RESIDUAL=residual is not None,
            **layout, **plan.tile, **plan.affine_options,
        )  # fmt: skip


def backward(
    problem, grad_y, x, weight, statistics, mask, keep, grad_x, grad_residual, grad_weight, grad_bias
) -> None:
    """Fills the gradients; grad_residual may be None. grad_x and grad_residual have the same strides."""
    plan = _Plan(problem, (grad_y, x, grad_x, grad_residual))
    ghosts, channels = plan.ghosts, plan.channels
    parts = plan.scratch(x, plan.all_chunks, 3, channels)
    coefficients = plan.scratch(x, 3, ghosts, channels)
    layout = {"CHANNELS_LAST": problem.channels_last}
    strides = (*plan.strides(x), *plan.strides(grad_y))
    with torch.cuda.device_of(x):
        sums_kernel[plan.grid](
            x, grad_y, mask, statistics, parts, *strides, *plan.sizes,
            BACKWARD=True, RELU=problem.relu, **layout, **plan.tile, **plan.sums_options,
        )  # fmt: skip
        merge_gradients_kernel[(plan.merge_blocks,)](
            parts, statistics if weight is None else weight, statistics, _bytes(keep, mask), coefficients,
            grad_weight, grad_bias, ghosts, plan.lead_lines, plan.lines, plan.values_per_line,
            int(weight is not None), int(keep is not None), channels, plan.lead_chunks, plan.chunks, **plan.merge,
        )  # fmt: skip
        affine_kernel[plan.grid](
            x, grad_y, mask, statistics, coefficients, _bytes(keep, mask), grad_x,
            grad_x if grad_residual is None else grad_residual, *strides, *plan.strides(grad_x), ghosts, *plan.sizes,
            int(keep is not None), BACKWARD=True, RELU=problem.relu, HAS_RESIDUAL=grad_residual is not None,
            **layout, **plan.tile, **plan.affine_options,
        )  # fmt: skip


def _bytes(keep: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """`keep` as the kernels read it; without it any pointer to bytes."""
    return mask if keep is None else keep.view(torch.uint8)


def _tile_rows(columns: int, element_size: int, step: int) -> int:
    elements = TILE_BYTES // element_size
    return (elements if step * element_size == 16 else min(elements, NARROW_TILE)) // columns


def _steps(element_size: int) -> tuple[int, ...]:
    """Elements that one access may move, the most first."""
    return tuple(step for step in (8, 4, 2, 1) if step * element_size <= 16)


def _tile_options(step: int, element_size: int, affine: bool) -> dict[str, int]:
    registers = SCALAR_REGISTERS
    if step * element_size == 16:
        registers = HALF_AFFINE_REGISTERS if affine and step == 8 else VECTOR_REGISTERS
    return {"num_warps": WARPS, "maxnreg": registers}


def aot_configurations() -> Iterator[tuple]:
    """Everything that the launchers can launch (kernels/triton)."""
    for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp64", 8)):
        for channels_last, widths in ((True, CHANNELS_LAST_COLUMNS), (False, PLANES_COLUMNS)):
            for columns in widths:
                for step in _steps(size):
                    yield from _aot_tiles(dtype, size, channels_last, columns, step)
    for dtype in ("fp32", "fp64"):
        for running in (False, True):
            common = {
                "EPS": 1e-5,
                **MERGE_TILE,
                "DTYPE": _accumulated(dtype),
                "USE_RUNNING": running,
            }
            for kernel in (merge_statistics_kernel, merge_gradients_kernel):
                name = (
                    f"{kernel.__name__.removesuffix('_kernel')}_{dtype}_{'running' if running else 'batch'}"
                )
                yield _aot(name, kernel, dtype, common, MERGE_OPTIONS)


def _aot_tiles(dtype: str, size: int, channels_last: bool, columns: int, step: int) -> Iterator[tuple]:
    layout = f"{dtype}_{'channels_last' if channels_last else 'planes'}_{columns}"
    layout += "_vectors" if step * size == 16 else {4: "_quads", 2: "_pairs", 1: "_scalars"}[step]
    rows, accumulated = _tile_rows(columns, size, step), _accumulated(dtype)
    tile = {
        "CHANNELS_LAST": channels_last,
        "STEP": step,
        "ROWS": rows,
        "COLUMNS": columns,
        "DTYPE": accumulated,
    }
    sums_options, affine_options = (_tile_options(step, size, affine) for affine in (False, True))
    for backward, relu in itertools.product((False, True), repeat=2):
        direction, activation = "backward" if backward else "forward", "_relu" if relu else ""
        constants = {"BACKWARD": backward, "RELU": relu, **tile}
        if backward or not relu:
            yield _aot(f"sums_{direction}_{layout}{activation}", sums_kernel, dtype, constants, sums_options)
        # Without ReLU the residual's gradient is that of y.
        for residual in (False, True) if relu or not backward else (False,):
            name = f"affine_{direction}_{layout}{activation}{'_residual' if residual else ''}"
            yield _aot(name, affine_kernel, dtype, {**constants, "HAS_RESIDUAL": residual}, affine_options)


_ACTIVATIONS = ("x_ptr", "grad_ptr", "other_ptr", "out_ptr", "grad_residual_ptr")


def _accumulated(dtype: str) -> tl.dtype:
    return tl.float64 if dtype == "fp64" else tl.float32


def _aot(name: str, function, dtype: str, constants: dict[str, object], options: dict[str, int]) -> tuple:
    pointers = dict.fromkeys(_ACTIVATIONS, f"*{dtype}") | dict.fromkeys(("mask_ptr", "keep_ptr"), "*u8")
    signature = {
        parameter.name: parameter.annotation
        or pointers.get(parameter.name, "*fp64" if dtype == "fp64" else "*fp32")
        for parameter in function.params
    }
    return name, function, signature, constants, options
