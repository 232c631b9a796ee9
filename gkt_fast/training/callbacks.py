"""What a training run tells others as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..gkt import GKTOutput
    from .trainer import GKTTrainer

__all__ = ["Callback"]


class Callback:
    """Base class of callbacks for `GKTTrainer.fit`: override what you need. All are called by every rank.

    The order of a run: `on_fit_start`; for every epoch `on_epoch_start`, `on_step_end` after each batch,
    `on_epoch_end`, and `on_checkpoint` where files are written; `on_fit_end`, also after an error.
    """

    def on_fit_start(self, trainer: GKTTrainer) -> None:
        """Training begins, or goes on from a checkpoint that was just loaded."""

    def on_epoch_start(self, trainer: GKTTrainer) -> None:
        """`trainer.epoch` begins, or goes on."""

    def on_step_end(self, trainer: GKTTrainer, output: GKTOutput) -> None:
        """A batch was trained on. Reading a value of `output` makes the host wait for the device."""

    def on_epoch_end(self, trainer: GKTTrainer, metrics: dict[str, float]) -> None:
        """The epoch is evaluated. Numbers added to `metrics` are logged with the others."""

    def on_checkpoint(self, trainer: GKTTrainer, path: Path) -> None:
        """A checkpoint was written."""

    def on_fit_end(self, trainer: GKTTrainer) -> None:
        """Training is over."""
