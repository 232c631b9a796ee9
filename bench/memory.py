"""Activations that a training step keeps for backward, relative to a plain step of the same network in eager torch.

    python bench/memory.py

Counted are distinct storages that hooks on saved tensors see during the forward pass, parameters and buffers left out;
of stacked steps the mean over the subnets of steps 0 to `--steps` - 1. Beside them stands the peak memory of a process
that runs `--peak-steps` whole steps, on Linux, and for fused blocks what recomputing activations in backward costs in
time: the median over repeats of the time relative to a step that keeps them, in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import RESULTS, SavedMemory, environment, measure, print_table, write_csv
from models import MODELS
from throughput import gkt_step, plain_step
from torch import Tensor, nn

from gkt_fast import GKT, GKTConfig, fuse_blocks

WARMUP = 2
FORMS = {"plain+fused": True, "plain+fused, kept": False, "plain+fused, pointwise": "pointwise"}
FORMS |= {form.replace("plain+fused", "stacked"): recompute for form, recompute in FORMS.items()}
"""Steps with fused blocks, and what of activations backward computes again."""
STEPS = ["plain", *FORMS]
COLUMNS = ["model", "step", "saved_ratio", "saved_mib", "peak_mib", "recompute_percent"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["cifar_resnet56", "resnet50_64px"], metavar="MODEL"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="steps whose subnets are counted")
    parser.add_argument("--peak-steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--csv", type=Path, default=RESULTS / "memory.csv")
    parser.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print(json.dumps(peak_mebibytes(args.models[0], args.peak_of, args)))
        return
    rows = [row for name in args.models for row in run(name, args)]
    write_csv(args.csv, rows)
    print_table(rows, COLUMNS)
    print(f"{environment()['device']}, {torch.get_num_threads()} threads; written to {args.csv}")


def run(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one network."""
    saved = {step: saved_mebibytes(name, step, args) for step in STEPS}
    costs = recompute_percent(name, args)
    return [
        {
            "model": name,
            "step": step,
            "saved_ratio": saved[step] / saved["plain"],
            "saved_mib": saved[step],
            "peak_mib": peak_in_a_process(name, step, args),
            "recompute_percent": costs.get(step, ""),
            "batch_size": args.batch_size,
            "steps": args.steps,
            "peak_steps": args.peak_steps,
            "repeats": args.repeats,
            **environment(),
        }
        for step in STEPS
    ]


def build(name: str, step: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, with blocks fused as the step wants them, and a batch; the same for every step."""
    spec = MODELS[name]
    torch.manual_seed(0)
    model = spec.build().to(memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, *spec.sample).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(spec.classes, (args.batch_size,))
    if step != "plain":
        fuse_blocks(model, recompute=FORMS[step])
    return model, images, targets


def saved_mebibytes(name: str, step: str, args: argparse.Namespace) -> float:
    """Of a step, on average over those that differ."""
    model, images, targets = build(name, step, args)
    gkt = GKT(model, GKTConfig(execution="stacked")) if step.startswith("stacked") else None

    def loss_of(index: int) -> Tensor:
        if gkt is None:
            return F.cross_entropy(model(images), targets)
        return gkt(images, targets, step=index).loss

    loss_of(0)  # the first step looks at the model, and runs it for that
    found = []
    for index in range(args.steps if gkt is not None else 1):
        with SavedMemory(model) as memory:
            loss_of(index)
        found.append(memory.peak / 2**20)
    return statistics.fmean(found)


def whole_step(name: str, step: str, args: argparse.Namespace) -> Callable[[], None]:
    """A training step; stacked ones draw their subnets anew."""
    model, images, targets = build(name, step, args)
    if step.startswith("stacked"):
        return gkt_step(GKT(model, GKTConfig(execution="stacked")), images, targets)
    return plain_step(model, images, targets)


def recompute_percent(name: str, args: argparse.Namespace) -> dict[str, float]:
    """What a step that recomputes takes longer than one that keeps, in percent."""
    timed = [step for step in STEPS if step != "plain"]
    timings = measure({step: whole_step(name, step, args) for step in timed}, args.repeats, WARMUP)
    found = {}
    for step in timed:
        if FORMS[step]:
            kept = timings[f"{step.removesuffix(', pointwise')}, kept"]
            pairs = zip(timings[step].milliseconds, kept.milliseconds, strict=True)
            found[step] = 100 * (statistics.median(a / b for a, b in pairs) - 1)
    return found


def peak_in_a_process(name: str, step: str, args: argparse.Namespace) -> float:
    """`peak_mebibytes` of a process of its own."""
    command = [sys.executable, __file__, "--models", name, "--peak-of", step]
    options = {"--batch-size": args.batch_size, "--peak-steps": args.peak_steps, "--threads": args.threads}
    for option, value in options.items():
        if value is not None:
            command += [option, str(value)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def peak_mebibytes(name: str, step: str, args: argparse.Namespace) -> float:
    """The most memory that this process held, all of Python and torch with it."""
    run_step = whole_step(name, step, args)
    for _ in range(args.peak_steps):
        run_step()
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


if __name__ == "__main__":
    main()
