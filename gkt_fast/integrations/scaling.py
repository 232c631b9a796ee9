"""Loss scaling of other people's loops, as `GKT` wants to know it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["loss_scale"]


def loss_scale(scaler: Any, device: torch.device | str) -> Tensor | None:
    """The factor by which a `GradScaler` scales losses, on the device; None: there is none, or it is switched off.

    The modes `sequential` and `lean` run backward inside the forward, where float16 gradients need it already.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=device))
