"""How the cost of a step grows with the number of streams, and how it follows the budget that is asked for.

    python bench/scaling.py --model resnet50_64px

Two experiments, each next to a plain step in the same process: S = 2 ... 13 streams, and budgets 1.05 to
2. The cost is the mean over the measured steps, each with its own subnets, relative to the median plain step.
"""

from __future__ import annotations

import argparse
import copy
import csv
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from harness import RESULTS, environment, measure, print_table, write_csv
from models import MODELS
from throughput import WARMUP, gkt_step, plain_step

from gkt_fast import GKT, GKTConfig, pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STREAMS = {2: (1, 1), 3: (2, 1), 4: (3, 1), 5: (2, 2), 7: (3, 2), 10: (3, 3), 13: (3, 4)}
"""Number of streams -> groups, loops."""
BUDGETS = [1.05, 1.1, 1.25, 1.5, 2.0]
COLUMNS = ["experiment", "setting", "mean_ratio", "median_ratio", "expected_flops_ratio", "min_depth"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS], default="cifar_resnet56")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--execution", default="auto")
    parser.add_argument(
        "--experiments", nargs="+", choices=["streams", "budget"], default=["streams", "budget"]
    )
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument(
        "--csv", type=Path, help="default: results/scaling_MODEL.csv; the picture goes beside it"
    )
    parser.add_argument("--plot", action="store_true", help="only draw the CSV")
    args = parser.parse_args()
    path = args.csv or RESULTS / f"scaling_{args.model}.csv"
    if args.plot:
        plot(path)
        return
    configs: dict[tuple[str, float], GKTConfig] = {}
    if "streams" in args.experiments:
        for streams, (groups, loops) in STREAMS.items():
            configs["streams", streams] = GKTConfig(groups=groups, loops=loops, execution=args.execution)
    if "budget" in args.experiments:
        for budget in BUDGETS:
            configs["budget", budget] = GKTConfig(budget=budget, execution=args.execution)
    rows = run(configs, args)
    print_table(rows, COLUMNS)
    write_csv(path, rows)
    plot(path)
    print(f"{environment()['device']}, {torch.get_num_threads()} threads; written to {path}")


def run(configs: dict[tuple[str, float], GKTConfig], args: argparse.Namespace) -> list[dict[str, object]]:
    """Measures all configurations in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = MODELS[args.model]
    batch_size = args.batch_size or spec.batch_size
    torch.manual_seed(0)
    model = spec.build().to(device)
    images = torch.randn(batch_size, *spec.sample, device=device)
    targets = torch.randint(spec.classes, (batch_size,), device=device)
    if images.ndim == 4:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    gkts = {key: GKT(copy.deepcopy(model), config) for key, config in configs.items()}
    for gkt in gkts.values():
        gkt.layers(images)
    steps = {"plain": plain_step(model, images, targets)}
    timings = measure(
        steps | {key: gkt_step(gkt, images, targets) for key, gkt in gkts.items()}, args.repeats, WARMUP
    )
    rows = []
    for (experiment, setting), gkt in gkts.items():
        timing = timings[experiment, setting]
        rows.append(
            {
                "experiment": experiment,
                "setting": setting,
                "mean_ratio": timing.mean_ratio(timings["plain"]),
                "median_ratio": timing.median / timings["plain"].median,
                "expected_flops_ratio": gkt.expected_cost(),
                "min_depth": str(gkt.sampling_config().min_depth),
                "model": args.model,
                "batch_size": batch_size,
                "execution": args.execution,
                "plain_ms": timings["plain"].median,
                "repeats": args.repeats,
                **environment(),
            }
        )
    return rows


def plot(path: Path) -> None:
    """One panel per experiment: measured and expected cost."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    with pictures.picture(path.with_suffix(".png"), (5.2 * len(experiments), 3.8)) as figure:
        panels = figure.subplots(1, len(experiments), squeeze=False)[0]
        for axes, experiment in zip(panels, experiments, strict=True):
            plot_experiment(axes, experiment, [row for row in rows if row["experiment"] == experiment])


def plot_experiment(axes: Axes, experiment: str, rows: list[dict[str, str]]) -> None:
    streams = experiment == "streams"
    question = "What does each further stream cost?" if streams else "Does a step keep to its budget?"
    pictures.ask(axes, question, f"cost of a step in plain steps, {rows[0]['model']}")
    settings = [float(row["setting"]) for row in rows]
    from matplotlib.ticker import NullLocator

    ends = []
    for column, name, colour, line in (
        ("mean_ratio", "measured", pictures.COLOURS["gkt"], "o-"),
        ("expected_flops_ratio", "expected by FLOPs", pictures.COLOURS["st"], "o--"),
        ("setting", "one by one, full depth" if streams else "the budget", pictures.QUIET, ":"),
    ):
        values = [float(row[column]) for row in rows]
        axes.plot(settings, values, line, color=colour)
        ends.append((name, settings[-1], values[-1], colour))
    axes.set_xlabel("streams" if streams else "budget, plain steps")
    if streams:
        axes.set_yscale("log")
        axes.set_yticks([1, 1.5, 2, 3, 5, 8, 12])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.1)
    axes.set_xlim(right=settings[-1] + 0.42 * (settings[-1] - settings[0]))
    pictures.name_lines(axes, ends)


if __name__ == "__main__":
    main()
