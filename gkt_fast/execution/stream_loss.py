"""The loss of one stream at a time: for modes that run backward before the next stream, and wherever knowledge outlives
the step, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ops import GroupKnowledge, LossOptions
from ..subnets.streams import Streams
from .loss import joint_loss, no_targets, target_loss
from .share import Share

__all__ = ["StreamLoss", "step_loss"]


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
        past = streams.past
        if past is None and streams.config.chain == "steps":
            past = {}  # no subnet of the group above runs on this batch
        self._knowledge = GroupKnowledge(options=LossOptions.from_config(streams.config), past=past)
        self._terms: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self.full_logits: Tensor | None = None

    def __call__(self, stream: int, logits: Tensor) -> Tensor:
        """The stream's weighted share of the loss, a scalar."""
        config = self.streams.config
        if stream == 0:
            _check_samples(logits, self.streams)
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

    def learnt(self) -> dict[int, Tensor]:
        """What the groups that were visited know now of every row, where that outlives the step."""
        return {} if self.streams.past is None else self._knowledge.learnt()


def step_loss(
    logits: Sequence[Tensor],
    targets: Any,
    streams: Streams,
    full_logits: Tensor | None = None,
    share: Share | None = None,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """The loss of all streams, whose logits are at hand together.

    Args:
        logits: by stream, (B, C, *spatial) each; with a share those of the subnets, (m, C, *spatial) each.
        targets: as the criterion takes them.
        streams: of the step.
        full_logits: with a share those of the full network, (B, C, *spatial).
        share: the rows that subnets see; None: all.

    Returns:
        The loss, a scalar, the terms (S,), detached, and what was learnt, as `StepResult` holds them.
    """
    if streams.past is None:
        together = logits if isinstance(logits, Tensor) else torch.stack([*logits])
        return *joint_loss(together, targets, streams, full_logits, share), {}
    stream_loss = StreamLoss(streams, targets, share)
    by_stream = [*logits] if full_logits is None else [full_logits, *logits]
    loss = torch.stack([stream_loss(stream, z) for stream, z in enumerate(by_stream)]).sum()
    return loss, stream_loss.terms(), stream_loss.learnt()


def _check_samples(logits: Tensor, streams: Streams) -> None:
    """Checks that the logits can be remembered by sample.

    Raises:
        ValueError: they are dense, or have another number of classes than what is remembered.
    """
    if streams.past is None:
        return
    if logits.dim() != 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; knowledge='dataset' keeps (B, C), one prediction per sample. "
            "Use knowledge='batch' for dense predictions"
        )
    for past in streams.past.values():
        if past is not None and past.knowledge.shape[1] != logits.shape[1]:
            raise ValueError(
                f"logits have {logits.shape[1]} classes, shape {tuple(logits.shape)}; the memory of group knowledge "
                f"has {past.knowledge.shape[1]}"
            )


def _weighted(weight: float, term: Tensor) -> Tensor:
    """The weighted term; with weight 0 it counts nothing, even where it is not a number."""
    return weight * term if weight else 0.0 * term.nan_to_num(0.0, 0.0, 0.0)
