"""What can be reached from a model, and puts it back: attributes, containers, closures of hooks, plain tensors.

Forwards keep things: a table computed once, a list of activations, a counter. Where a forward runs only to be looked
at, none of that may stay.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["kept_attributes"]

Restore = Callable[[], None]

_LOCKS = ("lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Thread")
"""What an object holds that several threads share."""
_OWN_ROOMS = ("torch", "threading", "queue", "multiprocessing", "logging", "concurrent", "asyncio", "weakref")
"""Packages whose objects are not taken apart."""
_UNCHANGING = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    torch.dtype,
    torch.device,
)


@contextmanager
def kept_attributes(model: nn.Module, *, hooks: bool = True) -> Iterator[None]:
    """Afterwards the attributes of all modules are what they were, and so is what lists and the like in them hold.

    Followed are containers, plain objects and plain tensors; not parameters (copies of all weights would be too much)
    and buffers (`look` gives the model copies to write to), nor objects that threads share.

    Args:
        model: the network.
        hooks: whether what hooks and wrapped forwards hold is followed too: closures, objects, global variables.
    """
    snapshot = _Snapshot(hooks)
    modules = list(model.modules())
    sharded = any(
        map(_is_sharded, modules)
    )  # FSDP exchanges parameters by itself, and knows which are in place
    for module in modules:
        snapshot.take_module(module, parameters=not sharded)
    try:
        yield
    finally:
        snapshot.restore()


class _Snapshot:
    def __init__(self, hooks: bool) -> None:
        self._hooks = hooks
        self._seen: dict[int, Any] = {}
        self._restores: list[Restore] = []

    def restore(self) -> None:
        for restore in self._restores:
            restore()

    def take_module(self, module: nn.Module, parameters: bool = True) -> None:
        """Which parameters, buffers and children there are is kept, but not followed as other attributes are."""
        attributes = module.__dict__
        if _is_sharded(module):
            return
        self._dict(attributes)
        for name, value in attributes.items():
            if name in ("_parameters", "_buffers", "_modules"):
                if parameters or name != "_parameters":
                    self._dict(value)
            else:
                self._take(value)

    def _take(self, value: Any) -> None:
        if isinstance(value, _UNCHANGING) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            return  # of the model: taken already; of another: not the model's
        elif isinstance(value, dict):
            self._dict(value)
            self._take_all(value.values())
        elif isinstance(value, (list, deque)):
            self._sequence(value)
            self._take_all(value)
        elif isinstance(value, set):
            self._set(value)
        elif isinstance(value, (tuple, frozenset)):
            self._take_all(value)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            if self._hooks:
                self._function(value)
        else:
            self._object(value)

    def _take_all(self, values: Any) -> None:
        for value in list(values):
            self._take(value)

    def _dict(self, value: dict) -> None:
        content = dict(value)

        def restore() -> None:
            # Compared by identity: an equal value may be another object.
            if list(value) != list(content) or any(value[key] is not content[key] for key in content):
                value.clear()
                value.update(content)

        self._restores.append(restore)

    def _sequence(self, value: list | deque) -> None:
        content = list(value)

        def restore() -> None:
            if len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
                value.clear()
                value.extend(content)

        self._restores.append(restore)

    def _set(self, value: set) -> None:
        content = set(value)

        def restore() -> None:
            if value != content:
                value.clear()
                value.update(content)

        self._restores.append(restore)

    def _tensor(self, value: Tensor) -> None:
        """A tensor that is neither parameter nor buffer; written back only if it was written to."""
        if (
            isinstance(value, nn.Parameter)
            or value.is_meta
            or value.grad_fn is not None
            or not _is_plain(value)
        ):
            return
        content, version = value.detach().clone(), _version(value)

        def restore() -> None:
            if version is None or _version(value) != version:
                with torch.no_grad(), torch.inference_mode(value.is_inference()):
                    value.copy_(content)

        self._restores.append(restore)

    def _function(self, value: Any) -> None:
        if isinstance(value, types.MethodType):
            self._take(value.__self__)
            value = value.__func__
        if isinstance(value, functools.partial):
            self._take_all((value.func, value.args, value.keywords))
            return
        if not isinstance(value, types.FunctionType):
            return
        self._dict(value.__dict__)
        for cell in value.__closure__ or ():
            self._cell(cell)
        self._take_all(value.__defaults__ or ())
        if value.__module__.partition(".")[0] not in _OWN_ROOMS:
            self._globals(value)

    def _cell(self, cell: types.CellType) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            return

        def restore() -> None:
            cell.cell_contents = content

        self._restores.append(restore)
        self._take(content)

    def _globals(self, function: types.FunctionType) -> None:
        """The global variables that the function's code names: rebound, or containers."""
        variables = function.__globals__
        names = [name for name in function.__code__.co_names if name in variables]
        values = {name: variables[name] for name in names}

        def restore() -> None:
            for name, value in values.items():
                if variables.get(name) is not value:
                    variables[name] = value

        self._restores.append(restore)
        for value in values.values():
            if isinstance(value, (list, dict, set, deque, Tensor)):
                self._take(value)

    def _object(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        kind = type(value)
        if kind.__module__.partition(".")[0] in _OWN_ROOMS:
            return
        if isinstance(attributes, dict):
            if any(type(inner).__name__ in _LOCKS for inner in attributes.values()):
                return
            self._dict(attributes)
            self._take_all(attributes.values())
        for base in kind.__mro__:
            slots = base.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                self._slot(value, name)

    def _slot(self, value: Any, name: str) -> None:
        if name in ("__dict__", "__weakref__") or not hasattr(value, name):
            return
        content = getattr(value, name)

        def restore() -> None:
            if getattr(value, name, None) is not content:
                object.__setattr__(value, name, content)

        self._restores.append(restore)
        self._take(content)


def _is_sharded(module: nn.Module) -> bool:
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__)


def _is_plain(value: Tensor) -> bool:
    """Whether the tensor can be copied like any other: no subclass that stands for something else (DTensor)."""
    return type(value) is Tensor and value.layout is torch.strided


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version
