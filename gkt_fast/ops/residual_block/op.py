"""A whole residual block of several states as one node of the autograd graph.

With the layers' convolutions conv_i and batch norms bn_i (per ghost batch, as `ghost_batch_norm`), n layers, and the
block's input x (He et al. 2016, arXiv 1512.03385 and 1603.05027)::

    a_0 = x     a_i = relu(bn_i(conv_i(a_{i-1})))     y = relu(bn_n(conv_n(a_{n-1})) + shortcut(skip))
    preactivation:   a_i = relu(bn_i(c_{i-1}))     c_0 = x     c_i = conv_i(a_i)     y = c_n + shortcut(a_1), or + x

Forward and backward run below autograd, one after another what they consist of: torch's convolutions, and
`ghost_batch_norm` on the backend that is chosen for it. Kept for backward are x, the convolutions' outputs, the
statistics and one bit per element of y; normalised activations are computed again.

Shapes: m ghost batches, B rows in each, C channels; x, skip, y (m*B, C, height, width); mean, var (m, C); keep (m,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import Function

from .. import library
from ..ghost_batch_norm.op import NAME as NORM
from ..ghost_batch_norm.passes import FAKE_PASSES, PassesOn
from ..registry import run
from .checks import check_arguments, check_values
from .native import native_backward, native_forward
from .passes import Saved, Updates, backward, forward
from .problem import Convolution, Norm, Problem, describe, parameters_of
from .reference import residual_block_reference

__all__ = ["autocast_dtype", "residual_block", "run_plain_residual_block", "run_residual_block"]

NAME = "residual_block"


def residual_block(
    x: Tensor,
    convolutions: Sequence[Convolution],
    norms: Sequence[Norm],
    *,
    ghosts: int,
    lead_rows: int | None = None,
    shortcut: tuple[Convolution, Norm | None] | None = None,
    skip: Tensor | None = None,
    keep: Tensor | None = None,
    preactivation: bool = False,
    recompute: bool | Literal["pointwise"] = True,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A residual block: convolutions with their batch norms and ReLUs, plus the shortcut.

    Under autocast convolutions run in its dtype. Backward needs no autocast. Under torch's FLOP counter it runs as
    `residual_block_reference`, so that convolutions are counted, forward and backward.

    Args:
        x: (m*B, C, height, width), in any memory format; float32, float64, bfloat16 or float16.
        convolutions: of the main branch, in the order in which they run.
        norms: one for each convolution; ReLU follows each. With running statistics (eval mode), or with those of each
            ghost batch.
        ghosts: m, the number of ghost batches.
        lead_rows: rows of the first ghost batch; None: as many as each of the others has.
        shortcut: what the residual goes through: a convolution and its norm, or None for no norm. None: nothing.
        skip: (m*B, C', height', width'), what the shortcut reads where that isn't x: what code outside computed. It
            is the residual itself where there is no `shortcut`. Not with preactivation.
        keep: (m,) bool. A ghost batch with False skips the main branch: its y is its residual untouched. The branch
            gets a gradient of zero from it. Its statistics are reported all the same.
        preactivation: whether norms and ReLUs come before convolutions. The shortcut's convolution then reads what the
            first norm gave, and nothing follows the addition.
        recompute: whether backward recomputes normalised activations, or finds them saved; "pointwise": it recomputes
            them and the outputs of 1x1 convolutions.

    Returns:
        y; mean and biased variance, (m, C) each, of each norm of the main branch, then of that of the shortcut, as of
        `ghost_batch_norm`.

    Raises:
        TypeError: x, or the residual of another dtype than the last convolution's output.
        ValueError: a shape or value is wrong, or a channel of a ghost batch has one value only.
        RuntimeError: its gradient is differentiated; that of `residual_block_reference` can be. Or channels don't fit.
    """
    check_arguments(x, convolutions, norms, shortcut, skip, preactivation, recompute)
    check_values(
        x, convolutions, norms, shortcut, skip, preactivation, keep, ghosts, lead_rows, autocast_dtype(x)
    )
    if library.counts_flops():
        return residual_block_reference(
            x, convolutions, norms, ghosts=ghosts, lead_rows=lead_rows, shortcut=shortcut,
            skip=skip, keep=keep, preactivation=preactivation,
        )  # fmt: skip
    layers = [*convolutions] if shortcut is None else [*convolutions, shortcut[0]]
    of_layers = [*norms] if shortcut is None else [*norms, shortcut[1]]
    problem = describe(
        layers,
        of_layers,
        shortcut=shortcut is not None,
        preactivation=preactivation,
        ghosts=ghosts,
        lead_rows=lead_rows,
        recompute=bool(recompute),
        pointwise=recompute == "pointwise",
        dtype=autocast_dtype(x),
    )
    y, statistics = run_residual_block(problem, x, skip, keep, parameters_of(layers, of_layers))
    return y, [(found[0], found[2]) for found in statistics]


def run_residual_block(
    problem: Problem,
    x: Tensor,
    skip: Tensor | None,
    keep: Tensor | None,
    parameters: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor]]:
    """y and statistics (3, m, C) of each norm, of arguments that are known to be right; see `residual_block`."""
    if library.runs_plain(x, skip, keep, *parameters):
        return run_plain_residual_block(problem, x, skip, keep, parameters, None)
    y, statistics, _ = _op(x, skip, keep, parameters, *problem.flatten())
    return y, statistics


def run_plain_residual_block(
    problem: Problem,
    x: Tensor,
    skip: Tensor | None,
    keep: Tensor | None,
    parameters: Sequence[Tensor | None],
    updates: Updates | None,
) -> tuple[Tensor, list[Tensor]]:
    """The same where nothing but torch's kernels sees what runs (`library.runs_plain`); norms of a single ghost batch
    can update running statistics, see `passes.forward`."""
    if not torch.is_grad_enabled():
        y, statistics, _ = _run_forward(problem, (x, skip, keep, *parameters), updates)
        return y, statistics
    statistics: list[Tensor] = []
    return _Differentiated.apply(problem, (statistics, updates), x, skip, keep, *parameters), statistics


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which convolutions of x run under autocast; None: in that of x."""
    if not torch._C._is_any_autocast_enabled() or x.dtype is torch.float64:
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _run_forward(problem, inputs, updates=None):
    """y, statistics, and what backward needs; of x, skip, keep and the parameters."""

    def on(backend):
        found = native_forward(backend, problem, inputs, updates)
        if found is None:
            x, skip, keep, *parameters = inputs
            y, statistics, saved = forward(PassesOn(backend), problem, x, skip, keep, parameters, updates)
            found = y, statistics, saved.flatten()
        return found

    x = inputs[0]
    with library.below_everything():
        return run(NORM, x.device, problem.dtype or x.dtype, on)


def _run_backward(problem, grad_y, tensors, counts, needs):
    """The gradients of the inputs; `tensors` are as `_parts` takes them apart."""

    def on(backend):
        gradients = native_backward(backend, problem, grad_y, tensors, needs)
        if gradients is None:
            x, skip, keep, parameters, statistics, saved = _parts(tensors, counts)
            saved = Saved.unflatten(problem, parameters, saved)
            gradients = backward(
                PassesOn(backend), problem, grad_y, x, skip, keep, parameters, statistics, saved, needs
            )
        return gradients

    x = tensors[0]
    with library.below_everything():
        return run(NORM, x.device, problem.dtype or x.dtype, on)


def _parts(tensors, counts):
    """x, skip, keep, parameters, statistics, and what else is saved."""
    of_parameters, of_statistics = 3 + counts[0], 3 + sum(counts)
    x, skip, keep = tensors[:3]
    return (
        x,
        skip,
        keep,
        tensors[3:of_parameters],
        tensors[of_parameters:of_statistics],
        tensors[of_statistics:],
    )


def _read(parameters):
    """In memory as they are read, which the dispatcher sees to of no list."""
    return [p if p is None else p.resolve_neg() for p in parameters]


def _forward_op(x, skip, keep, parameters, *options):
    return _run_forward(Problem.unflatten(*options), (x, skip, keep, *_read(parameters)))


def _fake_forward_op(x, skip, keep, parameters, *options):
    problem = Problem.unflatten(*options)
    y, statistics, saved = forward(FAKE_PASSES, problem, x, skip, keep, parameters)
    return y, statistics, saved.flatten()


def _backward_op_kernel(grad_y, x, skip, keep, parameters, statistics, saved, needs, *options):
    tensors = x, skip, keep, *_read(parameters), *statistics, *saved
    counts = len(parameters), len(statistics)
    gradients = _run_backward(Problem.unflatten(*options), grad_y, tensors, counts, needs)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _fake_backward_op(grad_y, x, skip, keep, parameters, statistics, saved, needs, *options):
    problem = Problem.unflatten(*options)
    saved = Saved.unflatten(problem, parameters, saved)
    gradients = backward(FAKE_PASSES, problem, grad_y, x, skip, keep, parameters, statistics, saved, needs)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


class _Differentiated(Function):
    """`heard` is a list that receives the statistics, with the updates of running ones; or None: statistics are then
    results, and so is what is saved."""

    @staticmethod
    def forward(ctx, problem, heard, *inputs):
        count = len(inputs) - 3
        if heard is None:
            x, skip, keep, *parameters = inputs
            y, statistics, saved = library.below_autograd(_op, x, skip, keep, parameters, *problem.flatten())
            ctx.mark_non_differentiable(*statistics, *saved)
        else:
            y, statistics, saved = _run_forward(problem, inputs, heard[1])
            heard[0].extend(statistics)
        ctx.set_materialize_grads(False)
        library.save(ctx, *inputs, *statistics, *saved)
        ctx.problem, ctx.plain = problem, heard is not None
        ctx.counts = count, len(statistics)
        return y if heard is not None else (y, *statistics, *saved)

    @staticmethod
    def backward(ctx, grad_y, *_: None):
        needs = ctx.needs_input_grad[2:]
        if grad_y is None or True not in needs:
            return (None,) * (2 + len(needs))
        tensors = library.saved(ctx)
        if ctx.plain and library.runs_plain(grad_y):
            gradients = _run_backward(ctx.problem, grad_y, tensors, ctx.counts, needs)
        else:
            parts = _parts(tensors, ctx.counts)
            found = library.below_autograd(_backward_op, grad_y, *parts, needs, *ctx.problem.flatten())
            gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        if torch.is_grad_enabled():
            present = tuple(g for g in gradients if g is not None)
            through = grad_y, *(t for t in tensors[: len(needs)] if t is not None)
            refused = iter(library.refuse_second_derivative(NAME, present, through))
            gradients = [None if g is None else next(refused) for g in gradients]
        return None, None, *gradients


def _flat(x, skip, keep, parameters, *options):
    return Problem.unflatten(*options), None, x, skip, keep, *parameters


def _nested(results, x, skip, keep, parameters, geometry, eps, *options):
    norms = sum(value >= 0 for value in eps)
    return results[0], list(results[1 : 1 + norms]), list(results[1 + norms :])


_OPTIONS = (
    "int[] geometry, float[] eps, bool shortcut, bool preactivation, SymInt ghosts, SymInt? lead_rows, "
    "bool recompute, bool pointwise, ScalarType? dtype"
)
_op = library.define(
    f"{NAME}(Tensor x, Tensor? skip, Tensor? keep, Tensor?[] parameters, {_OPTIONS}) "
    "-> (Tensor y, Tensor[] statistics, Tensor[] saved)",
    _forward_op,
    _fake_forward_op,
)
_backward_op = library.define(
    f"{NAME}_backward(Tensor grad_y, Tensor x, Tensor? skip, Tensor? keep, Tensor?[] parameters, "
    f"Tensor[] statistics, Tensor[] saved, bool[] needs, {_OPTIONS}) -> Tensor[]",
    _backward_op_kernel,
    _fake_backward_op,
)
library.differentiate(_op, _Differentiated, flat=_flat, nested=_nested)
