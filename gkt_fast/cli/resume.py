"""Runs that go on: what a second call of `train` on the same run may change, and what it says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from ..config import GKTConfig
from ..distributed import rank
from ..training.callbacks import Callback
from ..training.checkpoint import CheckpointError
from ..training.trainer import GKTTrainer
from .config_file import argument_values, write_arguments

__all__ = ["RunRecord", "checkpoint_to_resume"]

MAY_CHANGE = frozenset(
    {
        *("epochs", "lr", "sched", "warmup_epochs"),  # the schedule is built anew
        *("batch_size", "accumulate", "workers", "device", "timeout", "channels_last", "sync_bn"),
        *("compile_blocks", "deterministic", "execution", "fuse_blocks"),
        *("output", "experiment", "resume", "log", "log_interval", "wandb_project"),
        *("track_depths", "evaluate_depths", "calibrate_full", "initial_checkpoint"),
    }
)
"""Flags that a run may go on with when they changed. The others say what is trained, and by what."""


def checkpoint_to_resume(args: argparse.Namespace, output: Path | None) -> Path | None:
    """The checkpoint that the run goes on from; None: it starts anew."""
    if args.resume not in ("", "auto"):
        return Path(args.resume)
    last = None if output is None else output / "last.pt"
    return last if last is not None and args.resume and last.exists() else None


class RunRecord(Callback):
    """Compares the flags with those of the run that goes on, before anything is loaded; says where it goes on, and
    writes the flags once the checkpoint is loaded.

    Args:
        args: the flags as they were given.
        config: the configuration that resulted from them.
        output: the run's folder; None: nothing is written.
        checkpoint: where the run goes on from; None: it starts anew.
        description: what is trained; printed when training begins.

    Raises:
        CheckpointError: a flag changed that can't change within a run.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: GKTConfig,
        output: Path | None,
        checkpoint: Path | None,
        description: str,
    ) -> None:
        self._args = args
        self._config = config
        self._output = output
        self._checkpoint = checkpoint
        self._description = description
        self.finished = False
        self._changed = {} if checkpoint is None else _changed(args, config, checkpoint)

    def on_fit_start(self, trainer: GKTTrainer) -> None:
        epochs = self._args.epochs
        if self._checkpoint is not None:
            self.finished = trainer.epoch >= epochs
            done = f"{trainer.epoch} of {epochs} epochs are done"
            if self.finished:
                _say(f"Already finished: {done}; nothing to train")
            else:
                _say(f"Resumed at epoch {trainer.epoch + 1} of {epochs} from {self._checkpoint}")
            for name, (before, now) in self._changed.items():
                _say(f"  --{name.replace('_', '-')} was {_shown(before)}, is {_shown(now)} from here on")
        if not self.finished:
            _say(self._description)
        if self._output is not None and rank() == 0 and not self.finished:
            write_arguments(self._args, self._config, self._output / "args.yaml")


def _changed(args: argparse.Namespace, config: GKTConfig, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
    """The flags that differ from those in the `args.yaml` beside the checkpoint, before and now."""
    path = checkpoint.parent / "args.yaml"
    # What the version that wrote it lacked of the hyper-parameters was as it is by default.
    saved = GKTConfig().to_dict() | yaml.safe_load(path.read_text()) if path.exists() else {}
    now = argument_values(args, config)
    changed = {
        name: (saved[name], value) for name, value in now.items() if name in saved and saved[name] != value
    }
    refused = {name: values for name, values in changed.items() if name not in MAY_CHANGE}
    if refused:
        before, here = (
            ", ".join(f"--{name.replace('_', '-')} {_shown(values[i])}" for name, values in refused.items())
            for i in (0, 1)
        )
        raise CheckpointError(
            f"{checkpoint.parent} was trained with {before}; here it is {here}. That can't change within a run: give "
            "the flags as they were, another --experiment, or --resume '' to start anew. Nothing was changed"
        )
    quiet = ("output", "experiment", "resume", "track_depths", "evaluate_depths", "log", "wandb_project")
    return {name: values for name, values in changed.items() if name not in quiet}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _say(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)
