"""Whether a batch can be remembered by sample (`knowledge="dataset"`): the checks of what `GKT` is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .memory import GroupKnowledgeMemory

__all__ = ["check_remembered"]


def check_remembered(
    memory: GroupKnowledgeMemory | None,
    indices: Any,
    targets: Any,
    *,
    rows: int | None,
    groups: int,
    training: bool,
) -> None:
    """Checks that there is a memory, and that the rows of a batch are samples whose indices are known.

    Args:
        memory: what is attached to the `GKT`.
        indices: (B,) int64.
        targets: of the batch.
        rows: B.
        groups: of the configuration.
        training: whether the memory is written, too. Otherwise it and the indices may be missing.

    Raises:
        TypeError: indices is not an int64 tensor.
        ValueError: the memory or indices are missing, there isn't one index for each row, or targets are mixed, as
            mixup and cutmix do. On a GPU the last is a device-side assertion.
    """
    if training and memory is None:
        raise ValueError(
            "knowledge is 'dataset' and no memory is attached; set gkt.memory = GroupKnowledgeMemory(samples, classes, "
            f"groups={groups}), for as many samples as the data set has"
        )
    if training and indices is None:
        raise ValueError(
            "indices is None and knowledge is 'dataset'; it must hold the samples' places in the data set, as "
            "gkt_fast.data.Indexed(dataset) gives them. Or use knowledge='batch'"
        )
    if indices is not None:
        _check_indices(indices, rows)
        _check_unmixed(targets)


def _check_indices(indices: Any, rows: int | None) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(
            f"indices is {kind}; it must be an int64 tensor (B,), the samples' places in the data set"
        )
    if indices.dim() != 1 or (rows is not None and len(indices) != rows):
        raise ValueError(f"indices has shape {tuple(indices.shape)}; it must be ({rows},), one for each row")


def _check_unmixed(targets: Any) -> None:
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return
    mixed = ((targets != 0) & (targets != 1)).any()
    if mixed.device.type != "cpu":
        torch._assert_async(~mixed)
    elif mixed:
        raise ValueError(
            "targets hold shares of classes between 0 and 1, as mixup and cutmix make them; with knowledge='dataset' a "
            "row must be one training sample, since a mixed image has no past. Train without mixing (and smooth by "
            "label_smoothing), or use knowledge='batch'"
        )
