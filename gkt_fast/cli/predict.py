"""`python -m gkt_fast predict`: its flags. What they do is in `prediction`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_device, parse_depths, parse_number

__all__ = ["add_arguments"]


def predict(args: argparse.Namespace) -> None:
    """Classifies images."""
    from .prediction import predict

    predict(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.usage = f"{parser.prog} FILE IMAGE [IMAGE ...] [flags]"
    parser.set_defaults(run=predict)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="written by elastic")
    add("images", type=Path, nargs="+", help="image files")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--depths", type=parse_depths, metavar="D-D-D", help="run at these; default: the deepest"
    )
    how.add_argument(
        "--max-ms",
        type=parse_number(0),
        help="run at the most accurate depths that take at most so many milliseconds for one image, measured now on "
        "this device; default: no limit",
    )
    how.add_argument("--cascade", action="store_true", help="each image goes on until a depth is sure of it")
    add_device(parser)
