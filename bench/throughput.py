"""Time of a training step (forward, backward, SGD) under GKT, relative to a plain step of the same network.

    python bench/throughput.py --model cifar_resnet56

Every repeat draws new subnets and runs all modes on them, one after another, next to a plain step of the model as it
is (eager, blocks not fused). Reported are the medians, the quartiles, the ratio of the medians, the mean ratio (what
training pays on average: the cost varies with the subnets), the same in FLOPs, and the most activation memory that
autograd held during a step. sequential+compile runs the streams one by one with compiled blocks;
plain+fused is plain training with `gkt_fast.fuse_blocks`. `--subnet-share 1.0 0.5 0.25` runs the GKT modes with
subnets on each of these parts of the batch. On one CPU thread times are the thread's own, so that others on the machine
don't add to them. Rows of other models stay in the CSV file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import RESULTS, SavedMemory, environment, measure, print_table, read_csv, write_csv
from models import MODELS

from gkt_fast import GKT, GKTConfig, fuse_blocks

WARMUP = 2
MODES = ["plain+fused", "sequential", "sequential+compile", "shared", "stacked", "lean"]
COLUMNS = [
    "model",
    "mode",
    "subnet_share",
    "ratio",
    "mean_ratio",
    "median_ms",
    "lower_ms",
    "upper_ms",
    "flops_ratio",
    "saved_mib",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--subnet-share", type=float, nargs="+", default=[1.0])
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--csv", type=Path, default=RESULTS / "throughput.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = list(MODELS) if args.model == "all" else [args.model]
    rows = [row for name in names for row in run(name, args)]
    others = [row for row in read_csv(args.csv) if row["model"] not in names]
    write_csv(args.csv, [*others, *rows])
    print_table(rows, COLUMNS)
    print(f"{environment()['device']}, {torch.get_num_threads()} threads; written to {args.csv}")


def run(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measures one model in every mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = MODELS[name]
    batch_size = args.batch_size or spec.batch_size
    torch.manual_seed(0)
    model = spec.build().to(device)
    images = torch.randn(batch_size, *spec.sample, device=device)
    targets = torch.randint(spec.classes, (batch_size,), device=device)
    if args.channels_last and images.ndim == 4:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    plain = ("plain", 1.0)
    steps: dict[tuple[str, float], Callable[[], None]] = {plain: plain_step(model, images, targets)}
    models, flops = {plain: model}, {plain: 1.0}
    for mode in args.modes:
        for share in [1.0] if mode == "plain+fused" else args.subnet_share:
            key = mode, share
            models[key] = copy.deepcopy(model)
            if mode == "plain+fused":
                fuse_blocks(models[key])
                steps[key], flops[key] = plain_step(models[key], images, targets), 1.0
                continue
            gkt = make_gkt(models[key], mode, share, args)
            gkt.layers(images)
            steps[key], flops[key] = gkt_step(gkt, images, targets), flops_ratio(gkt, mode, args.repeats)
    one_thread = device == "cpu" and torch.get_num_threads() == 1
    timings = measure(steps, args.repeats, WARMUP, time.thread_time if one_thread else time.perf_counter)
    rows = []
    for key, timing in timings.items():
        mode, share = key
        rows.append(
            {
                "model": name,
                "mode": mode,
                "subnet_share": share,
                "ratio": timing.median / timings[plain].median,
                "mean_ratio": timing.mean_ratio(timings[plain]),
                "median_ms": timing.median,
                "lower_ms": timing.lower,
                "upper_ms": timing.upper,
                "flops_ratio": flops[key],
                "saved_mib": saved_mebibytes(models[key], steps[key]),
                "batch_size": batch_size,
                "groups": args.groups,
                "loops": args.loops,
                "channels_last": args.channels_last,
                "repeats": args.repeats,
                **environment(),
            }
        )
    return rows


def make_gkt(model: torch.nn.Module, mode: str, share: float, args: argparse.Namespace) -> GKT:
    """The model in one mode. `sequential` runs the model as it is, the others with fused blocks."""
    execution = mode.partition("+")[0]
    config = GKTConfig(
        groups=args.groups,
        loops=args.loops,
        subnet_share=share,
        execution=execution,
        fuse_blocks=execution != "sequential",
    )
    gkt = GKT(model, config)
    if mode.endswith("+compile"):
        for stage in gkt.stages:
            for path in stage.blocks:
                model.get_submodule(path).compile()
    return gkt


def saved_mebibytes(model: torch.nn.Module, step: Callable[[], None]) -> float:
    """The most over three steps."""
    memory = SavedMemory(model)
    with memory:
        for _ in range(3):
            step()
    return memory.peak / 2**20


def plain_step(model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """A training step of the network alone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def gkt_step(gkt: GKT, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """A GKT training step; each call draws the next subnets."""
    steps = itertools.count()
    optimizer = torch.optim.SGD(gkt.model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        output = gkt(images, targets, step=next(steps))
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        optimizer.step()

    return step


def flops_ratio(gkt: GKT, mode: str, repeats: int) -> float:
    """Mean cost of the measured steps in plain steps, from the execution plan."""
    costs = [gkt.cost(gkt.sample(WARMUP + step)) for step in range(repeats)]
    return statistics.fmean(
        c.sequential_ratio if mode.startswith("sequential") else c.shared_ratio for c in costs
    )


if __name__ == "__main__":
    main()
