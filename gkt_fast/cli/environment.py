"""`python -m gkt_fast env`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from ..ops import build_info, explain

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""
    parser.set_defaults(run=print_environment)


def print_environment(args: argparse.Namespace) -> None:
    """What an issue report needs: versions, devices, how the native module was built, which backends work and why."""
    print(f"gkt_fast  {_version('gkt_fast')}")
    print(f"python    {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "torchvision", "triton", "numpy"):
        print(f"{package:9} {_version(package)}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices   cpu ({torch.get_num_threads()} threads){''.join(f', {name}' for name in gpus)}")
    for name, value in build_info().items():
        print(f"native    {name}: {value}")
    rows = [("op", "backend", "tensors on", "status")]
    rows += [(row["op"], row["backend"], row["devices"], row["status"]) for row in explain()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
