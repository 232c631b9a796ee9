"""`python -m gkt_fast env`."""

from __future__ import annotations

import argparse

from ..selfcheck.environment import describe_environment, format_environment

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no flags: the command has none."""
    parser.set_defaults(run=print_environment)


def print_environment(args: argparse.Namespace) -> None:
    """Prints versions, devices, how the native module was built, and which backends work or why they don't."""
    print("\n".join(format_environment(describe_environment())))
