"""The file of an elastic network, and the keys of its state_dict: every tensor once, by the network's own name."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..network.state_dicts import describe_misfit
from .files import written_whole
from .running_buffers import running_buffers
from .shared_weights import LightSubnet, part_name

__all__ = [
    "check_fits",
    "clear_keys",
    "from_clear_keys",
    "read",
    "report_clear_keys",
    "to_clear_keys",
    "write",
]

FORMAT = "gkt_fast elastic network 1"


def clear_keys(parts: Sequence[LightSubnet], running: frozenset[str]) -> dict[str, str]:
    """For every key of the depths' modules that of the tensor: "weights.KEY", or "statistics.DEPTHS.KEY"."""
    keys: dict[str, str] = {}
    owner: dict[int, str] = {}
    for part in parts:
        name = part_name(part.subnet)
        for key in part.network.state_dict():
            path, _, tensor = key.rpartition(".")
            original = part.names.get(path, path)
            module = part.network.get_submodule(path)
            own = list(module._buffers) if original in running else running_buffers(module)
            whole = f"{original}.{tensor}" if original else tensor
            first = owner.setdefault(id(module), name)
            keys[f"networks.{name}.{key}"] = (
                f"statistics.{first}.{whole}" if tensor in own else f"weights.{whole}"
            )
    return keys


def to_clear_keys(elastic: nn.Module, state: dict[str, Any], prefix: str, metadata: dict) -> None:
    """Hook of `state_dict`."""
    for key, clear in elastic._keys.items():
        if prefix + key in state:
            value = state.pop(prefix + key)
            state.setdefault(prefix + clear, value)


def from_clear_keys(elastic: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before `load_state_dict`, which has made `state` a copy."""
    for key, clear in elastic._keys.items():
        if prefix + clear in state:
            state[prefix + key] = state[prefix + clear]
    for clear in set(elastic._keys.values()):
        state.pop(prefix + clear, None)


def report_clear_keys(elastic: nn.Module, incompatible: Any) -> None:
    """Hook after `load_state_dict`: missing tensors are named as in `state_dict`, each once."""
    named = []
    for key in incompatible.missing_keys:
        start = key.find("networks.")
        clear = elastic._keys.get(key[start:]) if start >= 0 else None
        named.append(key if clear is None else key[:start] + clear)
    incompatible.missing_keys[:] = dict.fromkeys(named)


def write(path: str | Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values.

    Raises:
        OSError: it can't be written; a file that was there stays.
        ValueError: a value is of a kind that can't be read back without running code.
    """
    with written_whole(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)
        try:
            torch.load(temporary, map_location="meta", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"metadata holds {', '.join(sorted(_kinds(content['metadata'])))}; it must hold plain values alone: "
                "numbers, strings, None, lists and dicts of such"
            ) from error


def _kinds(value: Any) -> set[str]:
    """The names of the classes in nested dicts and lists that aren't plain."""
    if isinstance(value, dict):
        return set().union(*map(_kinds, value), *map(_kinds, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_kinds, value))
    return (
        set()
        if value is None or isinstance(value, (bool, int, float, str, bytes))
        else {type(value).__name__}
    )


def read(path: str | Path) -> dict[str, Any]:
    """Reads what `write` wrote, onto the CPU, without running code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off or damaged, or no file of an elastic network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        OSError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        KeyError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read; it may be cut off or damaged ({reason})") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise ValueError(f"{path} is no file of ElasticNetwork.save (found {found!r})")
    return content


def check_fits(elastic: nn.Module, state: dict[str, Any], path: str | Path, kind: str) -> None:
    """Checks that a file's tensors are those of the network.

    Raises:
        ValueError: names or shapes differ; the message lists the first of them.
    """
    misfit = describe_misfit(elastic, state)
    if misfit:
        raise ValueError(f"{path} is of another network than {kind}: {misfit}")
