"""What every depth of a network reaches: trained plainly, by Stimulative Training, by GKT, and each depth alone.

    python examples/demo.py

Takes a few minutes on a laptop's CPU. The images are scikit-learn's digits at random places of a noisy background, a
task in which depth pays. Prints one table and writes it as CSV, with a picture of accuracy against cost.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from gkt_fast import GKTConfig, GKTTrainer, Subnet, extract_subnet, method_config, pictures
from gkt_fast.data import Data, digits
from gkt_fast.models import cifar_resnet

METHODS = {
    "plain": method_config("plain"),
    "Stimulative Training": method_config("st"),
    "GKT": method_config("gkt"),
}
PLACES = {"plain": (10, -3), "Stimulative Training": (0, 28), "GKT": (0, 13), "alone": (8, -14)}
"""Of the names in the picture, in points from the first point of each line."""
COLOURS = {"plain": "plain", "Stimulative Training": "st", "GKT": "gkt", "alone": "alone"}
SIDE = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--depth", type=int, default=20, help="6n + 2 layers")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    args = parser.parse_args()
    if args.train_images < args.batch_size:
        parser.error(
            f"--train-images is {args.train_images}; it must be at least --batch-size ({args.batch_size})"
        )
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    data = scattered(digits(args.train_images))
    chain = depths_of(args.depth)
    runs = [(method, None) for method in METHODS]
    runs += [("alone", depths) for depths in chain[1:] if len(set(depths)) == 1]
    print(
        f"Digits at random places of noisy {SIDE}x{SIDE} images: {len(data.train)} to train on, "
        f"{len(data.test)} to test.\n{len(runs)} networks, {args.seeds} seeds each, {args.epochs} epochs; "
        "a few minutes."
    )
    started = time.perf_counter()
    work = partial(run_seed, runs=runs, chain=chain, data=data, args=args)
    processes = min(args.seeds, os.cpu_count() or 1)
    if processes == 1:
        results = map(work, range(args.seeds))
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(work, range(args.seeds)))
    records = [record for result in results for record in result]
    ratios = step_ratios(data, args)
    table = summarize(records, ratios, [joined(depths) for depths in chain if len(set(depths)) == 1])
    print_table(table, args)
    write_csv(args.output / "demo.csv", table)
    write_csv(args.output / "subnets.csv", records)
    plot(records, args.output / "demo.png")
    print(f"{time.perf_counter() - started:.0f} seconds in {processes} processes.", end=" ")
    print(f"Written to {args.output}: demo.csv, subnets.csv, demo.png")
    print_next()


def run_seed(
    seed: int,
    runs: list[tuple[str, tuple[int, ...] | None]],
    chain: list[tuple[int, ...]],
    data: Data,
    args: argparse.Namespace,
) -> list[dict[str, object]]:
    """Trains and evaluates all networks of a seed, on one thread: the layers are too small to share."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    records = []
    for method, depths in runs:
        trainer, loader = make_trainer(METHODS.get(method, METHODS["plain"]), seed, data, args, depths)
        name = method if depths is None else f"{joined(depths)} alone"
        train(trainer, loader, args.epochs, f"seed {seed}, {name}", started)
        records += evaluate(trainer, data, method, seed, chain if depths is None else [depths])
    return records


def scattered(data: Data) -> Data:
    """The digits at random places of images full of noise: the same ones in every run."""
    generator = torch.Generator().manual_seed(0)

    def scatter(dataset: TensorDataset) -> TensorDataset:
        images, targets = dataset.tensors
        background = images.min()
        canvas = background.expand(len(images), 1, SIDE, SIDE).clone()
        corners = torch.randint(SIDE - 7, (len(images), 2), generator=generator)
        for image, digit, (row, column) in zip(canvas, images, corners.tolist(), strict=True):
            image[:, row : row + 8, column : column + 8] = digit
        return TensorDataset(canvas + 0.8 * torch.randn(canvas.shape, generator=generator), targets)

    return Data(scatter(data.train), scatter(data.test), data.num_classes, data.in_channels)


def depths_of(depth: int) -> list[tuple[int, ...]]:
    """A chain of nested subnets from the full network to one block per stage; the last stages lose blocks first."""
    blocks = (depth - 2) // 6
    chain = [(blocks,) * 3]
    while sum(chain[-1]) > 3:
        depths = chain[-1]
        largest = max(stage for stage in range(3) if depths[stage] == max(depths))
        chain.append(tuple(kept - (stage == largest) for stage, kept in enumerate(depths)))
    return chain


def joined(depths: tuple[int, ...]) -> str:
    return "-".join(map(str, depths))


def make_trainer(
    config: GKTConfig, seed: int, data: Data, args: argparse.Namespace, depths: tuple[int, ...] | None = None
) -> tuple[GKTTrainer, DataLoader]:
    """A fresh network with its optimizer, schedule and loader; the seed decides weights, order of images and subnets.

    With `depths` the network has so many blocks from the start.
    """
    torch.manual_seed(seed)
    model = cifar_resnet(args.depth, data.num_classes, args.width, data.in_channels)
    model = model if depths is None else extract_subnet(model, depths)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    loader = DataLoader(data.train, args.batch_size, shuffle=True, drop_last=True)
    steps = max(args.epochs * len(loader), 2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.2)
    trainer = GKTTrainer(model, optimizer, config.replace(seed=seed), scheduler=scheduler, channels_last=True)
    return trainer, loader


def train(trainer: GKTTrainer, loader: DataLoader, epochs: int, name: str, started: float) -> None:
    """Shows a bar on a terminal, and a line elsewhere."""
    for _ in tqdm(range(epochs), desc=name, disable=None):
        for images, targets in loader:
            trainer.step(images, targets)
            trainer.scheduler.step()
    if not sys.stderr.isatty():
        print(f"{time.perf_counter() - started:4.0f} s  {name} trained", flush=True)


def evaluate(
    trainer: GKTTrainer, data: Data, method: str, seed: int, chain: list[tuple[int, ...]]
) -> list[dict[str, object]]:
    """Accuracy of each subnet, with BatchNorm statistics of its own, and of the full network as trained."""
    test, calibration = DataLoader(data.test, 500), DataLoader(data.train, 500)
    full = tuple(stage.depth for stage in trainer.gkt.stages)
    records = []
    for depths in chain:
        whole = method == "alone" or depths == full
        result = trainer.evaluate(
            test, None if whole else depths, calibration_loader=None if whole else calibration
        )
        flops = subnet_flops(trainer, full if whole else depths)
        records.append(
            {
                "method": method,
                "seed": seed,
                "depths": joined(depths),
                "mflops": flops / 1e6,
                "accuracy": 100 * result.accuracy,
            }
        )
    return records


def subnet_flops(trainer: GKTTrainer, depths: tuple[int, ...]) -> int:
    """Floating point operations of a subnet's forward pass for one image."""
    dropped = Subnet.ordered(depths, trainer.gkt.stages).dropped(trainer.gkt.stages)
    return sum(layer.flops for layer in trainer.gkt.layers() if layer.path not in dropped)


def step_ratios(data: Data, args: argparse.Namespace, repeats: int = 20) -> dict[tuple[str, str], float]:
    """Mean CPU time of a step of each method and execution mode, relative to a plain step; measured in turn."""
    runs = {}
    for method, config in METHODS.items():
        for execution in ("sequential", "auto") if config.groups else ("auto",):
            runs[method, execution], loader = make_trainer(config.replace(execution=execution), 0, data, args)
    images, targets = next(iter(loader))
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for repeat in range(repeats + 3):
        for key, trainer in runs.items():
            start = time.thread_time()
            trainer.step(images, targets)
            if repeat >= 3:
                seconds[key].append(time.thread_time() - start)
    plain = statistics.fmean(seconds["plain", "auto"])
    return {key: statistics.fmean(values) / plain for key, values in seconds.items()}


def summarize(
    records: list[dict[str, object]], ratios: dict[tuple[str, str], float], shown: list[str]
) -> list[dict[str, object]]:
    """One row per method; for each of the depths `shown` the mean and spread over the seeds."""
    table = []
    for method in (*METHODS, "alone"):
        row: dict[str, object] = {"method": method}
        for depths in shown:
            of = "plain" if method == "alone" and depths == shown[0] else method
            values = [r["accuracy"] for r in records if r["method"] == of and r["depths"] == depths]
            row[f"{depths} mean"] = statistics.fmean(values)
            row[f"{depths} std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        row["step shared"] = ratios.get((method, "auto"), "")
        row["step one by one"] = ratios.get((method, "sequential"), row["step shared"])
        table.append(row)
    return table


def print_table(table: list[dict[str, object]], args: argparse.Namespace) -> None:
    """The result, as measured."""
    shown = [name.removesuffix(" mean") for name in table[0] if name.endswith(" mean")]
    print(
        f"\nTest accuracy in %, mean +- standard deviation of {args.seeds} seeds, of ResNet-{args.depth} "
        "and its subnets by depths;\ncost of a step in plain steps\n"
    )
    print(f"{'trained':22}{''.join(depths.rjust(16) for depths in shown)}{'shared':>9}{'one by one':>12}")
    for row in table:
        cells = "".join(
            f"{row[f'{depths} mean']:.2f} +- {row[f'{depths} std']:.2f}".rjust(16) for depths in shown
        )
        costs = [row["step shared"], row["step one by one"]]
        texts = [f"{cost:.2f}" if isinstance(cost, float) else "" for cost in costs]
        name = "each depth alone" if row["method"] == "alone" else row["method"]
        print(f"{name:22}{cells}{texts[0]:>9}{texts[1]:>12}".rstrip())
    smallest = f"{shown[-1]} mean"
    gain = table[list(METHODS).index("GKT")][smallest] - table[0][smallest]
    print(f"\nGKT against plain training, one block per stage: {gain:+.2f} points\n")


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes rows of the same columns."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(records: list[dict[str, object]], path: Path) -> None:
    """Accuracy against the cost of inference, means over the seeds: a line per method, points for depths alone."""
    with pictures.picture(path, (7, 4.3)) as figure:
        axes = figure.subplots()
        pictures.ask(
            axes,
            "How accurate is each depth of one trained network?",
            "digits in noise, test accuracy (%), mean over seeds",
        )
        for method in (*METHODS, "alone"):
            points: dict[float, list[float]] = {}
            for record in records:
                full = record["method"] == "plain" and record["depths"] == records[0]["depths"]
                if record["method"] == method or (method == "alone" and full):
                    points.setdefault(record["mflops"], []).append(record["accuracy"])
            means = sorted((cost, statistics.fmean(accuracies)) for cost, accuracies in points.items())
            colour = pictures.COLOURS[COLOURS[method]]
            axes.plot(*zip(*means, strict=True), "s" if method == "alone" else "o-", color=colour)
            axes.annotate(
                "each depth trained alone" if method == "alone" else method,
                means[0],
                PLACES[method],
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                fontweight="bold",
                color=colour,
            )
        axes.set_xlabel("cost of inference, MFLOPs per image")
        axes.margins(x=0.04, y=0.14)


def print_next() -> None:
    python = os.path.relpath(sys.executable)
    python = python if not python.startswith("..") else "python"
    print(
        f"""
Next:
  {python} examples/cascade.py
      one network at every depth, and early exits
  {python} -m gkt_fast train --data digits --epochs 10 -b 50 --output runs --experiment digits
      the same training on the command line
  {python} -m gkt_fast train --data imagefolder:photos --epochs 30 -b 32 --output runs
      images of yours, in photos/train/CLASS/ and photos/val/CLASS/"""
    )


if __name__ == "__main__":
    main()
