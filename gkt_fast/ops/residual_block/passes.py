"""The forward and the backward pass of a residual block: torch's convolutions and the norm's own passes, in turn.

Nothing here is differentiated or seen by the dispatcher's other keys. Of every norm of the main branch but the last,
backward needs the activation that the next convolution read: it is saved, or computed again from the convolution's
output before it (`recompute`), by the same kernel and from the same statistics. The output of a 1x1 convolution can be
computed again in the same way (`pointwise`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ghost_batch_norm.passes import Passes
from ..ghost_batch_norm.running_statistics import RunningUpdate
from .problem import SLOTS, Problem

__all__ = ["Saved", "Updates", "backward", "forward"]

Tensors = Sequence["Tensor | None"]

_convolution_backward = torch.ops.aten.convolution_backward.default


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass, beside inputs and statistics.

    Args:
        convolved: the convolutions' outputs that norms read, by layer; None where backward computes it again.
        masks: of the norms with ReLU in the order of the layers; with `recompute` that of the last norm alone, or none
            before activations.
        activations: that convolutions read, other than x; with `recompute` none.
    """

    convolved: list[Tensor | None]
    masks: list[Tensor]
    activations: list[Tensor]

    def flatten(self) -> list[Tensor]:
        return [*(c for c in self.convolved if c is not None), *self.masks, *self.activations]

    @classmethod
    def unflatten(cls, problem: Problem, parameters: Tensors, tensors: Sequence[Tensor]) -> Saved:
        depth = problem.depth
        if problem.preactivation:
            read, masks = depth - 1, 0 if problem.recompute else depth
        else:
            normed_shortcut = problem.shortcut and problem.eps[-1] is not None
            read, masks = depth + normed_shortcut, 1 if problem.recompute else depth
        kept = [not _is_recomputed(problem, parameters, i) for i in range(read)]
        rest = iter(tensors)
        convolved = [next(rest) if kept_here else None for kept_here in kept]
        return cls(convolved, list(itertools.islice(rest, masks)), list(rest))

    def keep(self, problem: Problem, parameters: Tensors, i: int, output: Tensor) -> None:
        """The output of convolution i, the next one."""
        self.convolved.append(None if _is_recomputed(problem, parameters, i) else output)


def _is_recomputed(problem: Problem, parameters: Tensors, i: int) -> bool:
    """Whether backward computes the output of convolution i again."""
    return problem.pointwise and tuple(parameters[SLOTS * i].shape[2:]) == (1, 1)


Updates = list["RunningUpdate | None"]
"""Of each layer's norm; what was done becomes None."""


def forward(
    passes: Passes,
    problem: Problem,
    x: Tensor,
    skip: Tensor | None,
    keep: Tensor | None,
    parameters: Tensors,
    updates: Updates | None = None,
) -> tuple[Tensor, list[Tensor], Saved]:
    """y, the statistics of every norm in the order of the layers, and what backward needs.

    Args:
        passes: of the norms.
        problem: of the block.
        x: the block's input.
        skip: what the shortcut reads, where that isn't x.
        keep: of `residual_block`.
        parameters: `SLOTS` tensors of each layer.
        updates: running statistics to write; None: none. A pass that fails may be run again with what is left.
    """
    run = _forward_preactivation if problem.preactivation else _forward
    updates = [None] * len(problem.convolutions) if updates is None else updates
    return run(passes, problem, x, skip, keep, parameters, updates)


def _forward(
    passes: Passes,
    problem: Problem,
    x: Tensor,
    skip: Tensor | None,
    keep: Tensor | None,
    parameters: Tensors,
    updates: Updates,
) -> tuple[Tensor, list[Tensor], Saved]:
    last = problem.depth - 1
    saved, statistics = Saved([], [], []), []
    a = x
    for i in range(last):
        c = _convolve(problem, i, a, parameters)
        a, found, mask = _normalize(passes, problem, i, c, parameters, updates)
        saved.keep(problem, parameters, i, c)
        statistics.append(found)
        if not problem.recompute:
            saved.masks.append(mask)
            saved.activations.append(a)
    c = _convolve(problem, last, a, parameters)
    saved.keep(problem, parameters, last, c)
    residual = x if skip is None else skip
    if problem.shortcut:
        residual = _convolve(problem, last + 1, residual, parameters)
        if problem.eps[-1] is not None:
            saved.keep(problem, parameters, last + 1, residual)
            residual, of_shortcut, _ = _normalize(
                passes, problem, last + 1, residual, parameters, updates, relu=False
            )
    y, found, mask = _normalize(passes, problem, last, c, parameters, updates, residual=residual, keep=keep)
    saved.masks.append(mask)
    statistics.append(found)
    if problem.shortcut and problem.eps[-1] is not None:
        statistics.append(of_shortcut)
    return y, statistics, saved


def _forward_preactivation(
    passes: Passes,
    problem: Problem,
    x: Tensor,
    skip: None,
    keep: Tensor | None,
    parameters: Tensors,
    updates: Updates,
) -> tuple[Tensor, list[Tensor], Saved]:
    saved, statistics = Saved([], [], []), []
    y, residual = x, x
    for i in range(problem.depth):
        a, found, mask = _normalize(passes, problem, i, y, parameters, updates)
        statistics.append(found)
        if i > 0:
            saved.keep(problem, parameters, i - 1, y)
        elif problem.shortcut:
            residual = _convolve(problem, problem.depth, a, parameters)
        if not problem.recompute:
            saved.masks.append(mask)
            saved.activations.append(a)
        y = _convolve(problem, i, a, parameters)
    for row, dropped in _dropped(problem, keep, y):
        row.masked_fill_(dropped, 0)
    return y.add_(residual), statistics, saved


def backward(
    passes: Passes,
    problem: Problem,
    grad_y: Tensor,
    x: Tensor,
    skip: Tensor | None,
    keep: Tensor | None,
    parameters: Tensors,
    statistics: Sequence[Tensor],
    saved: Saved,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, skip, keep (None) and the parameters; None where `needs`, in the same order, wants none."""
    run = _Backward(passes, problem, x, skip, parameters, statistics, saved, needs)
    if problem.preactivation:
        run.preactivation(grad_y, keep)
    else:
        run.postactivation(grad_y, keep)
    return [gradient if needed else None for gradient, needed in zip(run.gradients, needs, strict=True)]


class _Backward:
    """One backward pass; `gradients` are those of x, skip, keep and the parameters, as far as they are known."""

    def __init__(self, passes, problem, x, skip, parameters, statistics, saved, needs) -> None:
        self.passes, self.problem, self.parameters = passes, problem, parameters
        self.x, self.skip = x, skip
        self.statistics, self.saved = statistics, saved
        self.needs_x, self.needs_skip, _, *self.needs = needs
        self.gradients: list[Tensor | None] = [None] * len(needs)
        self._outputs = list(saved.convolved)
        self._recomputed: dict[int, tuple[Tensor, Tensor]] = {}

    def postactivation(self, grad_y: Tensor, keep: Tensor | None) -> None:
        problem, skip, last = self.problem, self.skip, self.problem.depth - 1
        shortcut = last + 1 if problem.shortcut else None
        needs_residual = self.needs_x if skip is None else self.needs_skip
        wanted = needs_residual or (problem.shortcut and any(self._needs(shortcut)))
        gradient, residual = self._norm(last, grad_y, self.saved.masks[-1], keep, wanted)
        for i in range(last, -1, -1):
            source = self.x
            if i > 0:
                source, mask = self._take_activation(i - 1)
            gradient = self._convolution(i, gradient, source, self._reaches(i))
            if gradient is None:
                break
            if i > 0:
                gradient, _ = self._norm(i - 1, gradient, mask)
        if wanted and problem.shortcut:
            if problem.eps[-1] is not None:
                residual, _ = self._norm(shortcut, residual, None)
            residual = self._convolution(shortcut, residual, self.x if skip is None else skip, needs_residual)
        if not needs_residual:
            self.gradients[0] = _cast(gradient, self.x.dtype)
        elif skip is None:
            self.gradients[0] = _cast(_add(gradient, residual), self.x.dtype)
        else:
            self.gradients[0] = _cast(gradient, self.x.dtype)
            self.gradients[1] = _cast(residual, skip.dtype)

    def preactivation(self, grad_y: Tensor, keep: Tensor | None) -> None:
        problem = self.problem
        gradient = grad_y
        if keep is not None:
            gradient = grad_y.clone()
            for row, dropped in _dropped(problem, keep, gradient):
                row.masked_fill_(dropped, 0)
        for i in range(problem.depth - 1, -1, -1):
            source, mask = self._take_activation(i)
            norm_needed = self.needs_x or self._reaches(i) or any(self._needs(i)[2:4])
            gradient = self._convolution(i, gradient, source, norm_needed)
            if i == 0 and problem.shortcut:
                of_shortcut = self._convolution(problem.depth, grad_y, source, norm_needed)
                gradient = _add(gradient, of_shortcut)
            if gradient is None:
                break
            gradient, _ = self._norm(i, gradient, mask)
        if not problem.shortcut:
            gradient = _add(gradient, grad_y)
        self.gradients[0] = _cast(gradient, self.x.dtype)

    def _needs(self, i: int) -> Sequence[bool]:
        """Of a layer's parameters."""
        return self.needs[SLOTS * i : SLOTS * (i + 1)]

    def _reaches(self, i: int) -> bool:
        """Whether a gradient goes on before layer i of the main branch."""
        return self.needs_x or any(self.needs[: SLOTS * i])

    def _before_norm(self, i: int) -> Tensor:
        """What norm i read."""
        if not self.problem.preactivation:
            return self._output(i)
        return self.x if i == 0 else self._output(i - 1)

    def _output(self, i: int) -> Tensor:
        """What convolution i gave to a norm."""
        if self._outputs[i] is None:
            self._outputs[i] = _convolve(self.problem, i, self._source(i), self.parameters)
        return self._outputs[i]

    def _source(self, i: int) -> Tensor:
        """What convolution i, which is not the shortcut of a pre-activation block, read."""
        if self.problem.preactivation:
            return self._activation(i)[0]
        if i == self.problem.depth:
            return self.x if self.skip is None else self.skip
        return self.x if i == 0 else self._activation(i - 1)[0]

    def _take_activation(self, i: int) -> tuple[Tensor, Tensor]:
        """`_activation` of i for the last time."""
        found = self._activation(i)
        self._recomputed.pop(i, None)
        return found

    def _activation(self, i: int) -> tuple[Tensor, Tensor]:
        """What norm i of the main branch gave, with its ReLU, and the mask of the latter."""
        if not self.problem.recompute:
            return self.saved.activations[i], self.saved.masks[i]
        if i not in self._recomputed:
            problem = self.problem
            x = self._before_norm(i)
            weight, bias = self.parameters[SLOTS * i + 2 : SLOTS * i + 4]
            self._recomputed[i] = self.passes.reapply(
                x, weight, bias, self.statistics[i], problem.ghosts, True, problem.eps[i], problem.lead_rows
            )
        return self._recomputed[i]

    def _norm(
        self, i: int, grad_y: Tensor, mask: Tensor | None, keep: Tensor | None = None, residual: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of what norm i read and of what was added; those of its parameters are put down."""
        problem, x, place = self.problem, self._before_norm(i), SLOTS * i + 2
        frozen, relu = self.parameters[place + 2] is not None, mask is not None
        if mask is None:
            mask = x.new_empty(0, dtype=torch.uint8)
        gradient, added, grad_weight, grad_bias = self.passes.backward(
            _cast(grad_y, x.dtype), x, self.parameters[place], self.statistics[i], mask, keep,
            problem.ghosts, relu, problem.eps[i], frozen, residual, problem.lead_rows,
        )  # fmt: skip
        for j, value in ((place, grad_weight), (place + 1, grad_bias)):
            if self.needs[j]:
                self.gradients[3 + j] = _cast(value, self.parameters[j].dtype)
        return gradient, added

    def _convolution(self, i: int, grad_y: Tensor, x: Tensor, needs_x: bool) -> Tensor | None:
        """The gradient of what convolution i read; those of its parameters are put down."""
        place = SLOTS * i
        needs_weight, needs_bias = self.needs[place : place + 2]
        if not (needs_x or needs_weight or needs_bias):
            return None
        x, weight, bias = _of_convolution(self.problem, x, self.parameters, i)
        stride, padding, dilation, groups = self.problem.convolutions[i]
        grad_x, grad_weight, grad_bias = _convolution_backward(
            grad_y, x, weight, None if bias is None else bias.shape, stride, padding, dilation,
            False, (0, 0), groups, (needs_x, needs_weight, needs_bias),
        )  # fmt: skip
        if needs_weight:
            self.gradients[3 + place] = _cast(grad_weight, self.parameters[place].dtype)
        if needs_bias:
            self.gradients[4 + place] = _cast(grad_bias, self.parameters[place + 1].dtype)
        return grad_x if needs_x else None


def _convolve(problem: Problem, i: int, x: Tensor, parameters: Tensors) -> Tensor:
    x, weight, bias = _of_convolution(problem, x, parameters, i)
    stride, padding, dilation, groups = problem.convolutions[i]
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def _of_convolution(problem: Problem, x: Tensor, parameters: Tensors, i: int) -> Tensors:
    """Input, weight and bias in the dtype in which convolution i runs."""
    weight, bias = parameters[SLOTS * i : SLOTS * i + 2]
    dtype = problem.dtype
    if dtype is None:
        return x, weight, bias
    return _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)


def _normalize(
    passes: Passes,
    problem: Problem,
    i: int,
    x: Tensor,
    parameters: Tensors,
    updates: Updates,
    relu: bool = True,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, statistics and mask of norm i."""
    weight, bias, mean, var = parameters[SLOTS * i + 2 : SLOTS * i + 6]
    momentum, counter = None, None
    if updates[i] is not None:
        mean, var, momentum, counter = updates[i]
    results = passes.forward(
        x, weight, bias, residual, keep, mean, var,
        problem.ghosts, relu, problem.eps[i], problem.lead_rows, momentum,
    )  # fmt: skip
    updates[i] = None
    if counter is not None:
        counter.add_(1)
        torch.autograd.graph.increment_version((counter,))  # which the dispatcher leaves out here
    return results


def _dropped(problem: Problem, keep: Tensor | None, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the ghost batches of x, each with whether it is dropped, as a tensor."""
    if keep is None:
        return
    lead = x.shape[0] // problem.ghosts if problem.lead_rows is None else problem.lead_rows
    rest = (x.shape[0] - lead) // max(problem.ghosts - 1, 1)
    yield from zip(x.split([lead, *[rest] * (problem.ghosts - 1)]), (~keep).unbind(), strict=True)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def _add(gradient: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum, in memory of the first, which is this pass's own."""
    if gradient is None or other is None:
        return other if gradient is None else gradient
    return gradient.add_(other)
