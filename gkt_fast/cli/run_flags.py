"""The flags of `train` that say what was trained, for commands that read its checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_device, parse_integer, parse_min_depth
from .train import add_arguments as add_train_arguments

__all__ = ["add_run_arguments", "add_trained_run"]

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


def add_trained_run(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that takes a trained network further: which run, and what is taken from it."""
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
        "--calibration-samples",
        type=parse_integer(1),
        default=2000,
        help="training images that give each subnet its BatchNorm statistics",
    )
