"""A residual block's passes on the native backends of its norms, with nothing of Python between convolutions and norms.

The native module calls torch's convolutions through libtorch's C interface, which it finds at run time. What that is
not for runs by `passes`: norms before convolutions, 1x1 convolutions that are computed again, norms with running
statistics, layouts and dtypes that would need copies of parameters.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..ghost_batch_norm.native import CppBackend, CudaBackend
from ..native import DTYPES
from .problem import Problem

__all__ = ["native_backward", "native_forward"]

logger = logging.getLogger("gkt_fast")

_NATIVE = (CppBackend, CudaBackend)

_handles = getattr(getattr(torch._C, "_aoti", None), "unsafe_alloc_void_ptrs_from_tensors", None)
_tensors = getattr(getattr(torch._C, "_aoti", None), "alloc_tensors_by_stealing_from_void_ptrs", None)


def native_forward(
    backend: Any,
    problem: Problem,
    x: Tensor,
    skip: Tensor | None,
    keep: Tensor | None,
    parameters: Sequence[Tensor | None],
    updates: list[tuple[Tensor, Tensor, float] | None] | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """As `passes.forward`, what is saved as a list; None where the backend isn't native, or the block not for it."""
    found = _find_block(backend, problem)
    if found is None:
        return None
    block, norms = found
    given = [x, skip, keep, *parameters]
    asked = [] if updates is None else [update for update in updates if update is not None]
    for mean, var, _ in asked:
        given += mean, var
    left = [None] * len(problem.convolutions) if updates is None else updates
    results = backend.call(block, "forward", x, given, _handles([t for t in given if t is not None]), left)
    if asked:
        kept = {id(update) for update in left if update is not None}
        written = [t for update in asked if id(update) not in kept for t in update[:2]]
        torch.autograd.graph.increment_version(written)
    if results is None:
        return None
    y, *rest = _tensors(results)
    return y, rest[:norms], rest[norms:]


def native_backward(
    backend: Any,
    problem: Problem,
    grad_y: Tensor,
    x: Tensor,
    skip: Tensor | None,
    keep: Tensor | None,
    parameters: Sequence[Tensor | None],
    statistics: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None] | None:
    """As `passes.backward`, of what is saved as a list; None where `native_forward` has None."""
    found = _find_block(backend, problem)
    if found is None:
        return None
    given = [x, skip, keep, *parameters, grad_y, *statistics, *saved]
    results = backend.call(
        found[0], "backward", x, given, _handles([t for t in given if t is not None]), needs
    )
    if results is None:
        return None
    places, results = results
    gradients: list[Tensor | None] = [None] * len(needs)
    for place, gradient in zip(places, _tensors(results), strict=True):
        gradients[place] = gradient
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
    if not _finds_torch(native):
        return None
    geometry, eps, shortcut, _, ghosts, lead_rows, recompute, _, dtype = problem.flatten()
    number = None if dtype is None else DTYPES[dtype]
    block = native.ResidualBlock(geometry, eps, shortcut, ghosts, lead_rows, recompute, number)
    return block, sum(e is not None for e in problem.eps)


@functools.cache
def _finds_torch(native: ModuleType) -> bool:
    """Whether the native module can call this torch; said once where it can't."""
    folder = Path(torch.__file__).parent / "lib"
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    cpu, cuda = (folder / f"libtorch_{device}{suffix}" for device in ("cpu", "cuda"))
    missing: str | None = "torch._C._aoti"
    if _handles is not None and _tensors is not None:
        missing = native.load_torch(str(cpu), str(cuda) if cuda.exists() else None)
    if missing is not None:
        logger.info("residual blocks are run by Python, which takes longer: this torch has no %s", missing)
    return missing is None
