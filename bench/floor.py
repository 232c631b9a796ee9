"""The least that a GKT step can cost: its convolutions and matrix products alone, as the library runs them.

    python bench/floor.py --model cifar_resnet56

Records every convolution and matrix product of plain steps and of stacked GKT steps (forward and backward, with shapes
and strides), and runs those calls by themselves, each several times. Their sum over a plain step's time is the floor
of any execution that computes every state once with this library; what is above it is BatchNorm, ReLU, additions, the
optimizer, Python and memory. A matrix product of 1024x1024x1024 stands for what the machine can do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import RESULTS, environment, measure, print_table, write_csv
from models import MODELS

from gkt_fast import GKT, GKTConfig
from gkt_fast.instruments.recorded_calls import Call, Recorder, time_calls

COLUMNS = [
    "model",
    "step",
    "step_ms",
    "library_ms",
    "ratio",
    "floor_ratio",
    "library_share",
    "gflop",
    "gflops_per_s",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--steps", type=int, default=10, help="steps of new subnets")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each distinct call")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--csv", type=Path, default=RESULTS / "floor.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = list(MODELS) if args.model == "all" else [args.model]
    rows = [row for name in names for row in run(name, args)]
    write_csv(args.csv, rows)
    print_table(rows, COLUMNS)
    peak = matrix_product_gflops()
    print(
        f"matrix product of 1024: {peak:.0f} GFLOP/s; {environment()['device']}, {torch.get_num_threads()} threads"
    )


def run(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """One row for plain steps and one for GKT's."""
    spec = MODELS[name]
    batch_size = args.batch_size or spec.batch_size
    torch.manual_seed(0)
    model = spec.build()
    images = torch.randn(batch_size, *spec.sample)
    if images.dim() == 4:
        model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    targets = torch.randint(spec.classes, (batch_size,))
    plain, stacked = steps(model, images, targets)
    calls: dict[str, Counter[Call]] = {}
    for kind, step in (("plain", plain), ("stacked", stacked)):
        calls[kind] = Counter()
        for index in range(args.steps):
            with Recorder(calls[kind]):
                step(index)
    index = iter(range(10**9))
    timings = measure(
        {"plain": lambda: plain(0), "stacked": lambda: stacked(next(index) % args.steps)},
        args.steps,
        warmup=0,
    )
    milliseconds = time_calls(set().union(*calls.values()), args.repeats)
    rows = []
    for kind, counter in calls.items():
        library = sum(number * milliseconds[call] for call, number in counter.items()) / args.steps
        flop = sum(number * call.flop for call, number in counter.items()) / args.steps
        step_ms = statistics.fmean(timings[kind].milliseconds)
        plain_ms = statistics.fmean(timings["plain"].milliseconds)
        rows.append(
            {
                "model": name,
                "step": kind,
                "step_ms": step_ms,
                "library_ms": library,
                "ratio": step_ms / plain_ms,
                "floor_ratio": library / plain_ms,
                "library_share": library / step_ms,
                "gflop": flop / 1e9,
                "gflops_per_s": flop / library / 1e6,
                "batch_size": batch_size,
                **environment(),
            }
        )
    return rows


def steps(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor
) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Forward and backward of the plain network as it is, and of a stacked GKT step."""
    gkt = GKT(copy.deepcopy(model), GKTConfig(execution="stacked"))

    def plain(index: int) -> None:
        model.zero_grad()
        F.cross_entropy(model(images), targets).backward()

    def stacked(index: int) -> None:
        gkt.zero_grad()
        gkt(images, targets, step=index).loss.backward()

    return plain, stacked


def matrix_product_gflops(size: int = 1024, repeats: int = 30) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    timing = measure({"product": lambda: a @ b}, repeats)["product"]
    return 2 * size**3 / timing.median / 1e6


if __name__ == "__main__":
    main()
