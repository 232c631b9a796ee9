"""Factors that change over a training run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LinearWarmup"]


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
