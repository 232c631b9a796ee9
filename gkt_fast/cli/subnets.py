"""`python -m gkt_fast subnets`: its flags. What they do is in `subnet_study`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import parse_integer, parse_number
from .run_flags import add_trained_run

__all__ = ["add_arguments"]


def print_subnets(args: argparse.Namespace) -> None:
    """Evaluates the subnets of a trained network."""
    from .subnet_study import print_subnets

    print_subnets(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.usage = f"{parser.prog} CHECKPOINT [flags]"
    parser.set_defaults(run=print_subnets)
    add_trained_run(parser)
    add = parser.add_argument
    add(
        "--max-subnets",
        type=parse_integer(1),
        default=64,
        help="how many to evaluate (gkt_fast.choose_subnets)",
    )
    add("--output", type=Path, help="folder for subnets.csv and subnets.png; default: the checkpoint's")
    add(
        "--budget-flops",
        type=parse_number(0),
        help="of the best subnet: most FLOPs of one sample; default: no limit",
    )
    add(
        "--budget-ms",
        type=parse_number(0),
        help="of the best subnet: most milliseconds for one sample in torch, with --latency; default: no limit",
    )
    add(
        "--latency",
        action="store_true",
        help="time each subnet on the device, in torch and in onnxruntime, at batch 1 and --latency-batch",
    )
    add("--latency-batch", type=parse_integer(1), default=64, help="the other batch size of --latency")
    add(
        "--min-accuracy",
        type=parse_number(0),
        help="of the best subnet: least accuracy, 0 to 1; default: none",
    )
    add("--export-onnx", type=Path, metavar="PATH", help="write the best subnet as ONNX; default: don't")
