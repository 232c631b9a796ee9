"""Hands `group_knowledge_loss` to its Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import DEVICES, reporting_failures
from .class_indices import report_on
from .problem import Problem

__all__ = ["DEVICES", "DTYPES", "TritonBackend"]

# Not float64: Triton passes numbers to kernels as float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend:
    """The Triton kernels."""

    def __init__(self) -> None:
        from gkt_fast.kernels.triton import group_knowledge_loss as kernels

        self._kernels = kernels
        self._launch = reporting_failures(kernels.group_knowledge_loss)

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
        targets = targets.float() if targets.is_floating_point() else targets
        written = gradient, full_gradient
        if logits.dim() > 5:  # the kernel walks a batch and two spatial dimensions of any strides
            logits, targets = logits.contiguous(), targets.contiguous()
            full_logits = None if full_logits is None else full_logits.contiguous()
            gradient, full_gradient = (
                None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
                for tensor in written
            )
        if full_logits is None:
            full = self._kernels.Streams(logits[0], None if gradient is None else gradient[0])
            subnets = self._kernels.Streams(logits[1:], None if gradient is None else gradient[1:])
        else:
            full = self._kernels.Streams(full_logits, full_gradient)
            subnets = self._kernels.Streams(logits, gradient)
        with torch.cuda.device_of(logits):
            self._launch(
                full,
                subnets,
                targets,
                self._kernels.Results(loss, terms, report_on(logits)),
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
        for result, tensor in zip(written, (gradient, full_gradient), strict=True):
            if tensor is not result:
                result.copy_(tensor)
