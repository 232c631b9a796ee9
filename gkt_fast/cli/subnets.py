"""`python -m gkt_fast subnets`: its flags. What they do is in `subnet_study`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_device, parse_integer, parse_min_depth, parse_number
from .train import add_arguments as add_train_arguments

__all__ = ["add_arguments", "add_run_arguments"]


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


RUN_ARGUMENTS = (
    *("model", "data", "train_images", "image_size", "train_crop", "augment", "random_erasing"),
    *("batch_size", "workers"),
)
"""Those flags of `train` that say which network and which images."""


def add_run_arguments(
    parser: argparse._ArgumentGroup | argparse.ArgumentParser, defaults: bool = False
) -> None:
    """The flags of `train` that say what was trained; with `defaults`, those of `train`, else none."""
    train = argparse.ArgumentParser(add_help=False)
    add_train_arguments(train)
    for action in train._actions:
        if action.dest in RUN_ARGUMENTS:
            default = action.default if defaults else argparse.SUPPRESS
            parser.add_argument(
                *action.option_strings,
                type=action.type,
                choices=action.choices,
                default=default,
                help=action.help,
            )
