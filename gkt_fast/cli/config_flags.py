"""The flags of GKT's hyper-parameters, one for each field of `GKTConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from ..config import (
    BATCH_NORM_POLICIES,
    CHAINS,
    DISTILLATIONS,
    EXECUTIONS,
    KNOWLEDGE,
    GKTConfig,
    current_policy,
)
from ..subnets.sampling import SAMPLERS
from .arguments import parse_min_depth, parse_resolution, parse_subnets

__all__ = ["CONFIG_FIELDS", "add_config"]

CONFIG_FIELDS = {field.name: field for field in dataclasses.fields(GKTConfig)}


def add_config(group: argparse._ArgumentGroup) -> None:
    """Adds a flag of the same name for every field of GKTConfig. Without the flag the namespace has no such entry."""
    choices = {
        "batch_norm": BATCH_NORM_POLICIES,
        "chain": CHAINS,
        "distillation": DISTILLATIONS,
        "execution": EXECUTIONS,
        "knowledge": KNOWLEDGE,
        "sampler": [*SAMPLERS],
    }
    kinds = {"int": int, "float": float, "str": str}
    special = {
        "batch_norm": current_policy,
        "min_depth": parse_min_depth,
        "subnets": parse_subnets,
        "subnet_resolution": parse_resolution,
    }
    sentences = _sentences(GKTConfig.__doc__ or "")
    for name, field in CONFIG_FIELDS.items():
        options: dict[str, Any] = {"default": field.default if name == "seed" else argparse.SUPPRESS}
        options["help"] = sentences.get(name, "see gkt_fast.GKTConfig")
        if name != "seed":
            options["help"] += f" (gkt: {_shown(field.default)})"
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = (
                special.get(name) or kinds[field.type.partition(" ")[0]]
            )  # "float | None" is float
            options["choices"] = choices.get(name)
        group.add_argument("--" + name.replace("_", "-"), **options)


def _sentences(docstring: str) -> dict[str, str]:
    """What a docstring's section of arguments says of each: one text, so that help and documentation agree."""
    section = re.search(r"\n +Args:\n(.*?)(\n\n|\Z)", docstring, flags=re.S)
    lines = section.group(1) if section else ""
    indent = re.match(r" *", lines).group()
    entries = re.split(rf"^{indent}(?=\w)", lines, flags=re.M)[1:]
    pairs = (re.sub(r"\s+", " ", entry).strip().split(": ", 1) for entry in entries)
    return {name: text.rstrip(".").replace("%", "%%") for name, text in pairs}


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default is None else str(default)
