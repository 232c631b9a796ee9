"""What a training run tells others as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..gkt import GKTOutput

__all__ = ["Callback", "Callbacks"]

Trainer: TypeAlias = Any
"""The `GKTTrainer` that runs. Its module imports this one, so the class can't be named here. A protocol could stand for
it, but then type checkers would reject callbacks that declare their trainer as a GKTTrainer."""


class Callback:
    """Base class of callbacks for `GKTTrainer.fit`: override what you need. Every rank calls all of them.

    Each gets the `GKTTrainer` that runs; its `state` says where training stands (`TrainingState`).

    The order of a run: `on_fit_start`; for every epoch `on_epoch_start`, `on_step_end` after each batch,
    `on_epoch_end`, and `on_checkpoint` where files are written; `on_fit_end`, also after an error.
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Training begins, or goes on from a checkpoint that was just loaded."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """`trainer.epoch` begins, or goes on."""

    def on_step_end(self, trainer: Trainer, output: GKTOutput) -> None:
        """A batch was trained on. Reading a value of `output` makes the host wait for the device."""

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The epoch was trained and evaluated. Numbers added to `metrics` are logged with the others."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint was written."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Training is over."""


class Callbacks:
    """The callbacks of a run, together with the trainer that they are called with."""

    def __init__(self, callbacks: Sequence[Callback], trainer: Trainer) -> None:
        self._callbacks = callbacks
        self._trainer = trainer

    def tell(self, event: str, *values: Any) -> None:
        """Calls the method named `event` of every callback, in order."""
        for callback in self._callbacks:
            getattr(callback, event)(self._trainer, *values)
