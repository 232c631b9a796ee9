"""Plain training, Stimulative Training and GKT on scikit-learn's digits, in a few minutes on a laptop's CPU.

    python examples/demo.py

1,797 real images, few of them for training, so that there is something to gain. Prints one table and writes it as
CSV, with a picture of accuracy against cost for every subnet of every network.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from gkt_fast import GKTConfig, GKTTrainer, Subnet, method_config
from gkt_fast.data import Data, digits
from gkt_fast.models import cifar_resnet

METHODS = {
    "plain": method_config("plain"),
    "Stimulative Training": method_config("st", loops=3),
    "GKT": method_config("gkt"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-images", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=20, help="6n + 2 layers")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    args = parser.parse_args()
    if args.train_images < args.batch_size:
        parser.error(
            f"--train-images is {args.train_images}; it must be at least --batch-size ({args.batch_size})"
        )
    torch.set_num_threads(1)  # the layers are too small to share
    args.output.mkdir(parents=True, exist_ok=True)
    data = digits(args.train_images)
    records = []
    started = time.perf_counter()
    for seed in range(args.seeds):
        for method, config in METHODS.items():
            trainer, _ = train(config, seed, data, args)
            records += evaluate(trainer, data, method, seed)
    ratios = step_ratios(data, args)
    shown = shown_depths(args.depth)
    table = summarize(records, ratios, shown)
    print_table(table, args, data, shown)
    print(f"{time.perf_counter() - started:.0f} seconds on {torch.get_num_threads()} threads")
    write_csv(args.output / "demo.csv", table)
    write_csv(args.output / "subnets.csv", records)
    plot(records, args.output / "demo.png")
    print(f"Written to {args.output}: demo.csv, subnets.csv, demo.png")


def train(
    config: GKTConfig, seed: int, data: Data, args: argparse.Namespace
) -> tuple[GKTTrainer, DataLoader]:
    """Trains one network; the seed decides its initial weights, the order of images and the subnets."""
    trainer, loader = make_trainer(config, seed, data, args)
    name = "plain" if not config.groups else f"{config.sampler}, {config.groups} groups x {config.loops}"
    for _ in tqdm(range(args.epochs), desc=f"seed {seed}, {name}", disable=None):
        for images, targets in loader:
            trainer.step(images, targets)
        trainer.scheduler.step()
    return trainer, loader


def make_trainer(
    config: GKTConfig, seed: int, data: Data, args: argparse.Namespace
) -> tuple[GKTTrainer, DataLoader]:
    """A fresh network with its optimizer, schedule and loader."""
    torch.manual_seed(seed)
    model = cifar_resnet(args.depth, data.num_classes, args.width, data.in_channels)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader = DataLoader(data.train, args.batch_size, shuffle=True, drop_last=True)
    trainer = GKTTrainer(model, optimizer, config.replace(seed=seed), scheduler=scheduler, channels_last=True)
    return trainer, loader


def evaluate(trainer: GKTTrainer, data: Data, method: str, seed: int) -> list[dict[str, object]]:
    """Accuracy of every ordered subnet, with BatchNorm statistics of its own, and of the full network as trained."""
    test = DataLoader(data.test, len(data.test))
    calibration = DataLoader(data.train, len(data.train))
    stages = trainer.gkt.stages
    records = []
    for depths in itertools.product(*(range(max(stage.least_depth, 1), stage.depth + 1) for stage in stages)):
        full = all(depth == stage.depth for depth, stage in zip(depths, stages, strict=True))
        result = trainer.evaluate(
            test, None if full else depths, calibration_loader=None if full else calibration
        )
        records.append(
            {
                "method": method,
                "seed": seed,
                "depths": "-".join(map(str, depths)),
                "mflops": subnet_flops(trainer, depths) / 1e6,
                "accuracy": 100 * result.accuracy,
            }
        )
    return records


def subnet_flops(trainer: GKTTrainer, depths: tuple[int, ...]) -> int:
    """Floating point operations of a subnet's forward pass for one image."""
    dropped = Subnet.ordered(depths, trainer.gkt.stages).dropped(trainer.gkt.stages)
    return sum(layer.flops for layer in trainer.gkt.layers() if layer.path not in dropped)


def step_ratios(data: Data, args: argparse.Namespace, repeats: int = 40) -> dict[tuple[str, str], float]:
    """Mean step time of each method and execution mode, relative to a plain step; measured in turn."""
    runs = {}
    for method, config in METHODS.items():
        for execution in ("sequential", "shared") if config.groups else ("shared",):
            runs[method, execution], loader = make_trainer(config.replace(execution=execution), 0, data, args)
    images, targets = next(iter(loader))
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for repeat in range(repeats + 3):
        for key, trainer in runs.items():
            start = time.perf_counter()
            trainer.step(images, targets)
            if repeat >= 3:
                seconds[key].append(time.perf_counter() - start)
    plain = statistics.fmean(seconds["plain", "shared"])
    return {key: statistics.fmean(values) / plain for key, values in seconds.items()}


def shown_depths(depth: int) -> list[str]:
    """The networks in the table: the full one, two thirds of the blocks, one block per stage."""
    blocks = (depth - 2) // 6
    return ["-".join([str(kept)] * 3) for kept in sorted({blocks, max(1, 2 * blocks // 3), 1}, reverse=True)]


def summarize(
    records: list[dict[str, object]], ratios: dict[tuple[str, str], float], shown: list[str]
) -> list[dict[str, object]]:
    """One row per method; for each of the depths `shown` the mean and spread over the seeds."""
    table = []
    for method in METHODS:
        row: dict[str, object] = {"method": method}
        for depths in shown:
            values = [r["accuracy"] for r in records if r["method"] == method and r["depths"] == depths]
            row[f"{depths} mean"] = statistics.fmean(values)
            row[f"{depths} std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        row["step shared"] = ratios[method, "shared"]
        row["step sequential"] = ratios.get((method, "sequential"), ratios[method, "shared"])
        table.append(row)
    return table


def print_table(
    table: list[dict[str, object]], args: argparse.Namespace, data: Data, shown: list[str]
) -> None:
    """The result, as measured."""
    print(
        f"\nTest accuracy in %, {args.seeds} seeds (mean +- standard deviation), {len(data.test)} test images, "
        f"{args.train_images} training images,\n{args.epochs} epochs, ResNet-{args.depth} and its subnets by depths; "
        "step time in plain steps\n"
    )
    print(f"{'method':22}{''.join(depths.rjust(16) for depths in shown)}{'shared':>9}{'one by one':>12}")
    for row in table:
        cells = "".join(
            f"{row[f'{depths} mean']:.2f} +- {row[f'{depths} std']:.2f}".rjust(16) for depths in shown
        )
        print(f"{row['method']:22}{cells}{row['step shared']:9.2f}{row['step sequential']:12.2f}")
    gain = table[-1][f"{shown[0]} mean"] - table[0][f"{shown[0]} mean"]
    print(f"\nGKT against plain training, full network: {gain:+.2f} points\n")


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes rows of the same columns."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(records: list[dict[str, object]], path: Path) -> None:
    """Accuracy of every subnet against its cost, mean over seeds; the line is the best accuracy up to a cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in METHODS:
        by_depths: dict[str, list[dict[str, object]]] = {}
        for record in records:
            if record["method"] == method:
                by_depths.setdefault(record["depths"], []).append(record)
        points = sorted(
            (group[0]["mflops"], statistics.fmean(record["accuracy"] for record in group))
            for group in by_depths.values()
        )
        best = list(itertools.accumulate((accuracy for _, accuracy in points), max))
        dots = axes.plot(*zip(*points, strict=True), "o", markersize=4, alpha=0.5)[0]
        axes.step([cost for cost, _ in points], best, where="post", color=dots.get_color(), label=method)
    axes.set_xlabel("forward cost of a subnet (MFLOPs per image)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("scikit-learn digits: every subnet of every network")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
