"""The table of subnets as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import pictures
from .subnet_table import SubnetResult, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_subnets", "write_subnets_csv"]


def write_subnets_csv(results: Sequence[SubnetResult], path: str | Path) -> None:
    """Writes the table; `pareto` is 1 for the results on the Pareto front, `mean_iou` empty where there is none.

    Times, where they were measured, are columns such as torch_batch1_ms, and ..._lower and ..._upper for quartiles.

    Args:
        results: of `evaluate_subnets`.
        path: file to write.

    Raises:
        OSError: it can't be written.
    """
    front = pareto_front(results)
    timed = list(dict.fromkeys((entry.runtime, entry.batch_size) for r in results for entry in r.latencies))
    names = [
        f"{runtime}_batch{size}_ms{kind}" for runtime, size in timed for kind in ("", "_lower", "_upper")
    ]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["depths", "parameters", "flops", "accuracy", "loss", "mean_iou", "pareto", *names])
        for r in results:
            iou = "" if r.mean_iou is None else r.mean_iou
            of = {(entry.runtime, entry.batch_size): entry for entry in r.latencies}
            times = [
                value
                for key in timed
                for value in (
                    (of[key].median_ms, of[key].lower_ms, of[key].upper_ms) if key in of else ("", "", "")
                )
            ]
            row = [r.subnet, r.parameters, r.flops, r.accuracy, r.loss, iou, int(r in front), *times]
            writer.writerow(row)


def plot_subnets(
    results: Sequence[SubnetResult],
    path: str | Path,
    title: str = "",
    best: SubnetResult | None = None,
    *,
    runtime: str | None = None,
    batch_size: int = 1,
) -> None:
    """Draws accuracy against cost: all results, a line through the Pareto front, the full network. Needs matplotlib.

    Args:
        results: of `evaluate_subnets`.
        path: picture to write; its ending says the format.
        title: above the picture.
        best: the result that was chosen, to be marked.
        runtime: cost is measured time in this runtime, "torch" or "onnxruntime"; None: FLOPs.
        batch_size: of the time.

    Raises:
        ValueError: results is empty, or the times weren't measured.
    """
    if not results:
        raise ValueError("results is empty; there is nothing to draw")
    cost: Callable[[SubnetResult], float]
    if runtime is None:
        label = "forward cost (MFLOPs per sample)"
        cost = _megaflops
    else:
        label = f"time of a batch of {batch_size} in {runtime} (ms, median)"

        def cost(result: SubnetResult) -> float:
            return result.milliseconds(runtime, batch_size)

    with pictures.picture(path, (7, 4.5), dpi=120) as figure:
        _draw(figure.subplots(), results, title, best, cost, label)


def _draw(
    axes: Axes,
    results: Sequence[SubnetResult],
    title: str,
    best: SubnetResult | None,
    cost: Callable[[SubnetResult], float],
    label: str,
) -> None:
    front = pareto_front(results, cost)
    pictures.ask(axes, "How accurate is each subnet?", f"accuracy (%){f'; {title}' if title else ''}")
    axes.plot(
        [cost(r) for r in results], [100 * r.accuracy for r in results], "o", color=pictures.QUIET, alpha=0.5
    )
    costs, accuracies = [cost(r) for r in front], [100 * r.accuracy for r in front]
    axes.step(
        costs,
        accuracies,
        where="post",
        marker="o",
        color=pictures.COLOURS["gkt"],
        label="no subnet is better and cheaper",
    )
    for result, x, accuracy in zip(front, costs, accuracies, strict=True):
        axes.annotate(
            str(result.subnet), (x, accuracy), xytext=(4, -10), textcoords="offset points", fontsize=7
        )
    marked = [("full network", "s", r) for r in results if r.subnet.is_full]
    marked += [] if best is None else [("chosen", "*", best)]
    for name, marker, r in marked:
        axes.plot(
            cost(r),
            100 * r.accuracy,
            marker,
            markersize=13,
            markerfacecolor="none",
            color=pictures.INK,
            label=f"{name} ({r.subnet})",
        )
    axes.set_xlabel(label)
    axes.legend(loc="lower right")


def _megaflops(result: SubnetResult) -> float:
    return result.flops / 1e6
