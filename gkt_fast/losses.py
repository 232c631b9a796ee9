"""Module faces of the losses."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from .ops import LossOptions, group_knowledge_loss
from .ops.group_knowledge_loss import lists_options

__all__ = ["GroupKnowledgeLoss"]


@lists_options
class GroupKnowledgeLoss(nn.Module):
    """`group_knowledge_loss` with its options kept; the arguments have its names and defaults.

    `forward(logits, targets)` returns the loss and the terms, for logits (S, B, C, *spatial).

    Raises:
        TypeError, ValueError: an option is wrong, see `gkt_fast.ops.LossOptions`.
    """

    def __init__(self, **fields: int | float | bool) -> None:
        super().__init__()
        self.options = LossOptions(**fields)

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return group_knowledge_loss(logits, targets, options=self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self.options).items())
