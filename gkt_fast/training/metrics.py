"""Means over an epoch, kept on the device until they are read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..config import GKTConfig
from ..distributed import reduce_min, reduce_sum, world_size
from ..gkt import GKTOutput
from ..subnets.streams import first_group

__all__ = ["EpochMetrics"]


class EpochMetrics:
    """Running sums of the loss, the cross entropy and each group's distillation term.

    Every rank of a distributed run adds its own steps. What is read is over all ranks, so all must read together.

    Args:
        config: gives the number of groups and loops.
        device: where the sums live.
        skip_nonfinite: whether batches whose loss is NaN or infinite are left out of the means.
    """

    def __init__(self, config: GKTConfig, device: torch.device, skip_nonfinite: bool = False) -> None:
        self._config = config
        self._groups = config.groups if config.train_full else 0
        self._over_steps = config.chain == "steps" and self._groups > 0
        self._skip_nonfinite = skip_nonfinite
        counts = self._groups if self._over_steps else 0
        self._sums = torch.zeros(3 + self._groups + counts, dtype=torch.float64, device=device)
        """Loss, cross entropy, a distillation term for each group, the number of batches; where a step visits one
        group, the number of each group's batches too."""
        self._non_finite_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._non_finite_streams = torch.zeros(config.streams, dtype=torch.int64, device=device)

    def update(self, output: GKTOutput, step: int) -> None:
        """Adds a batch's numbers, without reading them."""
        finite, one = torch.isfinite(output.loss), torch.ones_like(output.loss)[None]
        groups, counts = output.kd, one
        if self._over_steps:
            group = first_group(self._config, step) - 1
            groups, visited = (F.pad(v, (group, self._groups - 1 - group)) for v in (output.kd, one))
            counts = torch.cat([one, visited])
        elif self._groups:
            groups = output.kd.reshape(-1, self._groups).mean(0)
        values = torch.cat([torch.stack([output.loss, output.ce]), groups, counts])
        self._sums += torch.where(finite, values, 0.0) if self._skip_nonfinite else values
        first = (self._non_finite_step < 0) & ~finite
        self._non_finite_step = torch.where(first, step, self._non_finite_step)
        streams = torch.cat([output.ce[None], output.kd])
        self._non_finite_streams = torch.where(first, ~torch.isfinite(streams), self._non_finite_streams)

    def means(self) -> dict[str, float]:
        """Reads the means so far: train_loss, train_ce, and kd_group1, ... per group."""
        names = ["train_loss", "train_ce", *(f"kd_group{g + 1}" for g in range(self._groups))]
        values = reduce_sum(self._sums).tolist()
        sums, (count, *visits) = values[: len(names)], values[len(names) :]
        counts = [count, count, *(visits or [count] * self._groups)]
        return {name: value / max(count, 1) for name, value, count in zip(names, sums, counts, strict=True)}

    def first_non_finite(self) -> tuple[int, list[int]] | None:
        """Reads the first step whose loss was NaN or infinite and the streams whose term was; None: there was none."""
        never = torch.iinfo(torch.int64).max
        own = self._non_finite_step.masked_fill(self._non_finite_step < 0, never)
        first = reduce_min(own)
        step = int(first)
        if step == never:
            return None
        streams = reduce_sum(self._non_finite_streams * (own == first)).tolist()
        return step, [i for i, count in enumerate(streams) if count]

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint in the middle of an epoch; those of all ranks, as one rank's share."""
        return {
            "sums": reduce_sum(self._sums) / world_size(),
            "non_finite_step": self._non_finite_step,
            "non_finite_streams": self._non_finite_streams,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums = state["sums"].to(self._sums.device)
        self._non_finite_step = state["non_finite_step"].to(self._sums.device)
        self._non_finite_streams = state["non_finite_streams"].to(self._sums.device)
