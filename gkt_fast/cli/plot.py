"""`python -m gkt_fast plot`."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import pictures
from .requirements import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Run", "add_arguments", "draw", "read_run"]

LINES = ("-", "--", ":", "-.")
"""Within a run the curves of a panel differ by line, between runs by colour."""
PANELS = (
    ("Does the loss still fall?", ("train_loss", "val_loss"), "loss"),
    (
        "How far are groups from their teachers?",
        ("kd_group",),
        "KL divergence",
    ),
    ("How accurate is each depth?", ("val_accuracy",), "accuracy (%)"),
)
"""Of each panel the question that it answers, the prefixes of the columns shown, and the label of the axis."""
OUTLIER = 3.0
"""A value counts as one where it lies this many times the spread of nine tenths of all values above these."""
LABELS = {
    "train_loss": "training",
    "val_loss": "validation",
    "val_loss_ema": "validation, averaged weights",
    "val_accuracy": "full network",
    "val_accuracy_ema": "full network, averaged weights",
}
"""Of columns whose name doesn't say it."""


@dataclass(frozen=True)
class Run:
    """The curves of a training run.

    Args:
        name: as shown in the legend.
        curves: for each column of summary.csv its (epoch, value) pairs, epochs counted from 1.
    """

    name: str
    curves: dict[str, list[tuple[int, float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=plot)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a summary.csv")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("plot.png"), help="picture to write: png, svg or pdf"
    )


def plot(args: argparse.Namespace) -> None:
    """Draws loss, distillation terms and accuracies over epochs, all runs in one figure."""
    require("plot", "matplotlib")
    runs = [read_run(path) for path in args.runs]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(path)) for run, path in zip(runs, args.runs, strict=True)]
    figure = draw(runs)
    figure.savefig(args.output, dpi=120)
    print(f"Written to {args.output}")


def read_run(path: Path) -> Run:
    """Reads a run's summary.csv.

    Raises:
        ValueError: there is none, it holds no epoch, or a value is no number.
    """
    file = path / "summary.csv" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no summary.csv; a run writes one with --output")
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    if not rows or "epoch" not in rows[0]:
        raise ValueError(f"{file} holds no epochs")
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            try:
                if value:
                    curves.setdefault(name, []).append((int(row["epoch"]) + 1, float(value)))
            except (TypeError, ValueError):
                raise ValueError(f"{file} has {value!r} as {name}; it must be a number") from None
    return Run(file.parent.name, curves)


def draw(runs: Sequence[Run]) -> Figure:
    """A figure with one panel for the losses, one for the distillation terms, one for the accuracies."""
    from matplotlib.figure import Figure

    with pictures.style():
        figure = Figure(figsize=(14, 4.2), layout="constrained")
        for axes, (question, prefixes, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for number, run in enumerate(runs):
                colour = pictures.SERIES[number % len(pictures.SERIES)]
                _draw_run(axes, run, prefixes, colour, several=len(runs) > 1)
            pictures.ask(axes, question)
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if axes.lines:
                _limit(axes)
                axes.legend()
    return figure


def _limit(axes: Axes) -> None:
    """Cuts the panel off above what most values reach, where a few would flatten all others; and says so."""
    values = sorted(value for line in axes.lines for value in line.get_ydata() if math.isfinite(value))
    if len(values) < 4:
        return
    low, high = values[0], values[int(0.9 * (len(values) - 1))]
    ceiling = high + OUTLIER * max(high - low, abs(high) * 1e-3)
    outside = [value for value in values if value > ceiling]
    if not outside:
        return
    inside = values[len(values) - len(outside) - 1]
    axes.set_ylim(top=inside + 0.05 * (inside - low or 1.0))
    axes.text(
        0.99,
        0.99,
        f"{len(outside)} values above, up to {outside[-1]:.3g}",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize="small",
    )


def _draw_run(axes: Axes, run: Run, prefixes: tuple[str, ...], colour: str, several: bool) -> None:
    names = [name for prefix in prefixes for name in run.curves if name.startswith(prefix)]
    for i, name in enumerate(names):
        percent = 100.0 if name.startswith("val_accuracy") else 1.0
        epochs, values = zip(*run.curves[name], strict=True)
        axes.plot(
            epochs,
            [percent * value for value in values],
            linestyle=LINES[i % len(LINES)],
            marker="." if len(epochs) == 1 else None,
            color=colour if several else pictures.SERIES[i % len(pictures.SERIES)],
            label=f"{run.name}: {_label(name)}" if several else _label(name),
        )


def _label(column: str) -> str:
    if column in LABELS:
        return LABELS[column]
    kind, _, what = column.rpartition("_")
    return f"depths {what}" if kind == "val_accuracy" else what.replace("group", "group ")
