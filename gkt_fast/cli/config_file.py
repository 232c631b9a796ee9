"""The YAML files of `train`: the one that `--config` reads, and `args.yaml`, which holds all flags of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from ..config import GKTConfig

__all__ = ["argument_values", "with_config_file", "write_arguments"]

SEVERAL = ("evaluate-depths", "track-depths", "log")
"""Flags that take several values."""


def with_config_file(arguments: list[str]) -> list[str]:
    """Puts the flags from a `--config` file before those of the command line, so that the latter win.

    Args:
        arguments: the command line, the command first.

    Raises:
        ValueError: the file holds something other than a mapping.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("-c", "--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    if path is None or arguments[:1] != ["train"]:
        return arguments
    with open(path) as file:
        values = yaml.safe_load(file) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be a mapping of flags to values")
    flags: list[str] = []
    for name, value in values.items():
        flag = str(name).replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif flag in SEVERAL and isinstance(value, list):
            flags += [f"--{flag}", *(_flag_value(flag, entry) for entry in value)] if value else []
        elif value is not None:
            flags.append(f"--{flag}={_flag_value(flag, value)}")
    return ["train", *flags, *arguments[1:]]


def _flag_value(flag: str, value: Any) -> str:
    if flag == "multi-scale" and isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, list) and value and isinstance(value[0], list):
        return ",".join("-".join(map(str, depths)) for depths in value)
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def write_arguments(args: argparse.Namespace, config: GKTConfig, path: Path) -> None:
    """Writes all flags to a file that `-c` reads.

    Args:
        args: the flags.
        config: the configuration that resulted from the method and the flags; its values are written.
        path: where to.
    """
    path.write_text(yaml.safe_dump(argument_values(args, config), sort_keys=False))


def argument_values(args: argparse.Namespace, config: GKTConfig) -> dict[str, Any]:
    """All flags by their names, as plain values; those of the configuration as it resulted."""
    values = {name: value for name, value in vars(args).items() if name not in ("command", "config", "run")}
    return {name: _plain(value) for name, value in values.items()} | config.to_dict()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
