"""`python -m gkt_fast env`."""

from __future__ import annotations

import argparse

from ..selfcheck.environment import describe_environment, format_environment

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""
    parser.set_defaults(run=print_environment)


def print_environment(args: argparse.Namespace) -> None:
    """What an issue report needs: versions, devices, how the native module was built, which backends work and why."""
    print("\n".join(format_environment(describe_environment())))
