"""Cost of other ways to train with skipped blocks, next to GKT: a transformer of the bench's ViT-like shape.

    python bench/alternatives.py

- one by one: the structure of Stimulative Training's loop, a subnet's pass after the full network's, from the stem on
  (`execution="sequential"`), with one uniformly drawn subnet and with GKT's three.
- drop path on subsets of the batch (as published with DINOv2, arXiv 2304.07193): every residual branch runs on a random
  subset of the samples, scaled up, so that dropping saves time. One network, no soft labels: regularisation only.
- GKT, `stacked`.

Ratios of medians to a plain step; all in turn in one process.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from harness import RESULTS, environment, measure, print_table, write_csv
from models import MODELS
from throughput import gkt_step, plain_step

from gkt_fast import GKT, method_config
from gkt_fast.instruments.transformer import with_drop_path

RATES = (0.1, 0.3, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=MODELS["vit_like"].batch_size)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--csv", type=Path, default=RESULTS / "alternatives.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    spec = MODELS["vit_like"]
    model = spec.build()
    images, targets = (
        torch.randn(args.batch_size, *spec.sample),
        torch.randint(spec.classes, (args.batch_size,)),
    )

    def gkt(method: str, execution: str):
        return gkt_step(
            GKT(copy.deepcopy(model), method_config(method, execution=execution)), images, targets
        )

    providers = {"plain": plain_step(copy.deepcopy(model), images, targets)}
    for rate in RATES:
        providers[f"drop path on subsets, rate {rate}"] = plain_step(
            with_drop_path(model, rate), images, targets
        )
    for method in ("st", "gkt"):
        for execution in ("sequential", "stacked"):
            providers[f"{method}, {execution}"] = gkt(method, execution)
    timings = measure(providers, args.repeats)
    rows = [
        {
            "method": name,
            "ratio": timing.median / timings["plain"].median,
            "median_ms": timing.median,
            "lower_ms": timing.lower,
            "upper_ms": timing.upper,
            "batch_size": args.batch_size,
            **environment(),
        }
        for name, timing in timings.items()
    ]
    write_csv(args.csv, rows)
    print_table(rows, ["method", "ratio", "median_ms", "lower_ms", "upper_ms"])


if __name__ == "__main__":
    main()
