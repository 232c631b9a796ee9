"""Where the numbers of a training run go: one small protocol; CSV, TensorBoard, Weights & Biases, a progress bar."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..distributed import rank

__all__ = ["CsvLogger", "Logger", "Progress", "Reports", "TensorBoardLogger", "WandbLogger"]


class Logger(Protocol):
    """Takes the metrics of a finished epoch."""

    def log_epoch(self, metrics: dict[str, float]) -> None:
        """`metrics` has the same names in every epoch of a run, "epoch" first."""

    def close(self) -> None:
        """The run is over."""


class CsvLogger:
    """One row per epoch in a CSV file. A resumed run replaces the rows from its first epoch on.

    Args:
        path: the file.
        first_epoch: first epoch that this run will log.
    """

    def __init__(self, path: str | Path, first_epoch: int = 0) -> None:
        self.path = Path(path)
        self._rows = [row for row in self._read() if int(row["epoch"]) < first_epoch]

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def log_epoch(self, metrics: dict[str, float]) -> None:
        """Rewrites the file with one more row, so that it is whole at any time."""
        self._rows.append({name: f"{value:.8g}" for name, value in metrics.items()})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(self._rows)
        temporary.replace(self.path)

    def close(self) -> None:
        """Nothing is left open."""


class TensorBoardLogger:
    """Scalars for TensorBoard, over epochs. A resumed run hides what was logged from its first epoch on.

    Args:
        folder: folder of the event files.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def log_epoch(self, metrics: dict[str, float]) -> None:
        """Writes one scalar per metric; the first call opens the file, so that other ranks leave none."""
        epoch = int(metrics["epoch"])
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=epoch)
        for name, value in metrics.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbLogger:
    """A run of Weights & Biases. Its identity is kept in the folder, so that a resumed training goes on in it.

    Args:
        folder: folder of the training run; wandb's own files go to its subfolder `wandb`.
        config: hyper-parameters to show with the run.
        options: further arguments of `wandb.init`, such as project, entity, name or mode.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        import wandb

        self.folder = Path(folder)
        self._wandb = wandb
        self._options = {"config": dict(config or {}), **options}
        self._run: Any = None

    def log_epoch(self, metrics: dict[str, float]) -> None:
        """Logs the metrics at their epoch; the first call starts or resumes the run, so that other ranks start none."""
        if self._run is None:
            self._run = self._start()
        self._run.log({k: v for k, v in metrics.items() if k != "epoch"}, step=int(metrics["epoch"]))

    def _start(self) -> Any:
        file = self.folder / "wandb" / "gkt_fast_run_id"
        run_id = file.read_text() if file.exists() else None
        run = self._wandb.init(dir=str(self.folder), id=run_id, resume="allow", **self._options)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(run.id)
        return run

    def close(self) -> None:
        """Ends the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Progress:
    """A tqdm bar on a terminal; elsewhere a line whenever there are new numbers, and at the end of an epoch.

    Args:
        steps: batches in an epoch; None: not known.
        epochs: epochs of the run.
        enabled: whether anything is printed.
    """

    def __init__(self, steps: int | None, epochs: int, enabled: bool = True) -> None:
        self.steps = steps
        self.epochs = epochs
        self.enabled = enabled
        self._bar: tqdm | None = None
        self._started = time.perf_counter()

    def begin_epoch(self, epoch: int, done: int = 0) -> None:
        """Starts the bar of an epoch of which `done` batches were trained on before."""
        self._epoch = epoch
        self._started = time.perf_counter()
        self._first = done
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.steps, initial=done, desc=f"epoch {epoch + 1}/{self.epochs}", leave=False
            )

    def update(self, done: int, metrics: Iterable[tuple[str, float]] | None) -> None:
        """One more batch was trained on; `metrics` are new numbers to show, or None."""
        if self._bar is not None:
            self._bar.update()
            if metrics is not None:
                self._bar.set_postfix_str(_format(metrics))
        elif self.enabled and metrics is not None:
            rate = (done - self._first) / max(time.perf_counter() - self._started, 1e-9)
            print(
                f"Train: {self._epoch + 1}/{self.epochs} [{done}/{self.steps or '?'}] "
                f"{_format(metrics)} {rate:.2f} steps/s",
                flush=True,
            )

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Closes the bar and prints the epoch's line."""
        self.close()
        if self.enabled:
            shown = ((name, value) for name, value in metrics.items() if name != "epoch")
            print(f"Epoch {self._epoch + 1}/{self.epochs}: {_format(shown)}", flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Reports:
    """All that report on a run: the progress bar and the loggers. Rank 0 alone reports.

    Args:
        loggers: get the metrics of every epoch.
        steps: batches in an epoch; None: not known.
        epochs: epochs of the run.
        progress: whether progress is printed.
    """

    def __init__(self, loggers: Sequence[Logger], steps: int | None, epochs: int, progress: bool) -> None:
        self._loggers = [] if rank() else [*loggers]
        self._progress = Progress(steps, epochs, progress and rank() == 0)

    def begin_epoch(self, epoch: int, done: int) -> None:
        """An epoch begins, of which `done` batches were trained on before."""
        self._progress.begin_epoch(epoch, done)

    def update(self, done: int, metrics: Iterable[tuple[str, float]] | None) -> None:
        """One more batch was trained on; `metrics` are new numbers to show, or None."""
        self._progress.update(done, metrics)

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is over."""
        self._progress.end_epoch(metrics)
        for logger in self._loggers:
            logger.log_epoch(metrics)

    def close(self) -> None:
        """The run is over, or has failed."""
        self._progress.close()
        for logger in self._loggers:
            logger.close()


def _format(metrics: Iterable[tuple[str, float]]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in metrics)
