"""`python -m gkt_fast selfcheck`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_device

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_device(parser)
    parser.add_argument("--bench", action="store_true", help="also measure, against eager, compile and copy")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the report as JSON too; default: print it only"
    )
    parser.set_defaults(run=selfcheck)


def selfcheck(args: argparse.Namespace) -> int:
    """Prints the report. Returns the exit code: 0 if every check passed, otherwise 1."""
    from ..selfcheck import run_selfcheck
    from .arguments import chosen_device

    report = run_selfcheck(chosen_device(args), args.bench)
    print(report.to_text())
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n")
    return 0 if report.passed else 1
