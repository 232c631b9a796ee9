"""A residual block's passes on the native backends of its norms, with nothing of Python between convolutions and norms.

The native module calls torch's convolutions through libtorch's C interface, which it finds at run time. What that is
not for runs by `passes`: norms before convolutions, 1x1 convolutions that are computed again, norms with running
statistics, layouts and dtypes that would need copies of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..ghost_batch_norm.native import CppBackend, CudaBackend
from ..native import DTYPES
from ..native_tensors import finds_torch, handles_of, tensors_of
from .passes import Updates
from .problem import Problem

__all__ = ["native_backward", "native_forward"]

_NATIVE = (CppBackend, CudaBackend)


def native_forward(
    backend: Any,
    problem: Problem,
    inputs: Sequence[Tensor | None],
    updates: Updates | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """As `passes.forward`, of x, skip, keep and the parameters, what is saved as a list; None where the backend isn't
    native, or the block not for it."""
    found = _find_block(backend, problem)
    if found is None:
        return None
    block, norms = found
    given = [*inputs]
    asked = [] if updates is None else [update for update in updates if update is not None]
    for update in asked:
        given += update.mean, update.var, update.counter
    left = [None] * len(problem.convolutions) if updates is None else updates
    handles = handles_of([t for t in given if t is not None])
    results = backend.call(block, "forward", inputs[0], given, handles, left)
    if asked:
        kept = {id(update) for update in left if update is not None}
        done = [update for update in asked if id(update) not in kept]
        written = [t for update in done for t in (update.mean, update.var, update.counter) if t is not None]
        torch.autograd.graph.increment_version(written)
    if results is None:
        return None
    y, *rest = tensors_of(results)
    return y, rest[:norms], rest[norms:]


def native_backward(
    backend: Any,
    problem: Problem,
    grad_y: Tensor,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None] | None:
    """As `passes.backward`, of the inputs, statistics and what is saved in one list; None where `native_forward` has
    None."""
    found = _find_block(backend, problem)
    if found is None:
        return None
    given = [grad_y, *tensors]
    handles = handles_of([t for t in given if t is not None])
    results = backend.call(found[0], "backward", grad_y, given, handles, needs)
    if results is None:
        return None
    places, results = results
    gradients: list[Tensor | None] = [None] * len(needs)
    for place, gradient in zip(places, tensors_of(results), strict=True):
        gradients[place] = gradient
    x, skip = tensors[:2]
    of_x, of_residual = gradients[:2]
    if skip is None:
        of_x = of_residual if of_x is None else of_x if of_residual is None else of_x.add_(of_residual)
        gradients[1] = None
    elif of_residual is not None and of_residual.dtype is not skip.dtype:
        gradients[1] = of_residual.to(skip.dtype)
    gradients[0] = of_x if of_x is None or of_x.dtype is x.dtype else of_x.to(x.dtype)
    return gradients


def _find_block(backend: Any, problem: Problem) -> tuple[Any, int] | None:
    """The block as a native module holds it, and how many norms it has; None where it doesn't run there."""
    if type(backend) not in _NATIVE or problem.preactivation or problem.pointwise:
        return None
    return _prepare(backend.native, problem)


@functools.lru_cache(maxsize=4096)
def _prepare(native: ModuleType, problem: Problem) -> tuple[Any, int] | None:
    if not finds_torch(native):
        return None
    geometry, eps, shortcut, _, ghosts, lead_rows, recompute, _, dtype = problem.flatten()
    number = None if dtype is None else DTYPES[dtype]
    block = native.ResidualBlock(geometry, eps, shortcut, ghosts, lead_rows, recompute, number)
    return block, sum(e is not None for e in problem.eps)
