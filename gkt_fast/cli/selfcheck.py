"""`python -m gkt_fast selfcheck`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..selfcheck import run_selfcheck
from .arguments import parse_device

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--device", type=parse_device, help="default: cuda where there is one, otherwise cpu")
    parser.add_argument("--bench", action="store_true", help="also measure, against eager, compile and copy")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report as JSON too")
    parser.set_defaults(run=selfcheck)


def selfcheck(args: argparse.Namespace) -> int:
    """Prints the report. Returns the exit code: 0 if every check passed, otherwise 1."""
    report = run_selfcheck(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.bench)
    print(report.to_text())
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n")
    return 0 if report.passed else 1
