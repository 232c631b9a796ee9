"""`python -m gkt_fast env`."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""
    parser.set_defaults(run=print_environment)


def print_environment(args: argparse.Namespace) -> None:
    """Prints versions, devices, how the native module was built, and which backends work or why they don't."""
    from ..selfcheck.environment import describe_environment, format_environment

    print("\n".join(format_environment(describe_environment())))
