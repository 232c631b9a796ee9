"""What an issue report needs of the machine: versions, devices, the native module's build, which backends work."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from ..ops import build_info, explain

__all__ = ["describe_environment", "format_environment"]


def describe_environment() -> dict[str, Any]:
    """The environment as plain values, ready for JSON.

    Returns:
        `versions` (of gkt_fast, python and packages), `platform`, `devices` (a list of names), `threads`, `native`
        (how the native module was built, see `build_info`) and `backends` (rows of op, backend, devices and status).
    """
    packages = ("torch", "torchvision", "triton", "numpy")
    versions = {"gkt_fast": _version("gkt_fast"), "python": platform.python_version()}
    return {
        "versions": versions | {package: _version(package) for package in packages},
        "platform": platform.platform(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "threads": torch.get_num_threads(),
        "native": build_info(),
        "backends": explain(),
    }


def format_environment(environment: dict[str, Any]) -> list[str]:
    """The lines of text that `python -m gkt_fast env` prints."""
    versions = dict(environment["versions"])
    lines = [f"gkt_fast  {versions.pop('gkt_fast')}"]
    lines += [f"python    {versions.pop('python')} on {environment['platform']}"]
    lines += [f"{package:9} {version}" for package, version in versions.items()]
    cpu, *gpus = environment["devices"]
    devices = [f"{cpu} ({environment['threads']} threads)", *gpus]
    lines += [f"devices   {', '.join(devices)}"]
    lines += [f"native    {name}: {value}" for name, value in environment["native"].items()]
    rows = [("op", "backend", "tensors on", "status")]
    rows += [(row["op"], row["backend"], row["devices"], row["status"]) for row in environment["backends"]]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        lines.append("  ".join([*cells, row[3]]))
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
