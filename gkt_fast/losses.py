"""Module faces of the losses."""

from __future__ import annotations

from torch import Tensor, nn

from .ops import group_knowledge_loss

__all__ = ["GroupKnowledgeLoss"]


class GroupKnowledgeLoss(nn.Module):
    """`group_knowledge_loss` with its hyper-parameters kept; the arguments have its names and defaults.

    `forward(logits, targets)` returns the loss and the terms, for logits (S, B, C, *spatial).

    Raises:
        TypeError, ValueError: as `group_knowledge_loss`, when called.
    """

    def __init__(
        self,
        *,
        groups: int = 3,
        loops: int = 1,
        ema: float = 0.5,
        temperature: float = 1.0,
        normalize_logits: bool = False,
        eps: float = 1e-7,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        subnet_ce_weight: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        distill_ignored: bool = True,
    ) -> None:
        super().__init__()
        self.options = {
            "groups": groups,
            "loops": loops,
            "ema": ema,
            "temperature": temperature,
            "normalize_logits": normalize_logits,
            "eps": eps,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "subnet_ce_weight": subnet_ce_weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "distill_ignored": distill_ignored,
        }

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return group_knowledge_loss(logits, targets, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
