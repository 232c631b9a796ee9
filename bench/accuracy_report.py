"""What `bench/accuracy.py` measured: a table (mean, spread, paired difference to plain training) and pictures.

    python bench/accuracy_report.py [bench/results/accuracy.csv]

Accuracies are in % of the test images. A difference is taken seed by seed, between runs that start from the same
weights and see the same order of images; its interval is Student's, at 95 %. Settings that differ (training
images, epochs, ...) get tables of their own.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from harness import RESULTS

SETTING = (
    "train_images", "test_images", "image_size", "depth", "width", "batch_size", "epochs", "lr", "weight_decay",
)  # fmt: skip
BASELINE = "plain"
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="*", default=[RESULTS / "accuracy.csv"])
    parser.add_argument(
        "--output", type=Path, help="folder of the pictures; default: beside the first CSV file"
    )
    args = parser.parse_args()
    rows = [row for path in args.csv for row in read(path)]
    for setting, group in by(rows, SETTING).items():
        values = dict(zip(SETTING, setting, strict=True))
        print(
            f"\nResNet-{values['depth']} (width {values['width']}), {values['train_images']} training images of "
            f"{values['image_size']}x{values['image_size']}, {values['epochs']} epochs, batch {values['batch_size']}, "
            f"learning rate {values['lr']}, {values['test_images']} test images\n"
        )
        print(markdown(table(group)))
        folder = args.output or args.csv[0].parent
        name = f"accuracy_{values['train_images']}x{values['image_size']}px_{values['epochs']}epochs.png"
        plot(group, folder / name)
        print(f"\nWritten to {folder / name}")


def read(path: Path) -> Rows:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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


def table(rows: Rows) -> list[dict[str, str]]:
    """One row per recipe, as text."""
    depths = measured_depths(rows)
    recipes = by(rows, ["recipe"])
    baseline = values_of(recipes.get((BASELINE,), []), "full")
    result = []
    for (recipe,), group in recipes.items():
        full = values_of(group, "full")
        gap = None if recipe == BASELINE else difference(full, baseline)
        result.append(
            {
                "recipe": recipe,
                "step": f"{statistics.fmean(float(row['step_cost']) for row in group):.2f}",
                "epochs": group[0]["epochs_run"],
                "seeds": str(len(full)),
                "full network": spread(full.values()),
                "to plain": "" if gap is None else f"{gap[0]:+.2f} ± {gap[1]:.2f}",
                **{depth: spread(values_of(group, depth).values()) for depth in depths},
            }
        )
    return result


def spread(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: Rows, path: Path) -> None:
    """Left: the full network's accuracy against the cost of training. Right: accuracy by depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    depths = [*reversed(measured_depths(rows))]
    for (recipe,), group in by(rows, ["recipe"]).items():
        full = list(values_of(group, "full").values())
        cost = statistics.fmean(float(row["step_cost"]) * int(row["epochs_run"]) for row in group)
        error = statistics.stdev(full) / math.sqrt(len(full)) if len(full) > 1 else 0
        left.errorbar(cost, statistics.fmean(full), error, fmt="o", capsize=3)
        left.annotate(
            recipe, (cost, statistics.fmean(full)), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
        means = [(depth, list(values_of(group, depth).values())) for depth in depths]
        points = [(depth, statistics.fmean(values)) for depth, values in means if values]
        if points:
            right.plot(*zip(*points, ("full", statistics.fmean(full)), strict=True), "o-", label=recipe)
    left.set_xlabel("cost of training (epochs of plain training)")
    left.set_ylabel("test accuracy of the full network (%)")
    right.set_xlabel("blocks kept per stage")
    right.set_ylabel("test accuracy (%)")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
