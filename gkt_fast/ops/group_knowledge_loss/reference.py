"""`group_knowledge_loss` in plain torch: stream by stream, as a function that autograd differentiates, as a backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..library import differentiable
from .checks import check_full_logits, check_streams, check_tensors, check_values
from .class_indices import check_class_indices
from .options import LossOptions, lists_options, loss_options
from .problem import Problem

__all__ = ["GroupKnowledge", "Past", "TorchBackend", "group_knowledge_loss_reference"]


class Past(NamedTuple):
    """What the rows of a batch know of a group from earlier steps.

    Args:
        knowledge: (B, C), floating point, finite.
        known: (B,) bool: the rows that know anything.
    """

    knowledge: Tensor
    known: Tensor


@lists_options
class GroupKnowledge:
    """The loss one stream at a time, in plain torch: the terms, and the knowledge that they leave behind.

    Made anew for each training step. Logits here are one stream's: (B, C, *spatial), those of subnets also (m, C,
    *spatial), the first m of the batch. Low precision is computed in float32. The weights of the terms, `groups` and
    `loops` are left to the caller:

        knowledge = GroupKnowledge(ema=0.5)
        loss = ce_weight * knowledge.full(logits, targets)
        loss += kd_weight * knowledge.subnet(logits, targets, group=1)      # and so on, in stream order

    With a past, what groups know outlives the step. A group goes on from what it knew of a row, `ema * K_g +
    (1 - ema) * n(z)`, and where it knew nothing takes n(z) as it is; a subnet learns from the group above it as that
    stands then, in this step's streams and before, and where that knows nothing of a row, from the full network.

    Args:
        options: the options of the loss; None: the defaults.
        past: what the batch's rows know of each group from earlier steps; a group without an entry, or with None, is
            known to no row. None: nothing outlives a step, and streams come group by group.
        fields: fields of `LossOptions` that replace those of `options`.

    Raises:
        TypeError: an option has the wrong type, or there is none of that name.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        options: LossOptions | None = None,
        past: Mapping[int, Past | None] | None = None,
        **fields: int | float | bool | str,
    ) -> None:
        self.options = loss_options(options, **fields)
        self._past = past
        self._knowledge: dict[int, Tensor] = {}

    def learnt(self) -> dict[int, Tensor]:
        """What each group that was visited knows now, detached, by group: as many rows as its subnets had."""
        return {group: knowledge for group, knowledge in self._knowledge.items() if group}

    def full(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Stores the full network's knowledge and returns its cross entropy, a scalar, not weighted."""
        ce = self.cross_entropy(logits, targets)
        check_values(logits, targets, self.options.normalize_logits, class_dim=1)
        self.teach(logits)
        return ce

    def teach(self, logits: Tensor) -> None:
        """Stores the full network's knowledge alone."""
        self._knowledge[0] = self._normalized(logits.detach())

    def subnet(self, logits: Tensor, targets: Tensor, group: int) -> Tensor:
        """Returns kd of a subnet of `group` against group - 1, a scalar, not weighted; updates K_group.

        The subnet's logits may be of the first m of the batch. The mean is then over them, and of the teacher and of
        targets for the whole batch the first m are taken.

        Raises:
            ValueError: `group` isn't positive, nothing was stored yet for the group before it, or it was stored for
                fewer than m of the batch.
        """
        above = group - 1 if self._past is None else 0
        if group < 1 or above not in self._knowledge:
            raise ValueError(
                f"group is {group}; it must be at least 1, and a stream of group {above} must come first"
            )
        teacher = self._teacher(group - 1)
        if isinstance(targets, Tensor) and targets.shape[:1] == self._knowledge[0].shape[:1]:
            targets = targets[: logits.shape[0]]
        check_tensors(logits, targets, self.options.ignore_index, class_dim=1)
        check_values(logits, targets, self.options.normalize_logits, class_dim=1)
        if teacher.shape[0] < logits.shape[0]:
            raise ValueError(
                f"logits has a batch of {logits.shape[0]}; it must be at most that of group {group - 1}, "
                f"{teacher.shape[0]}"
            )
        normalized = self._normalized(logits)
        log_p = self._log_soft_labels(teacher[: logits.shape[0]])
        log_q = self._log_soft_labels(normalized)
        divergence = _divergence(log_p, log_q)
        if self.options.distill_ignored or targets.is_floating_point():
            kd = divergence.mean()
        else:
            counts = targets != self.options.ignore_index
            kd = torch.where(counts, divergence, 0.0).sum() / counts.sum()
        self._update(group, normalized.detach())
        return kd * self.options.temperature**2

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy of raw logits with this loss's options, a scalar."""
        check_tensors(logits, targets, self.options.ignore_index, class_dim=1)
        wrong = None
        if targets.is_floating_point():
            check_values(logits, targets, False, class_dim=1)
            targets = targets.to(accumulation_dtype(logits.dtype))
        else:
            targets, wrong = check_class_indices(targets, logits.shape[1], self.options.ignore_index)
        ce = F.cross_entropy(
            logits.to(accumulation_dtype(logits.dtype)),
            targets,
            ignore_index=self.options.ignore_index,
            label_smoothing=self.options.label_smoothing,
        )
        return ce if wrong is None else ce * torch.where(wrong, math.nan, 1.0)  # of its gradient too

    def _log_soft_labels(self, knowledge: Tensor) -> Tensor:
        """(B, C, *spatial); with sigmoids (B, 2 C, *spatial): of every class that it is there, then that it isn't.

        The Bernoulli divergences of the classes are then one sum over dimension 1, whose soft labels sum to C.
        """
        scaled = knowledge / self.options.temperature
        if self.options.distillation == "softmax":
            return F.log_softmax(scaled, dim=1)
        return torch.cat([F.logsigmoid(scaled), F.logsigmoid(-scaled)], dim=1)

    def _normalized(self, logits: Tensor) -> Tensor:
        logits = logits.to(accumulation_dtype(logits.dtype))
        if not self.options.normalize_logits:
            return logits
        centered = logits - logits[:, :1].detach()  # exact for equal logits, whatever their size
        centered = centered - centered.mean(dim=1, keepdim=True)
        slope = (centered.square().mean(dim=1, keepdim=True) + self.options.eps).rsqrt()
        # A variance that overflows must not pass for an infinite one, which would leave no logits.
        return centered * torch.where(slope > 0, slope, math.nan)

    def _teacher(self, group: int) -> Tensor:
        """What a group knows now, of every row; of rows that it doesn't know, what the full network does."""
        if group in self._knowledge:
            return self._knowledge[group]
        full, past = self._knowledge[0], (self._past or {}).get(group)
        return full if past is None else _where_known(past, past.knowledge[: len(full)].to(full), full)

    def _update(self, group: int, normalized: Tensor) -> None:
        old, past = self._knowledge.get(group), None
        if old is None:
            past = (self._past or {}).get(group)
            old = None if past is None else past.knowledge[: len(normalized)].to(normalized)
        new = normalized if old is None else self._average(old, normalized)
        self._knowledge[group] = new if past is None else _where_known(past, new, normalized)

    def _average(self, old: Tensor, new: Tensor) -> Tensor:
        ema = self.options.ema
        if ema in (0, 1):  # without a trace of the other, which may not be finite
            return old if ema else new
        return ema * old + (1 - ema) * new


@lists_options
def group_knowledge_loss_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    full_logits: Tensor | None = None,
    options: LossOptions | None = None,
    **fields: int | float | bool | str,
) -> tuple[Tensor, Tensor]:
    """`group_knowledge_loss` in plain torch: same arguments and results, differentiated by autograd."""
    o = loss_options(options, **fields)
    check_streams(logits, o.groups, o.loops, full_logits)
    if full_logits is None:
        full_logits, logits = logits[0], logits[1:]
    else:
        check_full_logits(full_logits, logits)
    knowledge = GroupKnowledge(options=o)
    terms = [knowledge.full(full_logits, targets)]
    weighted = [o.ce_weight * terms[0]] if o.ce_weight else []
    targets = targets[: logits.shape[1]]
    for index, subnet in enumerate(logits):
        terms.append(knowledge.subnet(subnet, targets, group=index % o.groups + 1))
        if o.kd_weight:
            weighted.append(o.kd_weight * terms[-1])
        if o.subnet_ce_weight:
            weighted.append(o.subnet_ce_weight * knowledge.cross_entropy(subnet, targets))
    loss = torch.stack(weighted).sum() if weighted else 0.0 * terms[0].nan_to_num(0.0, 0.0, 0.0)
    return loss, torch.stack(terms).detach()


class TorchBackend:
    """The reference, and autograd's gradient of it."""

    def forward(
        self,
        problem: Problem,
        logits: Tensor,
        targets: Tensor,
        full_logits: Tensor | None,
        loss: Tensor,
        terms: Tensor,
        gradient: Tensor | None,
        full_gradient: Tensor | None,
    ) -> None:
        if gradient is None:
            results = group_knowledge_loss_reference(
                logits, targets, full_logits=full_logits, options=problem.options
            )
        else:
            given = [tensor for tensor in (logits, full_logits) if tensor is not None]
            with differentiable():
                leaves = [tensor.detach().requires_grad_() for tensor in given]
                results = group_knowledge_loss_reference(
                    leaves[0],
                    targets,
                    full_logits=leaves[1] if len(leaves) == 2 else None,
                    options=problem.options,
                )
                scale = results[0].new_full((), problem.gradient_scale)
                exact = torch.autograd.grad(results[0], leaves, scale, materialize_grads=True)
            for written, values in zip((gradient, full_gradient), exact, strict=False):
                written.copy_(values)
        loss.copy_(results[0].detach())
        terms.copy_(results[1])


def _where_known(past: Past, knowledge: Tensor, otherwise: Tensor) -> Tensor:
    known = past.known[: len(knowledge)].to(knowledge.device)
    return torch.where(known[:, None], knowledge, otherwise)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_c p (log p - log q) over dimension 1, taken as sum_c (q - p - p (log q - log p)), since sum_c (q - p) = 0.

    All summands are positive and errors of log p and log q cancel to first order: small divergences stay
    accurate.
    """
    p, difference = log_p.exp(), log_q - log_p
    near = difference.abs() < 1
    change = torch.where(near, p * torch.expm1(torch.where(near, difference, 0.0)), log_q.exp() - p)
    return (change - torch.where(p == 0, 0.0, p * difference)).sum(dim=1)  # 0 log 0 = 0
