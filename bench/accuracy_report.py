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
import textwrap
from collections.abc import Iterable
from pathlib import Path

import accuracy_pictures
from accuracy import SETTING
from accuracy_models import title_of
from accuracy_recipes import ALONE, BUDGETS, CHOICES, METHODS, OVER_STEPS, RECIPES, SHARES
from accuracy_rows import (
    Rows,
    by,
    difference,
    inference_cost,
    interval,
    mean_and_error,
    measured_depths,
    picture,
    spread,
    title,
    values_of,
)
from harness import RESULTS, read_csv

from gkt_fast.instruments.tables import replace_marked

ROOT = Path(__file__).parents[1]
COMMAND = "python bench/accuracy_report.py --update"
HEADLINE_SETTINGS = (
    {"model": "cifar_resnet20", "train_images": "5000", "epochs": "60"},
    {"model": "vit8", "train_images": "10000"},
    {"model": "cifar_resnet20", "train_images": "1000", "epochs": "100"},
    {"model": "cifar_resnet20", "train_images": "10000", "epochs": "15"},
)
"""What README's table and picture may show, the best first: two of them that have all the rows of the table."""
OLDER = ("stochastic depth", "st", "st++")
"""Methods that came before; the table has the one with the most accurate full network."""
NAMES = {
    "plain": "plain",
    "plain, cost of gkt": "plain, trained on for what GKT costs",
    "stochastic depth": "stochastic depth",
    "st": "Stimulative Training",
    "st++": "Stimulative Training++",
    "gkt": "**GKT**",
    "alone": "the smallest depth, trained alone",
}
"""What the lines of the table are called."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="*", default=[RESULTS / "accuracy.csv"])
    parser.add_argument(
        "--output", type=Path, help="folder of the pictures; default: beside the first CSV file"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help=f"write the tables into {', '.join(sorted({name for name, *_ in DOCUMENTS}))}",
    )
    args = parser.parse_args()
    rows = [row for path in args.csv for row in read_csv(path)]
    accuracy_pictures.write(rows, args.output or args.csv[0].parent)
    if args.output or args.update:
        light, dark = (
            (args.output or ROOT / "docs" / "pictures") / name for name in accuracy_pictures.HEADLINE
        )
        chosen = [row for group in headline_settings(rows).values() for row in group]
        accuracy_pictures.plot_inference(chosen, light, dark)
    for name, mark, write in DOCUMENTS:
        text = write(rows)
        print(text)
        if args.update:
            path = ROOT / name
            path.write_text(replace_marked(path.read_text(), mark, text))


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


def headline(rows: Rows) -> str:
    """README's table: methods down, two settings across, with the accuracy at the largest and the smallest depth."""
    settings = headline_settings(rows)
    groups = [by(group, ["recipe"]) for group in settings.values()]
    older = [name for name in OLDER if all((name,) in group for group in groups)]
    older.sort(key=lambda name: sum(mean_and_error(group[name,], "full")[0] for group in groups))
    names = ["plain", "plain, cost of gkt", *older[-1:], "gkt", "alone"]
    header, lines, legend = ["training"], [[NAMES[name]] for name in names], []
    for letter, (setting, group) in zip("AB", settings.items(), strict=False):
        smallest = smallest_alone(group)
        recipes = by(group, ["recipe"])
        header += [f"{letter}: cost", "full network", f"depth {smallest}"]
        legend.append(f"{letter}: {title(setting)}.")
        for line, name in zip(lines, names, strict=True):
            runs = recipes.get((f"plain {smallest}" if name == "alone" else name,), [])
            relative = f"{accuracy_pictures.relative_cost(runs):.2f}" if runs else ""
            full, part = (spread(values_of(runs, column).values()) for column in ("full", smallest))
            line += [relative, "", full] if name == "alone" else [relative, full, part]
    table = table_of([header, *(line for line in lines if any(line[1:]))])
    return f"{table}\n{' '.join(legend)}\n"


def headline_settings(rows: Rows) -> dict[tuple[str, ...], Rows]:
    """The two of README; where none of them has rows, those that there are."""
    settings = by(rows, SETTING)
    needed = {"plain", "plain, cost of gkt", "gkt"}
    complete = [
        (setting, group)
        for wanted in HEADLINE_SETTINGS
        for setting, group in settings.items()
        if wanted.items() <= group[0].items()
        and needed <= {row["recipe"] for row in group}
        and any(row["recipe"] in ALONE for row in group)
    ]
    return dict(complete[:2]) or settings


def smallest_alone(rows: Rows) -> str:
    """The smallest depths that were trained alone, or else evaluated."""
    alone = {"-".join(map(str, RECIPES[row["recipe"]].alone or ())) for row in rows if row["recipe"] in ALONE}
    depths = measured_depths(rows)
    return next((name for name in reversed(depths) if name in alone), depths[-1])


def opening(rows: Rows) -> str:
    """README's second paragraph: what the smallest depth is worth, in the first of its settings."""
    group = next(iter(headline_settings(rows).values()))
    recipes, smallest = by(group, ["recipe"]), smallest_alone(group)
    if not {("gkt",), ("plain",)} <= recipes.keys():
        return ""
    gkt, plain = (mean_and_error(recipes[name,], smallest)[0] for name in ("gkt", "plain"))
    sentence = (
        f"One training gives one network that works at every depth. Cut down to depth {smallest}, it is right on "
        f"{gkt:.1f} % of the test images, where a plainly trained network is right on {plain:.1f} % "
        "([table](#accuracy-and-cost))."
    )
    return f"{textwrap.fill(sentence, 118, break_on_hyphens=False)}\n"


DOCUMENTS = (
    ("README.md", COMMAND, headline),
    ("README.md", f"{COMMAND} (opening)", opening),
    ("docs/measurements/accuracy.md", COMMAND, report),
)
"""What is written into which document, between which marks."""


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
    if over_steps := of(OVER_STEPS):
        result["One subnet a step, knowledge kept by sample (differences: gkt to plain, others to gkt)"] = (
            accuracies(of(["plain"], over_steps, ["gkt"]))
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
