"""Factors that change over a training run: of the learning rate and of the distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LearningRateSchedule", "LinearWarmup"]


class LearningRateSchedule:
    """A scheduler of torch, if there is one, and when it steps.

    Args:
        scheduler: of the learning rate; None: the rate stays as it is.
        interval: "epoch" or "step": what the scheduler counts.

    Raises:
        ValueError: interval is neither.
    """

    def __init__(self, scheduler: LRScheduler | None = None, interval: str = "epoch") -> None:
        if interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {interval!r}; it must be 'epoch' or 'step'")
        self.scheduler = scheduler
        self.interval = interval

    def end_step(self) -> None:
        """After an optimizer step."""
        if self.scheduler is not None and self.interval == "step":
            self.scheduler.step()

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """After an epoch with these metrics."""
        if self.scheduler is not None and self.interval == "epoch":
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any] | None:
        """The scheduler's state; None: there is no scheduler."""
        return None if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state_dict`."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)


@dataclass(frozen=True)
class LinearWarmup:
    """Grows linearly to 1 over the first steps: step s, counted from 0, gets min((s + 1) / steps, 1).

    For `GKTTrainer`'s `kd_schedule`: soft labels of an untrained network teach nothing.

    Args:
        steps: length of the warm-up; 0: none.

    Raises:
        ValueError: steps is negative.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must be at least 0")

    def __call__(self, step: int) -> float:
        return min((step + 1) / self.steps, 1.0) if self.steps else 1.0
