"""Module faces of the losses."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import LossOptions, group_knowledge_loss
from .ops.group_knowledge_loss import lists_options

__all__ = ["GroupKnowledgeLoss", "NormalizedCrossEntropy"]


@lists_options
class GroupKnowledgeLoss(nn.Module):
    """`group_knowledge_loss` with its options kept; the arguments have its names and defaults.

    `forward(logits, targets, full_logits=None)` returns the loss and the terms, for logits (S, B, C, *spatial).

    Raises:
        TypeError, ValueError: an option is wrong, see `gkt_fast.ops.LossOptions`.
    """

    def __init__(self, **fields: int | float | bool | str) -> None:
        super().__init__()
        self.options = LossOptions(**fields)

    def forward(
        self, logits: Tensor, targets: Tensor, full_logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return group_knowledge_loss(logits, targets, full_logits=full_logits, options=self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self.options).items())


class NormalizedCrossEntropy(nn.Module):
    """Cross entropy of logits that are standardised over the classes, as in the code of Stimulative Training.

    For GKT's `criterion`; the code pairs it with distillation between standardised logits (`normalize_logits=True`).

    Args:
        label_smoothing: as in torch's cross_entropy.
        ignore_index: rows of this target count neither in the sum nor in its mean.
        eps: added to the variance, which is biased.

    Raises:
        ValueError: label_smoothing is outside of [0, 1].
    """

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int = -100, eps: float = 1e-7) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1]")
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.eps = eps

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        centered = logits - logits.mean(dim=1, keepdim=True)
        normalized = centered * (centered.square().mean(dim=1, keepdim=True) + self.eps).rsqrt()
        return F.cross_entropy(
            normalized, targets, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )
