"""The parser of the command line: defaults in the help, errors without the usage, suggestions for slips."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

__all__ = ["Parser", "did_you_mean"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question to append to an error; empty where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


class Formatter(argparse.HelpFormatter):
    """Names the default of every flag that has one; what None means is in the flag's own sentence."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "VALUE"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace(" (default: %(default)s)", "")  # Python's own, for --x and --no-x
        default = action.default
        if not action.option_strings or default is None or default is argparse.SUPPRESS:
            return text
        if isinstance(default, bool):
            return f"{text} (default: {'on' if default else 'off'})"
        if isinstance(default, (list, tuple, str)) and not default:
            return f"{text} (default: none)"
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse's, with short errors. Flags must be written out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=Formatter, **options)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """As `parse_args`; for a flag that doesn't exist the error names the nearest one."""
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            hints = [did_you_mean(flag, self._option_string_actions) for flag in flags]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, hints), '')}")
        return args

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices))
            raise

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\n{self.prog} --help lists what there is.", file=sys.stderr)
        raise SystemExit(2)
