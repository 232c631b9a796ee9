"""Where the numbers of a training run go: one small protocol, a CSV file, a progress bar or plain lines."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

__all__ = ["CsvLogger", "Logger", "Progress"]


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


class Progress:
    """A tqdm bar on a terminal; elsewhere one line every `interval` steps, and at the end of an epoch.

    Args:
        steps: steps of an epoch, None when unknown.
        epochs: epochs of the run.
        interval: steps between two updates of the numbers shown.
        enabled: whether anything is printed.
    """

    def __init__(self, steps: int | None, epochs: int, interval: int, enabled: bool = True) -> None:
        self.steps = steps
        self.epochs = epochs
        self.interval = interval
        self.enabled = enabled
        self._bar: tqdm | None = None
        self._started = time.perf_counter()

    def begin_epoch(self, epoch: int, done: int = 0) -> None:
        """Starts the bar of an epoch of which `done` steps are already behind us."""
        self._epoch = epoch
        self._started = time.perf_counter()
        self._first = done
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.steps, initial=done, desc=f"epoch {epoch + 1}/{self.epochs}", leave=False
            )

    def update(self, done: int, metrics: Iterable[tuple[str, float]] | None) -> None:
        """One more step; `metrics` are new numbers to show, or None."""
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


def _format(metrics: Iterable[tuple[str, float]]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in metrics)
