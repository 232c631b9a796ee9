"""Everything that can be reached from a model, as a value that can be compared with an earlier one."""

from __future__ import annotations

import random
import types
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """Attributes, modes, weights, buffers, hooks, containers and plain objects, closures and global variables of hooks,
    generators and gradient mode, each by its path. Written without the package's own snapshots."""
    found: dict[str, Any] = {}
    _visit("model", model, found, set())
    found["python"] = random.getstate()
    found["numpy"] = [str(part) for part in np.random.get_state()]
    found["torch"] = torch.get_rng_state().tolist()
    found["gradients"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The paths that differ."""
    return [path for path in {**before, **after} if before.get(path, "absent") != after.get(path, "absent")]


def _visit(path: str, value: Any, found: dict[str, Any], seen: set[int]) -> None:
    if isinstance(value, (str, bytes, int, float, bool, type(None), type, types.ModuleType)):
        found[path] = value
        return
    if id(value) in seen:
        found[path] = id(value)
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[path] = id(value), value.dtype, value.detach().tolist()
        return
    found[path] = id(value), type(value)
    if isinstance(value, dict):
        found[f"{path} keys"] = list(value)
        for key, inner in value.items():
            _visit(f"{path}[{key!r}]", inner, found, seen)
    elif isinstance(value, (list, tuple, deque)):
        for index, inner in enumerate(value):
            _visit(f"{path}[{index}]", inner, found, seen)
    elif isinstance(value, (set, frozenset)):
        found[f"{path} members"] = set(value)
    elif isinstance(value, types.FunctionType):
        for index, cell in enumerate(value.__closure__ or ()):
            _visit(f"{path} cell {index}", cell.cell_contents, found, seen)
        for name in value.__code__.co_names:
            inner = value.__globals__.get(name)
            if isinstance(inner, (list, dict, set, int, Tensor)):
                _visit(f"{path} global {name}", inner, found, seen)
    elif isinstance(value, types.MethodType):
        _visit(f"{path} self", value.__self__, found, seen)
    elif type(value).__module__.partition(".")[0] not in ("weakref",):
        for name, inner in getattr(value, "__dict__", {}).items():
            _visit(f"{path}.{name}", inner, found, seen)
        for name in getattr(type(value), "__slots__", ()):
            _visit(f"{path}.{name}", getattr(value, name, None), found, seen)
