"""The picture of an op's benchmark: a factor for every provider and shape, on a logarithmic scale."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from gkt_fast import pictures

NAMES = {"eager": "eager torch", "compile": "torch.compile", "cpp": "C++ kernel", "cuda": "CUDA kernel"}
COLOURS = {"eager": "#c2570c", "compile": "#6d28d9"}
KERNEL = pictures.COLOURS["gkt"]


def plot(
    path: Path,
    column: str,
    question: str,
    remark: str,
    chosen: Callable[[dict[str, str]], bool] = lambda row: True,
    baseline: str = "a copy",
) -> None:
    """Draws a column of a CSV file into the picture beside it.

    Args:
        path: of the CSV file.
        column: the factor.
        question: what the picture answers.
        remark: what was measured.
        chosen: whether a row is drawn.
        baseline: what has the factor 1.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if chosen(row)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows if NAMES.get(row["provider"]) != baseline))
    providers = [name for name in providers if not name.startswith("copy")]
    with pictures.picture(path.with_suffix(".png"), (7.6, 3.8)) as figure:
        axes = figure.subplots()
        pictures.ask(axes, question, remark)
        axes.plot([-0.2, len(shapes) - 1], [1, 1], color=pictures.QUIET, linewidth=1)
        ends = [(baseline, len(shapes) - 1, 1.0, pictures.QUIET)]
        for provider in providers:
            factors = {row["shape"]: float(row[column]) for row in rows if row["provider"] == provider}
            points = [(place, factors[shape]) for place, shape in enumerate(shapes) if shape in factors]
            colour = COLOURS.get(provider, KERNEL)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.2)
            for place, factor in points:
                axes.annotate(
                    f"{factor:.2g}" if factor < 100 else f"{factor:.0f}",
                    (place, factor),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=colour,
                )
            ends.append((NAMES.get(provider, provider), *points[-1], colour))
        axes.set_yscale("log")
        axes.margins(x=0.05, y=0.14)
        axes.set_xlim(right=len(shapes) - 0.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(range(len(shapes)), [shape.replace("x", " × ") for shape in shapes])
        pictures.name_lines(axes, ends, dx=9)
