"""Pictures of what `bench/accuracy.py` measured: one of every setting, and one of accuracy against inference cost."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from accuracy import SETTING
from accuracy_recipes import ALONE, BUDGETS, METHODS, RECIPES
from accuracy_rows import Rows, by, cost, inference_cost, mean_and_error, measured_depths, picture, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INFERENCE = "accuracy_inference.png"


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recipes = {name: group for (name,), group in by(rows, ["recipe"]).items()}
    methods = {name: recipes[name] for name in METHODS if name in recipes}
    budgets = {name: recipes[name] for name in ("plain", *BUDGETS, "gkt") if name in recipes}
    has_budgets = not budgets.keys().isdisjoint(BUDGETS)
    figure, axes = plt.subplots(1, 2 + has_budgets, figsize=(5.5 * (2 + has_budgets), 4.5), squeeze=False)
    plot_cost(axes[0, 0], methods)
    plot_depths(axes[0, 1], methods)
    if has_budgets:
        plot_budgets(axes[0, 2], budgets)
    for part in axes[0]:
        part.grid(alpha=0.3)
        part.set_ylabel("test accuracy (%)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_cost(axes: Axes, recipes: dict[str, Rows]) -> None:
    for name, rows in recipes.items():
        mean, error = mean_and_error(rows, "full")
        axes.errorbar(cost(rows), mean, error, fmt="o", capsize=3, color=colour(name), label=name)
    axes.legend(fontsize=7)
    axes.set_xlabel("cost of training (epochs of plain training)")
    axes.set_title("full network, with standard errors", fontsize=9)


def plot_depths(axes: Axes, recipes: dict[str, Rows]) -> None:
    for name, rows in recipes.items():
        depths = [*reversed(measured_depths(rows)), "full"]
        if len(depths) == 1:
            continue
        axes.plot(depths, [mean_and_error(rows, depth)[0] for depth in depths], "o-", color=colour(name))
    axes.set_xlabel("blocks kept per stage")
    axes.set_title("subnets, in the same colours", fontsize=9)


def plot_budgets(axes: Axes, recipes: dict[str, Rows]) -> None:
    costs = [statistics.fmean(float(row["step_cost"]) for row in rows) for rows in recipes.values()]
    for depth in ("full", *measured_depths([row for rows in recipes.values() for row in rows])):
        points = [mean_and_error(rows, depth) for rows in recipes.values()]
        axes.errorbar(costs, *zip(*points, strict=True), fmt="o-", capsize=3, label=depth)
    axes.set_xlabel("measured cost of a step (plain steps)")
    labels = [name.removeprefix("gkt, ") for name in recipes]
    axes.set_title(", ".join(labels), fontsize=9)
    axes.legend(fontsize=7)


def colour(method: str) -> tuple[float, ...]:
    """A method's own in all pictures; of the first ten dark, of the next ten light."""
    from matplotlib import colormaps

    index = list(METHODS).index(method)
    return colormaps["tab20"](2 * (index % 10) + index // 10)


def plot_inference(rows: Rows, path: Path) -> None:
    """Accuracy against the cost of inference, for every setting with networks of fewer blocks trained alone.

    Every depth of one network trained by GKT is a line, and of one trained plainly; networks trained alone are points,
    the full one among them. Nothing is drawn where there is no such setting.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {
        setting: group
        for setting, group in by(rows, SETTING).items()
        if any(row["recipe"] in ALONE for row in group)
    }
    if not groups:
        return
    columns = min(len(groups), 2)
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 4 * lines), squeeze=False)
    for part, (setting, group) in zip(axes.flat, groups.items(), strict=False):
        plot_inference_of(part, group)
        part.set_title(title(setting), fontsize=9)
    for part in axes.flat[len(groups) :]:
        part.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_inference_of(axes: Axes, rows: Rows) -> None:
    recipes = {name: group for (name,), group in by(rows, ["recipe"]).items()}
    for name in ("gkt", "plain"):
        if name in recipes:
            points = inference_points(recipes[name])
            label = f"every depth of one network: {name}"
            axes.errorbar(*zip(*points, strict=True), fmt="o-", capsize=3, color=colour(name), label=label)
    alone = [network_point(recipes[name], "full", RECIPES[name].alone) for name in ALONE if name in recipes]
    if "plain" in recipes:
        alone.append(network_point(recipes["plain"], "full", None))
    label = "each trained alone"
    axes.errorbar(*zip(*alone, strict=True), fmt="s", capsize=3, color="black", label=label, zorder=3)
    axes.set_xlabel("inference cost (MFLOPs per image)")
    axes.set_ylabel("test accuracy (%), with standard errors")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def inference_points(rows: Rows) -> list[tuple[float, float, float]]:
    """Cost, mean and error of every depth of a recipe's network, shallowest first."""
    depths = reversed(measured_depths(rows))
    return [
        *(network_point(rows, column, tuple(map(int, column.split("-")))) for column in depths),
        network_point(rows, "full", None),
    ]


def network_point(rows: Rows, column: str, depths: tuple[int, ...] | None) -> tuple[float, float, float]:
    """MFLOPs of the network of these depths (None: the full one), mean and error of what the column says."""
    return inference_cost(rows, depths), *mean_and_error(rows, column)
