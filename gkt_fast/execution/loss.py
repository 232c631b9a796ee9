"""The loss of a step: the fused op, or a criterion of one's own beside the op's distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import GroupKnowledge, LossOptions, group_knowledge_loss
from ..subnets.streams import Streams
from .share import Share

__all__ = ["distillation_options", "joint_loss", "no_targets", "target_loss"]


def joint_loss(
    logits: Tensor,
    targets: Any,
    streams: Streams,
    full_logits: Tensor | None = None,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of all streams together.

    Args:
        logits: (S, B, C, *spatial); with a share those of the subnets, (S - 1, m, C, *spatial).
        targets: as the criterion takes them.
        streams: of the step.
        full_logits: with a share those of the full network, (B, C, *spatial).
        share: the rows that subnets see; None: all.

    Returns:
        The loss, a scalar, and the terms (S,), detached: the full network's term of the targets, then each subnet's
        distillation term.
    """
    options = LossOptions.from_config(streams.config)
    if streams.criterion is None:
        return group_knowledge_loss(logits, targets, full_logits=full_logits, options=options)
    full, subnets = (logits[0], logits[1:]) if full_logits is None else (full_logits, logits)
    loss, terms = group_knowledge_loss(
        logits, no_targets(full), full_logits=full_logits, options=distillation_options(options)
    )
    value = target_loss(full, targets, streams).to(loss.dtype)
    if options.ce_weight:
        loss = loss + options.ce_weight * value
    if options.subnet_ce_weight:
        targets = targets if share is None else share.cut_targets(targets)
        for subnet in subnets:
            loss = loss + options.subnet_ce_weight * target_loss(subnet, targets, streams)
    return loss, torch.cat([value.detach().reshape(1), terms[1:]])


def target_loss(logits: Tensor, targets: Any, streams: Streams) -> Tensor:
    """What one stream's logits (B, C, *spatial) lose on the targets, a scalar, not weighted.

    Raises:
        TypeError, ValueError: the criterion returns no scalar.
    """
    if streams.criterion is None:
        return GroupKnowledge(options=LossOptions.from_config(streams.config)).cross_entropy(logits, targets)
    value = streams.criterion(logits, targets)
    if not isinstance(value, Tensor):
        raise TypeError(f"criterion returned {type(value).__name__}; it must be a tensor without dimensions")
    if value.dim():
        raise ValueError(
            f"criterion returned a tensor of shape {tuple(value.shape)}; it must be a scalar, the mean over the batch"
        )
    return value


def distillation_options(options: LossOptions) -> LossOptions:
    """The same without the terms of targets."""
    return replace(options, ce_weight=0.0, subnet_ce_weight=0.0)


def no_targets(logits: Tensor) -> Tensor:
    """Class indices that the op can take where it is asked for no term of them."""
    return torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device=logits.device)
