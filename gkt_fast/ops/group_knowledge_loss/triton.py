"""Hands `group_knowledge_loss` to its Triton kernel."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..triton_failures import reporting_failures
from .checks import check_class_indices

__all__ = ["DEVICES", "DTYPES", "load_triton"]

# Triton's interpreter runs kernels on CPU tensors.
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
# Not float64: Triton passes numbers to kernels as float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OPTIONS = (
    "groups",
    "ema",
    "temperature",
    "normalize_logits",
    "eps",
    "ce_weight",
    "kd_weight",
    "subnet_ce_weight",
    "ignore_index",
    "label_smoothing",
    "distill_ignored",
)


def load_triton() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The Triton kernel as a function of the torch.library op's arguments."""
    from gkt_fast.kernels.triton import group_knowledge_loss as kernel

    launch = reporting_failures(kernel.group_knowledge_loss)

    def forward(logits: Tensor, targets: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
        *options, with_gradient, gradient_scale = options
        if targets.is_floating_point():
            targets = targets.float()
        else:
            check_class_indices(targets, logits.shape[2], options[OPTIONS.index("ignore_index")])
        gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
        # The kernel walks a batch and two spatial dimensions of any strides; more have to be adjacent.
        many = logits.dim() > 5
        if many:
            logits, targets = logits.contiguous(), targets.contiguous()
        written = torch.empty_like(logits) if many and with_gradient else gradient
        with torch.cuda.device_of(logits):
            loss, terms = launch(
                logits,
                targets,
                written if with_gradient else None,
                gradient_scale=gradient_scale,
                **dict(zip(OPTIONS, options, strict=True)),
            )
        if written is not gradient:
            gradient.copy_(written)
        return loss, terms, gradient

    return forward
