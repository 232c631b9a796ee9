"""What finding, intercepting and looking up states costs: `shared` execution against a shared step written by hand.

    python bench/overhead.py --model cifar_resnet56

Both run the same blocks on the same subnets, every distinct activation once, and the same loss. The one written by
hand (gkt_fast/instruments/hand_written.py) knows the network: it walks its three stages and keeps their activations in
dicts. Reported is the median over the
steps of the time of `shared` relative to it, and both relative to a plain step of the same model.

Two rows more say what trust costs: "check", once before the first step of a mode (of `stacked`, which `auto` tries
first), and "setup", what every step pays to notice that modes, flags, hooks or modules changed.

    python bench/overhead.py --host

measures what the host does instead: steps on images so small that only calls count (2x3x8x8, ResNet-50 2x3x32x32), on
one thread, in the memory of the last step's gradients. Rows are a plain step, one with fused blocks, and a stacked one;
the ratio is the median over the steps of the time relative to the plain step.
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
from harness import RESULTS, environment, measure, print_table, write_csv
from models import MODELS
from throughput import gkt_step, plain_step
from torch import Tensor, nn

from gkt_fast import GKT, GKTConfig, fuse_blocks
from gkt_fast.execution import EXECUTION_MODES
from gkt_fast.execution.verification import Verification
from gkt_fast.instruments.hand_written import hand_written_step
from gkt_fast.subnets.streams import make_streams

WARMUP = 2
COLUMNS = ["model", "step", "overhead_percent", "ratio", "median_ms", "lower_ms", "upper_ms"]
HOST_COLUMNS = ["model", "step", "ratio", "median_ms", "lower_ms", "upper_ms"]
HOST_IMAGES = {"cifar_resnet56": (2, 3, 8, 8), "resnet50_64px": (2, 3, 32, 32)}
CIFAR_RESNETS = [name for name in MODELS if name.startswith("cifar_resnet")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=CIFAR_RESNETS, default="cifar_resnet56")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument(
        "--fuse", action=argparse.BooleanOptionalAction, default=True, help="run fused blocks"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--host", action="store_true", help="what the host does, on tiny images")
    parser.add_argument("--csv", type=Path, help="default: overhead.csv or host.csv")
    args = parser.parse_args()
    if args.host:
        args.threads = 1
    args.csv = args.csv or RESULTS / ("host.csv" if args.host else "overhead.csv")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for name in HOST_IMAGES for row in run_host(name, args)] if args.host else run(args)
    write_csv(args.csv, rows)
    print_table(rows, HOST_COLUMNS if args.host else COLUMNS)
    print(f"{environment()['device']}, {torch.get_num_threads()} threads; written to {args.csv}")


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """Measures plain, hand-written and shared steps, and the check of a mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = MODELS[args.model]
    batch_size = args.batch_size or spec.batch_size
    torch.manual_seed(0)
    model = spec.build().to(device, memory_format=torch.channels_last)
    images = torch.randn(batch_size, *spec.sample, device=device).contiguous(
        memory_format=torch.channels_last
    )
    targets = torch.randint(spec.classes, (batch_size,), device=device)
    if args.fuse:
        fuse_blocks(model)
    config = GKTConfig(groups=args.groups, loops=args.loops, execution="shared", fuse_blocks=args.fuse)
    steps = {
        "plain": plain_step(copy.deepcopy(model), images, targets),
        "by hand": hand_written_training_step(GKT(copy.deepcopy(model), config), images, targets),
        "shared": gkt_step(GKT(copy.deepcopy(model), config), images, targets),
        **trust(GKT(copy.deepcopy(model), config), images),
    }
    timings = measure(steps, args.repeats, WARMUP)
    by_hand = timings["by hand"].milliseconds
    return [
        {
            "model": args.model,
            "step": name,
            "overhead_percent": 100
            * (statistics.median(map(lambda a, b: a / b, timing.milliseconds, by_hand)) - 1)
            if name in ("by hand", "shared")
            else "",
            "ratio": timing.median / timings["plain"].median,
            "median_ms": timing.median,
            "lower_ms": timing.lower,
            "upper_ms": timing.upper,
            "batch_size": batch_size,
            "groups": args.groups,
            "loops": args.loops,
            "fused": args.fuse,
            "repeats": args.repeats,
            **environment(),
        }
        for name, timing in timings.items()
    ]


def run_host(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measures plain, fused and stacked steps on tiny images."""
    spec = MODELS[name]
    torch.manual_seed(0)
    model = spec.build()
    images = torch.randn(HOST_IMAGES[name])
    targets = torch.randint(spec.classes, (images.shape[0],))
    fused, stacked = copy.deepcopy(model), copy.deepcopy(model)
    fuse_blocks(fused)
    gkt = GKT(stacked, GKTConfig(groups=args.groups, loops=args.loops, execution="stacked"))
    steps = itertools.count()
    timings = measure(
        {
            "plain": host_step(model, lambda: F.cross_entropy(model(images), targets)),
            "plain+fused": host_step(fused, lambda: F.cross_entropy(fused(images), targets)),
            "stacked": host_step(stacked, lambda: gkt(images, targets, step=next(steps)).loss),
        },
        args.repeats,
        WARMUP,
        time.thread_time,
    )
    plain = timings["plain"].milliseconds
    return [
        {
            "model": name,
            "step": step,
            "ratio": statistics.median(map(lambda a, b: a / b, timing.milliseconds, plain)),
            "median_ms": timing.median,
            "lower_ms": timing.lower,
            "upper_ms": timing.upper,
            "images": "x".join(map(str, HOST_IMAGES[name])),
            "groups": args.groups,
            "loops": args.loops,
            "repeats": args.repeats,
            **environment(),
        }
        for step, timing in timings.items()
    ]


def host_step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step whose gradients stay in the memory that they have: new memory would cost page faults."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        loss = loss_of()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()

    return step


def trust(gkt: GKT, images: Tensor) -> dict[str, Callable[[], None]]:
    """What is done to trust a mode: the check before its first step, and what notices a change in every step."""
    network = gkt.network
    streams = make_streams(gkt.sample(0), gkt.stages, gkt.config)
    gkt.layers(images)

    def check() -> None:
        with network.seeing((images,)):
            reason = Verification(network, (images,), streams).reason_against(EXECUTION_MODES["stacked"])
        assert reason is None, reason

    return {"check": check, "setup": network.note_setup}


def hand_written_training_step(gkt: GKT, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """As `throughput.gkt_step`, on the same subnets, without the package's execution."""
    steps = itertools.count()
    optimizer = torch.optim.SGD(gkt.model.parameters(), lr=1e-3, momentum=0.9)
    norms = [module for module in gkt.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def step() -> None:
        depths = [subnet.depths for subnet in gkt.sample(next(steps))]
        loss, _ = hand_written_step(gkt.model, norms, images, targets, depths, gkt.config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
