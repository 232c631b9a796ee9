"""The loss of one stream at a time, for modes that run backward before the next stream."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ops import GroupKnowledge, LossOptions
from ..subnets.streams import Streams
from .loss import no_targets, target_loss
from .share import Share

__all__ = ["StreamLoss"]


class StreamLoss:
    """Walks the streams; keeps what they leave behind for each other.

    Args:
        streams: the streams of the step.
        targets: of the batch.
        share: the rows that subnets see; None: all.
    """

    def __init__(self, streams: Streams, targets: Any, share: Share | None) -> None:
        self.streams = streams
        self.targets = targets
        self._share = share
        self._knowledge = GroupKnowledge(options=LossOptions.from_config(streams.config))
        self._terms: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self.full_logits: Tensor | None = None

    def __call__(self, stream: int, logits: Tensor) -> Tensor:
        """The stream's weighted share of the loss, a scalar."""
        config = self.streams.config
        if stream == 0:
            self.full_logits = logits.detach()
            self._knowledge.teach(logits if self._share is None else self._share.cut(logits))
            term = target_loss(logits, self.targets, self.streams)
            loss = _weighted(config.ce_weight, term)
        else:
            own_criterion = self.streams.criterion is not None
            targets = no_targets(logits) if own_criterion else self._subnet_targets
            term = self._knowledge.subnet(logits, targets, self.streams.group(stream))
            loss = _weighted(config.kd_weight, term)
            if config.subnet_ce_weight:
                loss = loss + config.subnet_ce_weight * target_loss(
                    logits, self._subnet_targets, self.streams
                )
        self._terms[stream] = term.detach()
        self._losses[stream] = loss.detach()
        return loss

    @cached_property
    def _subnet_targets(self) -> Any:
        return self.targets if self._share is None else self._share.cut_targets(self.targets)

    def total(self) -> Tensor:
        """The loss of all streams, detached."""
        return torch.stack([self._losses[stream] for stream in sorted(self._losses)]).sum()

    def terms(self) -> Tensor:
        """(S,): the full network's term of the targets, then each subnet's distillation term."""
        return torch.stack([self._terms[stream] for stream in sorted(self._terms)])


def _weighted(weight: float, term: Tensor) -> Tensor:
    """The weighted term; with weight 0 it counts nothing, even where it is not a number."""
    return weight * term if weight else 0.0 * term.nan_to_num(0.0, 0.0, 0.0)
