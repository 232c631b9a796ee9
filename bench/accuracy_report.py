"""What `bench/accuracy.py` measured: tables (mean, spread, paired differences) and pictures.

    python bench/accuracy_report.py [bench/results/accuracy.csv]

Accuracies are in % of the test images. A difference is taken seed by seed, between runs that start from the same
weights and see the same order of images; its interval is Student's, at 95 %. Settings that differ (training
images, epochs, ...) get tables of their own. `step` is the cost of a training step in plain steps, `CPU s per epoch`
the CPU time of one thread in the runs themselves.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from accuracy import ALONE, BUDGETS, CHOICES, METHODS, RECIPES, SETTING, read
from harness import RESULTS

from gkt_fast.instruments.tables import replace_marked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
COMMAND = "python bench/accuracy_report.py --update"
COLOURS = {name: f"C{index}" for index, name in enumerate(METHODS)}
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="*", default=[RESULTS / "accuracy.csv"])
    parser.add_argument(
        "--output", type=Path, help="folder of the pictures; default: beside the first CSV file"
    )
    parser.add_argument("--update", action="store_true", help=f"write the tables into {', '.join(DOCUMENTS)}")
    args = parser.parse_args()
    rows = [row for path in args.csv for row in read(path)]
    for setting, group in by(rows, SETTING).items():
        plot(group, (args.output or args.csv[0].parent) / picture(setting))
    for name, write in DOCUMENTS.items():
        text = write(rows)
        print(text)
        if args.update:
            path = ROOT / name
            path.write_text(replace_marked(path.read_text(), COMMAND, text))


def report(rows: Rows) -> str:
    """Every table of every setting."""
    parts = []
    for setting, group in by(rows, SETTING).items():
        values = dict(zip(SETTING, setting, strict=True))
        parts.append(
            f"### {title(setting)}\n\n"
            f"ResNet-{values['depth']} (width {values['width']}), batch {values['batch_size']}, learning rate "
            f"{values['lr']}, weight decay {values['weight_decay']}, {values['precision']}, {values['test_images']} "
            f"test images ([picture](../bench/results/{picture(setting)})).\n"
        )
        parts += [f"{heading}:\n\n{markdown(table)}" for heading, table in tables(group).items()]
    return "\n".join(["", *parts, ""])


def headline(rows: Rows) -> str:
    """Methods down, settings across: cost in plain trainings, accuracy of the full network and the smallest subnet."""
    settings = by(rows, SETTING)
    header, lines = ["method"], [[name] for name in METHODS] + [["its smallest subnet, trained alone"]]
    for setting, group in settings.items():
        smallest = measured_depths(group)[-1]
        header += [f"{title(setting)}: cost", "full network", f"depths {smallest}"]
        recipes = by(group, ["recipe"])
        for line, name in zip(lines, [*METHODS, f"plain {smallest}"], strict=True):
            runs = recipes.get((name,), [])
            relative = f"{cost(runs) / int(runs[0]['epochs']):.2f}" if runs else ""
            full, part = (spread(values_of(runs, column).values()) for column in ("full", smallest))
            line += [relative, "", full] if name in ALONE else [relative, full, part]
    return table_of([header, *(line for line in lines if any(line[1:]))])


def title(setting: tuple[str, ...]) -> str:
    values = dict(zip(SETTING, setting, strict=True))
    return (
        f"{int(values['train_images']):,} images of {values['image_size']}x{values['image_size']}, "
        f"{values['epochs']} epochs"
    )


def picture(setting: tuple[str, ...]) -> str:
    values = dict(zip(SETTING, setting, strict=True))
    return f"accuracy_{values['train_images']}x{values['image_size']}px_{values['epochs']}epochs.png"


def cost(rows: Rows) -> float:
    """Mean cost of a training, in epochs of plain training."""
    return statistics.fmean(float(row["step_cost"]) * int(row["epochs_run"]) for row in rows)


DOCUMENTS = {"README.md": headline, "docs/accuracy.md": report}


def tables(rows: Rows) -> dict[str, list[dict[str, str]]]:
    """Those that there are runs for."""
    recipes = by(rows, ["recipe"])

    def of(*studies: Iterable[str]) -> dict[str, Rows]:
        names = [name for study in studies for name in study]
        return {name: recipes[name,] for name in names if (name,) in recipes}

    result = {"Methods (difference to plain)": accuracies(of(METHODS))}
    if alone := of(ALONE):
        result["Subnets, and networks of their depths trained alone"] = smaller(alone, of(METHODS))
    if budgets := of(BUDGETS):
        result["Budgets (differences: gkt to plain, budgets to gkt)"] = accuracies(
            of(["plain"], budgets, ["gkt"])
        )
    if choices := of(CHOICES):
        result["Choices (differences to the defaults)"] = differences(choices, of(METHODS))
    return result


def accuracies(recipes: dict[str, Rows]) -> list[dict[str, str]]:
    depths = measured_depths([row for rows in recipes.values() for row in rows])
    result = []
    for name, rows in recipes.items():
        baseline = recipes.get(RECIPES[name].baseline, []) if RECIPES[name].baseline != name else []
        per_epoch = [float(row["cpu_seconds"]) / int(row["epochs_run"]) for row in rows]
        result.append(
            {
                "recipe": name,
                "step": f"{statistics.fmean(float(row['step_cost']) for row in rows):.2f}",
                "epochs": rows[0]["epochs_run"],
                "CPU s per epoch": f"{statistics.median(per_epoch):.2f}",
                "seeds": str(len(rows)),
                "full network": spread(values_of(rows, "full").values()),
                "difference": interval(difference(values_of(rows, "full"), values_of(baseline, "full"))),
                **{depth: spread(values_of(rows, depth).values()) for depth in depths},
            }
        )
    return result


def smaller(alone: dict[str, Rows], methods: dict[str, Rows]) -> list[dict[str, str]]:
    result = []
    for name, rows in alone.items():
        depths = "-".join(map(str, RECIPES[name].alone or ()))
        own = values_of(rows, "full")
        row = {"depths": depths, "seeds": str(len(own)), "trained alone": spread(own.values())}
        for method in methods:
            values = values_of(methods[method], depths)
            if values:
                gap = interval(difference(values, own))
                row[method] = spread(values.values()) + (f" ({gap})" if gap else "")
        result.append(row)
    columns = list(dict.fromkeys(column for row in result for column in row))
    return [{column: row.get(column, "") for column in columns} for row in result]


def differences(recipes: dict[str, Rows], methods: dict[str, Rows]) -> list[dict[str, str]]:
    columns = ["full", *measured_depths([row for rows in recipes.values() for row in rows])]
    result = []
    for name, rows in recipes.items():
        baseline = methods.get(RECIPES[name].baseline, [])
        gaps = {
            column: interval(difference(values_of(rows, column), values_of(baseline, column)))
            for column in columns
        }
        result.append(
            {"recipe": name, "compared with": RECIPES[name].baseline, "seeds": str(len(rows)), **gaps}
        )
    return result


def by(rows: Rows, columns: Iterable[str]) -> dict[tuple[str, ...], Rows]:
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def measured_depths(rows: Rows) -> list[str]:
    """The columns of subnets' accuracies, deepest first."""
    found = {column for row in rows for column, value in row.items() if column[:1].isdigit() and value}
    return sorted(found, key=lambda depths: sum(map(int, depths.split("-"))), reverse=True)


def values_of(rows: Rows, column: str) -> dict[str, float]:
    """Seed -> value."""
    return {row["seed"]: float(row[column]) for row in rows if row.get(column)}


def difference(values: dict[str, float], baseline: dict[str, float]) -> tuple[float, float] | None:
    """Mean of the paired differences and the half width of its 95 % interval; None without two common seeds."""
    from scipy.stats import t

    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(t.ppf(0.975, len(differences) - 1)) * spread


def interval(difference: tuple[float, float] | None) -> str:
    return "" if difference is None else f"{difference[0]:+.2f} ± {difference[1]:.2f}"


def spread(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def markdown(rows: list[dict[str, str]]) -> str:
    return table_of([list(rows[0]), *(list(row.values()) for row in rows)])


def table_of(lines: list[list[str]]) -> str:
    """Markdown; the first line is the header."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


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
        axes.errorbar(cost(rows), mean, error, fmt="o", capsize=3, color=COLOURS[name], label=name)
    axes.legend(fontsize=7)
    axes.set_xlabel("cost of training (epochs of plain training)")
    axes.set_title("full network, with standard errors", fontsize=9)


def plot_depths(axes: Axes, recipes: dict[str, Rows]) -> None:
    for name, rows in recipes.items():
        depths = [*reversed(measured_depths(rows)), "full"]
        if len(depths) == 1:
            continue
        axes.plot(depths, [mean_and_error(rows, depth)[0] for depth in depths], "o-", color=COLOURS[name])
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


def mean_and_error(rows: Rows, column: str) -> tuple[float, float]:
    """NaN, which isn't drawn, where nothing was evaluated."""
    values = list(values_of(rows, column).values())
    if not values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


if __name__ == "__main__":
    main()
