"""Means over an epoch, kept on the device until they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import GKTConfig
from .distributed import reduce_min, reduce_sum, world_size
from .gkt import GKTOutput

__all__ = ["EpochMetrics"]


class EpochMetrics:
    """Running sums of the loss, the cross entropy and each group's distillation term.

    Every rank of a distributed run adds its own steps; what is read is over all ranks, so all read at the same time.

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
        return dict(zip(names, (self._sums_of_all() / max(self._steps, 1)).tolist(), strict=True))

    def first_non_finite_step(self) -> int | None:
        """Reads the first step whose loss was NaN or infinite; None: all were finite."""
        never = torch.iinfo(torch.int64).max
        step = int(reduce_min(self._non_finite_step.masked_fill(self._non_finite_step < 0, never)))
        return None if step == never else step

    def _sums_of_all(self) -> Tensor:
        """The sums, averaged over the ranks, which have done as many steps each."""
        return reduce_sum(self._sums) / world_size()

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint in the middle of an epoch."""
        return {"sums": self._sums_of_all(), "non_finite_step": self._non_finite_step, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums = state["sums"].to(self._sums.device)
        self._non_finite_step = state["non_finite_step"].to(self._sums.device)
        self._steps = state["steps"]
