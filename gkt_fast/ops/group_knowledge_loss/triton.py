"""Hands `group_knowledge_loss` to its Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import DEVICES, reporting_failures
from .checks import check_class_indices
from .problem import Problem

__all__ = ["DEVICES", "DTYPES", "TritonBackend"]

# Not float64: Triton passes numbers to kernels as float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend:
    """The Triton kernel."""

    def __init__(self) -> None:
        from gkt_fast.kernels.triton import group_knowledge_loss as kernel

        self._launch = reporting_failures(kernel.group_knowledge_loss)

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
        o = problem.options
        if targets.is_floating_point():
            targets = targets.float()
        else:
            check_class_indices(targets, logits.shape[2], o.ignore_index)
        # The kernel walks a batch and two spatial dimensions of any strides; more have to be adjacent.
        many = logits.dim() > 5
        if many:
            logits, targets = logits.contiguous(), targets.contiguous()
        written = torch.empty_like(logits) if many and gradient is not None else gradient
        with torch.cuda.device_of(logits):
            results = self._launch(
                logits,
                targets,
                written,
                groups=o.groups,
                ema=o.ema,
                temperature=o.temperature,
                normalize_logits=o.normalize_logits,
                eps=o.eps,
                ce_weight=o.ce_weight,
                kd_weight=o.kd_weight,
                subnet_ce_weight=o.subnet_ce_weight,
                ignore_index=o.ignore_index,
                label_smoothing=o.label_smoothing,
                distill_ignored=o.distill_ignored,
                gradient_scale=problem.gradient_scale,
            )
            loss.copy_(results[0])
            terms.copy_(results[1])
        if written is not gradient:
            gradient.copy_(written)
