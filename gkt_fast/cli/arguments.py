"""Parsers of flag values, for argparse. Each raises ArgumentTypeError, which argparse turns into its message."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = [
    "add_device",
    "chosen_device",
    "parse_depths",
    "parse_device",
    "parse_integer",
    "parse_min_depth",
    "parse_number",
    "parse_probability",
    "parse_resolution",
    "parse_sizes",
    "parse_subnets",
]


def parse_integer(least: int) -> Callable[[str], int]:
    """Parses an integer that is not below `least`."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
        return int(text)

    return parse


def parse_number(least: float) -> Callable[[str], float]:
    """Parses a finite number that is not below `least`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least {least}")
        return value

    return parse


def parse_probability(text: str) -> float:
    value = parse_number(0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number between 0 and 1")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag `--device`; `chosen_device` says what None stands for."""
    parser.add_argument(
        "--device", type=parse_device, help="where tensors are; default: cuda if there is a GPU, else cpu"
    )


def chosen_device(args: argparse.Namespace) -> str:
    """The device given, or the default."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def parse_device(text: str) -> str:
    """Checks that tensors can be made on the device."""
    import torch

    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        default = "cuda" if torch.cuda.is_available() else "cpu"
        raise argparse.ArgumentTypeError(
            f"{text!r} can't be used: {reason}. Without --device it is {default} here"
        ) from error
    return text


def parse_depths(text: str) -> tuple[int, ...]:
    """Parses depths D-D-D, one for each stage."""
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers joined by '-', one for each stage")
    return tuple(map(int, parts))


def parse_min_depth(text: str) -> int | tuple[int, ...]:
    """Parses a smallest depth D of all stages, or D-D-D of each."""
    depths = parse_depths(text)
    return depths[0] if len(depths) == 1 else depths


def parse_resolution(text: str) -> int | tuple[int, ...]:
    """Parses a number of pixels, or LOWEST-HIGHEST."""
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of pixels, or LOWEST-HIGHEST")
    return int(text) if len(parts) == 1 else tuple(map(int, parts))


def parse_sizes(text: str) -> tuple[int, ...]:
    return tuple(parse_integer(1)(part) for part in text.split(","))


def parse_subnets(text: str) -> tuple[tuple[int, ...], ...]:
    """Parses the depths of several subnets, D-D-D,D-D-D."""
    return tuple(parse_depths(part) for part in text.split(","))
