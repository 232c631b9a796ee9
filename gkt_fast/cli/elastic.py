"""`python -m gkt_fast elastic`: its flags. What they do is in `elastic_study`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import parse_depths, parse_integer, parse_number
from .run_flags import add_trained_run

__all__ = ["add_arguments"]


def write_elastic(args: argparse.Namespace) -> None:
    """Makes an elastic network of a trained one."""
    from .elastic_study import write_elastic

    write_elastic(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.usage = f"{parser.prog} CHECKPOINT -o FILE [flags]"
    parser.set_defaults(run=write_elastic)
    add_trained_run(parser)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the elastic network, for predict")
    add(
        "--depths",
        type=parse_depths,
        nargs="+",
        metavar="D-D-D",
        help="depths it runs at; default: --max-depths of them, nested, from --min-depth to the network itself",
    )
    add(
        "--max-depths",
        type=parse_integer(1),
        default=5,
        help="how many depths at most where --depths is not given",
    )
    add(
        "--max-drop",
        type=parse_number(0),
        default=0.5,
        help="its cascade loses at most so many percentage points of accuracy on the test images",
    )
    add(
        "--export-onnx",
        type=Path,
        metavar="FOLDER",
        help="write it as ONNX too, a file per depth and one of weights; default: don't",
    )
