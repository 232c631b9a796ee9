"""A whole plain training step of a CIFAR ResNet-56 with fused blocks against eager ones.

    python bench/fusion.py [--repeats 10] [--threads 2] [--retain-memory]

Prints a table and writes bench/results/fusion.csv.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from harness import RESULTS, environment, measure, print_table, write_csv
from norm import retain_memory

from gkt_fast import fuse_blocks
from gkt_fast.models.cifar_resnet import cifar_resnet


def step(fused: bool, depth: int, batch: int):
    """One forward and backward pass with SGD."""
    torch.manual_seed(0)
    model = cifar_resnet(depth).to(memory_format=torch.channels_last)
    if fused:
        fuse_blocks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    targets = torch.randint(0, 10, (batch,))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--retain-memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.retain_memory:
        retain_memory()
    sizes = arguments.depth, arguments.batch
    timings = measure({"eager": step(False, *sizes), "fused": step(True, *sizes)}, arguments.repeats)
    table = [
        {
            "model": f"cifar_resnet({arguments.depth})",
            "batch": arguments.batch,
            "blocks": name,
            "ms": timing.median,
            "ms_lower": timing.lower,
            "ms_upper": timing.upper,
            "speedup_over_eager": timings["eager"].median / timing.median,
            "memory": "retained" if arguments.retain_memory else "default",
            **environment(),
        }
        for name, timing in timings.items()
    ]
    print_table(
        table, ["model", "batch", "blocks", "ms", "ms_lower", "ms_upper", "speedup_over_eager", "memory"]
    )
    write_csv(RESULTS / ("fusion_retained.csv" if arguments.retain_memory else "fusion.csv"), table)


if __name__ == "__main__":
    main()
