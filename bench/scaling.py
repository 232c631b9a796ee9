"""How the cost of a step grows with the number of streams, and how it follows the budget that is asked for.

    python bench/scaling.py --model resnet50_64px

Two experiments, each next to a plain step in the same process: S = 2 ... 13 streams, and budgets 1.05 to
2. The cost is the mean over the measured steps, each with its own subnets, relative to the median plain step.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from harness import RESULTS, environment, measure, print_table, write_csv
from models import MODELS
from throughput import WARMUP, gkt_step, plain_step

from gkt_fast import GKT, GKTConfig

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
    args = parser.parse_args()
    configs: dict[tuple[str, float], GKTConfig] = {}
    if "streams" in args.experiments:
        for streams, (groups, loops) in STREAMS.items():
            configs["streams", streams] = GKTConfig(groups=groups, loops=loops, execution=args.execution)
    if "budget" in args.experiments:
        for budget in BUDGETS:
            configs["budget", budget] = GKTConfig(budget=budget, execution=args.execution)
    rows = run(configs, args)
    print_table(rows, COLUMNS)
    path = args.csv or RESULTS / f"scaling_{args.model}.csv"
    write_csv(path, rows)
    plot(rows, args.model, path.with_suffix(".png"))
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


def plot(rows: list[dict[str, object]], model: str, path: Path) -> None:
    """One panel per experiment: measured and expected cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    figure, panels = plt.subplots(1, len(experiments), figsize=(5 * len(experiments), 3.8), squeeze=False)
    for axes, experiment in zip(panels[0], experiments, strict=True):
        chosen = [row for row in rows if row["experiment"] == experiment]
        settings = [row["setting"] for row in chosen]
        axes.plot(settings, [row["mean_ratio"] for row in chosen], "o-", label="measured (mean)")
        axes.plot(settings, [row["expected_flops_ratio"] for row in chosen], "x--", label="expected (FLOPs)")
        reference = "one by one, at full depth" if experiment == "streams" else "budget"
        axes.plot(settings, settings, ":", color="gray", label=reference)
        axes.set_xlabel("streams S" if experiment == "streams" else "budget (plain steps)")
        axes.set_ylabel("step time (plain steps)")
        axes.set_title(model)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
