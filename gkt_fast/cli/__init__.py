"""The command line, `python -m gkt_fast COMMAND`, with one module per command for its flags.

Those modules import what their command needs when it runs, so that `--help` and errors come without torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from .config_file import with_config_file
from .parser import Parser

__all__ = ["main"]

DEPENDENCIES = ("numpy", "torch", "tqdm", "yaml")
"""What every installation has: without them another Python runs than the one installed for."""

COMMANDS = {
    "env": ("environment", "versions, devices, build flags and backends"),
    "selfcheck": ("selfcheck", "check every backend and mode against float64"),
    "train": ("train", "train a network, or go on with its training"),
    "plot": ("plot", "draw the curves of training runs"),
    "subnets": ("subnets", "evaluate the subnets of a trained network, and export the best"),
    "elastic": ("elastic", "make one network of a trained one that runs at several depths"),
    "predict": ("predict", "classify images by an elastic network"),
}
"""The module of each command, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line without the program's name; None: this process's.

    Returns:
        The exit code: 0; 1 if the self-check found a fault; 2 if the command can't be carried out, with the reason on
        stderr; 130 if it was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] not in COMMANDS:
            _general_parser().parse(arguments[:1])
        args = command_parser(arguments[0]).parse(with_config_file(arguments)[1:])
        code = args.run(args)
    except KeyboardInterrupt:
        print("gkt-fast: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in DEPENDENCIES:
            raise
        print(
            f"gkt-fast: {sys.executable} has no {error.name}. Activate the virtual environment that gkt_fast was "
            "installed into, or install it into this one",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"gkt-fast: {error}", file=sys.stderr)
        return 2
    return code or 0


def command_parser(name: str) -> Parser:
    """The parser of a command's flags."""
    module, summary = COMMANDS[name]
    parser = Parser(prog=f"gkt-fast {name}", description=f"{summary[0].upper()}{summary[1:]}.")
    importlib.import_module(f"{__name__}.{module}").add_arguments(parser)
    return parser


def _general_parser() -> Parser:
    listing = "\n".join(f"  {name:11}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        prog="gkt-fast",
        usage=f"gkt-fast COMMAND [flags]\n\ncommands:\n{listing}\n\ngkt-fast COMMAND --help lists its flags.",
        description="Group Knowledge based Training of residual networks.",
    )
    parser.add_argument("command", choices=[*COMMANDS], metavar="command", help="one of the above")
    parser.add_argument("--version", action="version", version=f"gkt_fast {__version__}", help="print it")
    return parser


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message says what to do: an error of this package, or one that bad input raises."""
    if isinstance(error, (ImportError, OSError, TypeError, ValueError)):
        return True
    return type(error).__module__.partition(".")[0] in ("gkt_fast", "yaml")
