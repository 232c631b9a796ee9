"""What `bench/accuracy.py` measured: tables (mean, spread, paired differences); pictures by `accuracy_pictures`.

    python bench/accuracy_report.py [bench/results/accuracy.csv]

Accuracies are in % of the test images. A difference is taken seed by seed, between runs that start from the same
weights and see the same order of images; its interval is Student's, at 95 %. Settings that differ (training
images, epochs, ...) get tables of their own. `step` is the cost of a training step in plain steps, `CPU s per epoch`
the CPU time of one thread in the runs themselves.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

import accuracy_pictures
from accuracy import SETTING, read
from accuracy_models import title_of
from accuracy_recipes import ALONE, BUDGETS, CHOICES, METHODS, RECIPES, SHARES
from accuracy_rows import (
    Rows,
    by,
    cost,
    difference,
    inference_cost,
    interval,
    measured_depths,
    picture,
    spread,
    title,
    values_of,
)
from harness import RESULTS

from gkt_fast.instruments.tables import replace_marked

ROOT = Path(__file__).parents[1]
COMMAND = "python bench/accuracy_report.py --update"
README_SETTINGS = (
    {"model": "cifar_resnet20", "train_images": "1000", "epochs": "100"},
    {"model": "cifar_resnet20", "train_images": "10000", "epochs": "15"},
)
"""The settings of README's table, where there are rows of them; docs/measurements/accuracy.md has all."""


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
    accuracy_pictures.write(rows, args.output or args.csv[0].parent)
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
            f"{title_of(values['model'])} (width {values['width']}), batch {values['batch_size']}, learning rate "
            f"{values['lr']}, weight decay {values['weight_decay']}, {values['precision']}, augmentation "
            f"{values['augmentation']}, {values['test_images']} test images "
            f"([picture](../../bench/results/{picture(setting)})).\n"
        )
        parts += [f"{heading}:\n\n{markdown(table)}" for heading, table in tables(group).items()]
    return "\n".join(["", *parts, ""])


def readme(rows: Rows) -> str:
    chosen = [row for row in rows if any(setting.items() <= row.items() for setting in README_SETTINGS)]
    return headline(chosen or rows)


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


DOCUMENTS = {"README.md": readme, "docs/measurements/accuracy.md": report}


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
    if shares := of(SHARES):
        result["Subnets on a share of the batch (differences: gkt to plain, shares to gkt)"] = accuracies(
            of(["plain"], shares, ["gkt"])
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
        alone = RECIPES[name].alone or ()
        depths = "-".join(map(str, alone))
        own = values_of(rows, "full")
        inference = f"{inference_cost(rows, alone):.1f}"
        row = {
            "depths": depths,
            "MFLOPs per image": inference,
            "seeds": str(len(own)),
            "trained alone": spread(own.values()),
        }
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


def markdown(rows: list[dict[str, str]]) -> str:
    return table_of([list(rows[0]), *(list(row.values()) for row in rows)])


def table_of(lines: list[list[str]]) -> str:
    """Markdown; the first line is the header."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    main()
