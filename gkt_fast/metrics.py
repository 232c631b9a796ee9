"""Means over an epoch, kept on the device until they are read."""

from __future__ import annotations

from typing import Any

import torch

from .config import GKTConfig
from .gkt import GKTOutput

__all__ = ["EpochMetrics"]


class EpochMetrics:
    """Running sums of the loss, the cross entropy and each group's distillation term.

    Args:
        config: gives the number of groups and loops.
        device: where the sums live.
    """

    def __init__(self, config: GKTConfig, device: torch.device) -> None:
        self._groups = config.groups if config.train_full else 0
        self._sums = torch.zeros(2 + self._groups, dtype=torch.float64, device=device)
        self._non_finite_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._steps = 0

    def update(self, output: GKTOutput, step: int) -> None:
        """Adds a step's numbers, without reading them."""
        groups = output.kd.reshape(-1, self._groups).mean(0) if self._groups else output.kd
        self._sums += torch.cat([torch.stack([output.loss, output.ce]), groups])
        first = (self._non_finite_step < 0) & ~torch.isfinite(output.loss)
        self._non_finite_step = torch.where(first, step, self._non_finite_step)
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Reads the means so far: train_loss, train_ce, and kd_group1, ... per group."""
        names = ["train_loss", "train_ce", *(f"kd_group{g + 1}" for g in range(self._groups))]
        return dict(zip(names, (self._sums / max(self._steps, 1)).tolist(), strict=True))

    def first_non_finite_step(self) -> int | None:
        """Reads the first step whose loss was NaN or infinite; None: all were finite."""
        step = int(self._non_finite_step)
        return None if step < 0 else step

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint in the middle of an epoch."""
        return {"sums": self._sums, "non_finite_step": self._non_finite_step, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums = state["sums"].to(self._sums.device)
        self._non_finite_step = state["non_finite_step"].to(self._sums.device)
        self._steps = state["steps"]
