"""The command line, `python -m gkt_fast COMMAND`, with one module per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml

from ..deployment.export import ExportError
from ..ops import BackendError
from ..training.batches import DataLoadingError
from ..training.checkpoint import CheckpointError
from ..training.nonfinite import NonFiniteLossError
from . import environment, plot, selfcheck, subnets, train
from .config_file import with_config_file

__all__ = ["main"]

COMMANDS = {
    "env": (environment, "versions, devices, build flags and backends"),
    "selfcheck": (selfcheck, "check every backend and mode against float64"),
    "train": (train, "train a network"),
    "plot": (plot, "draw the curves of training runs"),
    "subnets": (subnets, "evaluate the subnets of a trained network, and export the best"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line without the program's name; None: this process's.

    Returns:
        The exit code: 0; 1 if the self-check found a fault; 2 if the command can't be carried out, with the reason on
        stderr; 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(prog="gkt-fast", description="Group Knowledge based Training.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, allow_abbrev=False))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = parser.parse_args(with_config_file(arguments))
        code = args.run(args)
    except (
        BackendError,
        CheckpointError,
        DataLoadingError,
        ExportError,
        ImportError,
        NonFiniteLossError,
        OSError,
        TypeError,
        ValueError,
        yaml.YAMLError,
    ) as error:
        print(f"gkt-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gkt-fast: interrupted", file=sys.stderr)
        return 130
    return code or 0
