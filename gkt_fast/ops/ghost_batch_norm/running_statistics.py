"""Running statistics of batch norms: what a norm updates, and the updates of many norms in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..library import runs_plain
from ..native_tensors import finds_torch, handles_of
from ..registry import select
from .native import CppBackend

__all__ = ["FoundStatistics", "RunningUpdate", "update_on_cpu"]


class RunningUpdate(NamedTuple):
    """Running statistics that a norm updates.

    Args:
        mean: running mean (C,), in the dtype of the norm's statistics; updated in place.
        var: running variance (C,), of the same dtype; updated in place.
        momentum: weight of the batch's statistics.
        counter: number of batches seen, an int64 in the CPU's memory, to which 1 is added; None: nothing is counted.
    """

    mean: Tensor
    var: Tensor
    momentum: float
    counter: Tensor | None


class FoundStatistics(NamedTuple):
    """What a norm found in one of m ghost batches.

    Args:
        mean: (m, C); or with the variance, (3, m, C), the first and the last.
        var: (m, C), or None for one tensor with the mean.
        ghost: which ghost batch.
        correction: what the variance is multiplied by to become unbiased.
    """

    mean: Tensor
    var: Tensor | None
    ghost: int
    correction: float


def update_on_cpu(found: Sequence[FoundStatistics], updates: Sequence[RunningUpdate]) -> bool:
    """Updates running statistics, each by what was found for it, in this order, by the C++ module in one call.

    r <- (1 - momentum) r + momentum * statistic.

    Returns:
        Whether that is done. It isn't, and nothing is, where norms run on another backend than "cpp", a tensor is of
        another dtype or layout than the module reads, or something else than torch's kernels sees what runs.
    """
    if not updates:
        return True
    first = found[0].mean
    backend = select("ghost_batch_norm", first.device, first.dtype) if first.is_cpu else None
    if type(backend) is not CppBackend or not finds_torch(backend.native):
        return False
    given = [
        tensor
        for statistics, update in zip(found, updates, strict=True)
        for tensor in (statistics.mean, statistics.var, update.mean, update.var, update.counter)
    ]
    if not runs_plain(*given):
        return False
    numbers = [(f.ghost, f.correction, u.momentum) for f, u in zip(found, updates, strict=True)]
    handles = handles_of([tensor for tensor in given if tensor is not None])
    if not backend.native.update_running_statistics(given, handles, numbers):
        return False
    written = [t for u in updates for t in (u.mean, u.var, u.counter) if t is not None]
    torch.autograd.graph.increment_version(written)
    return True
