"""Gradient checkpointing, as far as libraries tell of it."""

from __future__ import annotations

from torch import nn

__all__ = ["checkpoints_activations"]

SWITCHES = ("grad_checkpointing", "gradient_checkpointing")
"""Attributes of modules that timm and transformers set where activations are to be recomputed during backward."""


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether a module of timm or transformers is told to checkpoint and would do so now, in training.

    Checkpoints of one's own can't be seen before they run.
    """
    return model.training and any(
        getattr(module, name, False) is True for module in model.modules() for name in SWITCHES
    )
