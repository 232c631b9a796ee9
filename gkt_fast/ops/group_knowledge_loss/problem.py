"""What a backend of `group_knowledge_loss` is told besides tensors, and what it fills."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype
from .options import LossOptions

__all__ = ["Problem", "outputs"]


class Problem(NamedTuple):
    """`gradient_scale` is the power of two by which the stored gradient is multiplied (`op._gradient_scale`)."""

    options: LossOptions
    gradient_scale: float


def outputs(
    logits: Tensor, full_logits: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the loss, the terms (S,), and the loss's gradients by `logits` and `full_logits`.

    The gradients have the shapes of what they belong to; one that is not wanted is empty.
    """
    dtype = accumulation_dtype(logits.dtype)
    streams = logits.shape[0] + (full_logits is not None)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(streams, dtype=dtype),
        torch.empty_like(logits) if with_gradient else logits.new_empty(0),
        torch.empty_like(full_logits) if with_gradient and full_logits is not None else logits.new_empty(0),
    )
