"""Pictures of what `bench/accuracy.py` measured: accuracy against the cost of inference, and one of every setting."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from accuracy import SETTING
from accuracy_recipes import ALONE, BUDGETS, METHODS, RECIPES
from accuracy_rows import (
    Rows,
    by,
    cost,
    inference_cost,
    mean_and_error,
    measured_depths,
    picture,
    title,
)

from gkt_fast import pictures
from gkt_fast.pictures import COLOURS, INK, QUIET, SERIES, ask, name_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INFERENCE = "accuracy_inference.png"
HEADLINE = ("accuracy-light.svg", "accuracy-dark.svg")
BARS = "bars: standard error over seeds"


def write(rows: Rows, folder: Path) -> None:
    """Draws all of them.

    Raises:
        ValueError: two settings differ in nothing that their pictures' names say.
    """
    settings = by(rows, SETTING)
    names = [picture(setting) for setting in settings]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"several settings would be drawn as {repeated}; report them one by one")
    for name, group in zip(names, settings.values(), strict=True):
        plot(group, folder / name)
    plot_inference(rows, folder / INFERENCE)


def plot(rows: Rows, path: Path) -> None:
    """Accuracy of the full network against the cost of training; by depth; and, where there are runs, by budget."""
    recipes = {name: group for (name,), group in by(rows, ["recipe"]).items()}
    methods = {name: recipes[name] for name in METHODS if name in recipes}
    budgets = {name: recipes[name] for name in ("plain", *BUDGETS, "gkt") if name in recipes}
    panels = 2 + (not budgets.keys().isdisjoint(BUDGETS))
    with pictures.picture(path, (5.6 * panels, 4.4)) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        plot_cost(axes[0], methods)
        plot_depths(axes[1], methods)
        if panels > 2:
            plot_budgets(axes[2], budgets)


def colour(method: str) -> str:
    """A method's own in all pictures."""
    own = [name for name in METHODS if name not in COLOURS]
    return COLOURS.get(method) or [c for c in SERIES if c not in COLOURS.values()][own.index(method) % 7]


def plot_cost(axes: Axes, recipes: dict[str, Rows]) -> None:
    ask(
        axes,
        "How accurate is the full network?",
        f"test accuracy (%), {BARS}; cost of the training in brackets",
    )
    ranked = sorted(recipes, key=lambda name: mean_and_error(recipes[name], "full")[0])
    for height, name in enumerate(ranked):
        mean, error = mean_and_error(recipes[name], "full")
        axes.errorbar(mean, height, xerr=error, fmt="o", color=colour(name))
    axes.set_yticks(range(len(ranked)), [f"{name} ({relative_cost(recipes[name]):.2f})" for name in ranked])
    for tick, name in zip(axes.get_yticklabels(), ranked, strict=True):
        tick.set_color(colour(name))
    axes.tick_params(axis="y", length=0)


def relative_cost(rows: Rows) -> float:
    """Of a training, in plain trainings of as many epochs."""
    return cost(rows) / int(rows[0]["epochs"])


def plot_depths(axes: Axes, recipes: dict[str, Rows]) -> None:
    ask(axes, "What is left with fewer blocks?", "test accuracy (%) of each depth, without training again")
    ends = []
    for name, rows in recipes.items():
        depths = [*reversed(measured_depths(rows)), "full"]
        if len(depths) > 1:
            means = [mean_and_error(rows, depth)[0] for depth in depths]
            axes.plot(depths, means, "o-", color=colour(name))
            ends.append((name, 0, means[0], colour(name)))
    axes.set_xlabel("blocks kept per stage")
    if ends:
        axes.margins(y=0.14)
        axes.set_xlim(left=-1)
        name_lines(axes, ends, side="right")


def plot_budgets(axes: Axes, recipes: dict[str, Rows]) -> None:
    labels = ", ".join(name.removeprefix("gkt, ") for name in recipes)
    ask(axes, "What does a cheaper step cost the subnets?", f"test accuracy (%); {labels}")
    costs = [statistics.fmean(float(row["step_cost"]) for row in rows) for rows in recipes.values()]
    ends = []
    for depth, shade in zip(
        ("full", *measured_depths([row for rows in recipes.values() for row in rows])), SERIES, strict=False
    ):
        points = [mean_and_error(rows, depth) for rows in recipes.values()]
        axes.errorbar(costs, *zip(*points, strict=True), fmt="o-", color=shade)
        ends.append((depth, costs[0], points[0][0], shade))
    axes.set_xlabel("measured cost of a step, plain steps")
    axes.margins(x=0.12)
    name_lines(axes, ends, side="right")


def plot_inference(rows: Rows, path: Path, dark: Path | None = None) -> None:
    """Accuracy against the cost of inference, for every setting with networks of fewer blocks trained alone.

    Every depth of one network trained by GKT is a line, and of one trained plainly; networks trained alone are points,
    the full one among them. Nothing is drawn where there is no such setting.
    """
    groups = {
        setting: group
        for setting, group in by(rows, SETTING).items()
        if any(row["recipe"] in ALONE for row in group)
    }
    if not groups:
        return
    columns = min(len(groups), 2)
    lines = -(-len(groups) // columns)
    with pictures.picture(path, (4.6 * columns, 0.5 + 3.2 * lines), dark=dark) as figure:
        figure.suptitle(
            "How accurate is each depth of one trained network?",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
            color=INK,
        )
        axes = figure.subplots(lines, columns, squeeze=False)
        for part, (setting, group) in zip(axes.flat, groups.items(), strict=False):
            plot_inference_of(part, group)
            part.set_title(title(setting), loc="left", fontsize=9, color=QUIET)
        for part in axes.flat[len(groups) :]:
            part.set_axis_off()
        for part in axes[:, 0]:
            part.set_ylabel(f"test accuracy (%), {BARS}" if lines == 1 else "test accuracy (%)")
        for part in axes[-1]:
            part.set_xlabel("cost of inference, MFLOPs per image")


def plot_inference_of(axes: Axes, rows: Rows) -> None:
    recipes = {name: group for (name,), group in by(rows, ["recipe"]).items()}
    names = {"gkt": "GKT: every depth of one network", "plain": "plain training: its depths"}
    alone = [network_point(recipes[name], "full", RECIPES[name].alone) for name in ALONE if name in recipes]
    if "plain" in recipes:
        alone.append(network_point(recipes["plain"], "full", None))
    names = {name: label for name, label in names.items() if name in recipes}
    for name, label in names.items():
        points = inference_points(recipes[name])
        axes.errorbar(*zip(*points, strict=True), fmt="o-", color=colour(name), label=label)
    names["alone"] = "each depth trained alone"
    axes.errorbar(
        *zip(*alone, strict=True),
        fmt="s",
        markersize=5,
        color=COLOURS["alone"],
        zorder=3,
        label=names["alone"],
    )
    axes.margins(x=0.04, y=0.16)
    # All lines end at the top right.
    legend = axes.legend(loc="lower right", frameon=False, prop={"size": 8.5, "weight": "bold"})
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_color(COLOURS[name])


def inference_points(rows: Rows) -> list[tuple[float, float, float]]:
    """Cost, mean and error of every depth of a recipe's network, shallowest first."""
    return [
        *(network_point(rows, column, depths_of(column)) for column in reversed(measured_depths(rows))),
        network_point(rows, "full", None),
    ]


def depths_of(column: str) -> tuple[int, ...]:
    return tuple(map(int, column.split("-")))


def network_point(rows: Rows, column: str, depths: tuple[int, ...] | None) -> tuple[float, float, float]:
    """MFLOPs of the network of these depths (None: the full one), mean and error of what the column says."""
    return inference_cost(rows, depths), *mean_and_error(rows, column)
