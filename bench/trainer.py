"""What `GKTTrainer.fit` costs over a bare loop that calls GKT, and whether memory grows over many steps.

    python bench/trainer.py --model cifar_resnet20

Every repeat trains the same number of steps, on the same batches and with the same subnets, by a loop of five lines, by
`fit` (with its metrics, read once in so many steps), and by `fit` with each of its options. Reported is the median over
the repeats of each time relative to the loop's beside it. Then one long `fit` prints, ten times on its way, the
resident memory of the process and the number of blocks that Python has allocated.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Timing, environment, measure, print_table, write_csv
from models import MODELS
from torch import Tensor, nn

from gkt_fast import GKT, Callback, GKTConfig, GKTTrainer, LinearWarmup

OPTIONS: dict[str, dict[str, Any]] = {
    "fit": {},
    "fit, clip_grad_norm": {"clip_grad_norm": 1.0},
    "fit, ema_decay": {"ema_decay": 0.999},
    "fit, kd_schedule": {"kd_schedule": LinearWarmup(1000)},
    "fit, skip_nonfinite": {"skip_nonfinite": True},
}
COLUMNS = ["what", "ratio", "median_ms", "lower_ms", "upper_ms", "steps"]

Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS], default="cifar_resnet20")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--steps", type=int, default=5, help="of a repeat")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--log-interval", type=int, default=50)
    parser.add_argument("--memory-steps", type=int, default=2000, help="0: don't look at memory")
    parser.add_argument("--memory-batch-size", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=RESULTS / "trainer.csv")
    args = parser.parse_args()
    spec = MODELS[args.model]
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = spec.build().to(device)

    def batches(size: int, count: int) -> Batches:
        return [
            (
                torch.randn(size, *spec.sample, device=device),
                torch.randint(spec.classes, (size,), device=device),
            )
            for _ in range(count)
        ]

    size = args.batch_size or spec.batch_size
    rows = overhead(model, batches(size, args.steps), args)
    print_table(rows, COLUMNS)
    if args.memory_steps:
        memory = growth(model, batches(args.memory_batch_size, args.memory_steps // 10))
        print_table(memory, [*memory[0]])
        print(
            f"growth from the second tenth to the last: {memory[-1]['rss_mib'] - memory[1]['rss_mib']:.2f} MiB"
        )
        rows += [{"what": "memory", "model": args.model, **row, **environment()} for row in memory]
    write_csv(args.csv, rows)
    print(f"{environment()['device']}, {torch.get_num_threads()} threads; written to {args.csv}")


def overhead(model: nn.Module, batches: Batches, args: argparse.Namespace) -> list[dict[str, object]]:
    """Times the loop and `fit` with each of its options in turn."""
    providers = {"bare loop": bare_loop(copy.deepcopy(model), batches)}
    for name, options in OPTIONS.items():
        providers[name] = fit(copy.deepcopy(model), batches, args.log_interval, options)
    timings = measure(providers, args.repeats)
    return [
        {
            "what": name,
            "ratio": paired_ratio(timing, timings["bare loop"]),
            "median_ms": timing.median / len(batches),
            "lower_ms": timing.lower / len(batches),
            "upper_ms": timing.upper / len(batches),
            "steps": len(batches),
            "model": args.model,
            "batch_size": len(batches[0][0]),
            "repeats": args.repeats,
            **environment(),
        }
        for name, timing in timings.items()
    ]


def bare_loop(model: nn.Module, batches: Batches) -> Callable[[], None]:
    """What a script does by itself."""
    gkt = GKT(model, GKTConfig()).train()
    optimizer = make_optimizer(model)

    def run() -> None:
        for images, targets in batches:
            output = gkt(images, targets)
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            optimizer.step()

    return run


def fit(model: nn.Module, batches: Batches, log_interval: int, options: dict[str, Any]) -> Callable[[], None]:
    """One more epoch of as many steps with every call."""
    trainer = GKTTrainer(model, make_optimizer(model), GKTConfig(), **options)

    def run() -> None:
        trainer.fit(batches, epochs=trainer.epoch + 1, log_interval=log_interval, progress=False)

    return run


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """A small step, so that the network stays finite however long it is measured."""
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def paired_ratio(timing: Timing, baseline: Timing) -> float:
    """Median over the repeats of the time relative to the baseline's in the same repeat."""
    pairs = zip(timing.milliseconds, baseline.milliseconds, strict=True)
    return statistics.median(own / other for own, other in pairs)


class MemoryRecord(Callback):
    """Notes the memory after every epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, trainer: GKTTrainer, metrics: dict[str, float]) -> None:
        self.rows.append(
            {
                "steps": trainer.gkt.next_step,
                "rss_mib": resident_bytes() / 2**20,
                "python_blocks": sys.getallocatedblocks(),
            }
        )


def growth(model: nn.Module, batches: Batches) -> list[dict[str, Any]]:
    """Trains ten epochs of these batches with all options."""
    options = {name: value for each in OPTIONS.values() for name, value in each.items()}
    trainer = GKTTrainer(model, make_optimizer(model), GKTConfig(), **options)
    record = MemoryRecord()
    trainer.fit(batches, epochs=10, progress=False, callbacks=[record])
    return record.rows


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system doesn't tell (no /proc), the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
