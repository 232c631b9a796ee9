"""The flags of `train` that say what was trained, for commands that read its checkpoints."""

from __future__ import annotations

import argparse

from .train import add_arguments as add_train_arguments

__all__ = ["add_run_arguments"]

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
