"""Predicted ranges of a training step on GPUs that are not here: a roofline for every op that really runs.

    python bench/roofline.py [--models resnet50 cifar_resnet56 vit_s16] [--steps 8]

Forward and backward of a plain step, as it is and with `fuse_blocks`, and of GKT steps (groups=3, loops=1) in each
mode are run on fake tensors, which have shapes but no elements, and every op's bytes, FLOPs and launches are counted
(gkt_fast/instruments; our ops are one op each). An op then takes at least max(bytes / bandwidth, FLOPs / peak), and
each launch a latency, each load that a merge waits for another. Nothing here is measured: the times are PREDICTIONS.
The lower end of a range ("predicted_ms", "plain_steps_from") is for kernels as good as the hardware, without reuse of a
cache between ops, launched from a CUDA graph; the upper end for slower kernels (`SLACKS`) in an eager step, which takes
at least as long as the host: as measured on a CPU where --host-csv lists the model and mode, else launching alone.

In float32 matrix products and convolutions count as TF32; bfloat16 is autocast. Counts are means over steps with new
subnets. Targets are soft, so that no op reads values. Left out are the optimizer, the same in every mode, and the few
small ops by which the launchers of our loss prepare it on a GPU. "cpu_ms" is what launching alone costs the CPU in an
eager step. "plain_steps" compares the two bounds; its range is that of the scenarios, each the same for both steps.

Writes bench/results/roofline.csv; what it says is in docs/measurements/roofline.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from harness import RESULTS, print_table, write_csv
from torch import nn

from gkt_fast.instruments.roofline import Network, predict
from gkt_fast.models import cifar_resnet


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def _vit_s16() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224")


NETWORKS = {
    "resnet50": Network(_resnet50, 224, 256, 1000),
    "cifar_resnet56": Network(lambda: cifar_resnet(56), 32, 128, 10),
    "vit_s16": Network(_vit_s16, 224, 256, 1000),
}


def read_host(path: Path, model: str) -> dict[str, float]:
    """Seconds of the host by mode, as bench/overhead.py --host writes them."""
    with path.open(newline="") as file:
        return {
            row["step"]: float(row["median_ms"]) / 1e3
            for row in csv.DictReader(file)
            if row["model"] == model
        }


def ranges(row: dict) -> dict[str, str]:
    """The two ranges as they are printed."""
    return {
        "ms": f"{row['predicted_ms']:.3g} to {row['to_ms']:.3g}",
        "in plain steps": f"{row['plain_steps_from']:.2f} to {row['plain_steps_to']:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=8, help="how many steps' subnets to take the mean over")
    parser.add_argument("--batch-size", type=int, help="default: the network's own")
    parser.add_argument(
        "--host-csv",
        type=Path,
        help="what bench/overhead.py --host measured; default: launches alone",
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "roofline.csv")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        host = {} if args.host_csv is None else read_host(args.host_csv, name)
        for dtype in (torch.bfloat16, torch.float32):
            rows += predict(name, NETWORKS[name], dtype, args.steps, args.batch_size, host)
    write_csv(args.csv, rows)
    print("PREDICTED, not measured: from the bound to slower kernels in an eager step")
    hidden = ("predicted_ms", "to_ms", "plain_steps_from", "plain_steps_to", "batch_size", "steps", "torch")
    columns = [column for column in rows[0] if column not in hidden]
    print_table([{**row, **ranges(row)} for row in rows], [*columns, "ms", "in plain steps"])
    print(f"written to {args.csv}")


if __name__ == "__main__":
    main()
