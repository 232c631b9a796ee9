"""`python -m gkt_fast subnets`: its flags. What they do is in `subnet_study`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_device, parse_integer, parse_min_depth, parse_number
from .run_flags import add_run_arguments

__all__ = ["add_arguments"]


def print_subnets(args: argparse.Namespace) -> None:
    """Evaluates the subnets of a trained network."""
    from .subnet_study import print_subnets

    print_subnets(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.usage = f"{parser.prog} CHECKPOINT [flags]"
    parser.set_defaults(run=print_subnets)
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="written by train; of a folder its best.pt, or else last.pt",
    )
    add_run_arguments(
        parser.add_argument_group(
            "Flags of train; a flag that is not given is as in args.yaml beside the checkpoint"
        )
    )
    add("--ema", action="store_true", help="take the averaged weights (train --ema-decay)")
    add_device(parser)
    add("--min-depth", type=parse_min_depth, help="smallest depth of a stage, or D-D-D; default: as trained")
    add(
        "--max-subnets",
        type=parse_integer(1),
        default=64,
        help="how many to evaluate (gkt_fast.choose_subnets)",
    )
    add(
        "--calibration-samples",
        type=parse_integer(1),
        default=2000,
        help="training images that give each subnet its BatchNorm statistics",
    )
    add("--output", type=Path, help="folder for subnets.csv and subnets.png; default: the checkpoint's")
    add(
        "--budget-flops",
        type=parse_number(0),
        help="of the best subnet: most FLOPs of one sample; default: no limit",
    )
    add(
        "--min-accuracy",
        type=parse_number(0),
        help="of the best subnet: least accuracy, 0 to 1; default: none",
    )
    add("--export-onnx", type=Path, metavar="PATH", help="write the best subnet as ONNX; default: don't")
