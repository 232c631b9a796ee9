"""A step without subnets (`groups=0`): plain training, bit for bit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import GroupKnowledge
from .states import logits_of
from .step import Network, StepResult, Streams, knowledge_options

__all__ = ["run_plain"]


def run_plain(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs the full network alone. `loss_scale` is not needed: backward comes later."""
    logits = logits_of(network.model(*inputs))
    ce = GroupKnowledge(**knowledge_options(streams.config)).cross_entropy(logits, targets)
    weight = streams.config.ce_weight
    return StepResult(ce if weight == 1.0 else weight * ce, ce.detach().reshape(1), logits.detach())
