"""Which backend runs an op: a lookup per (op, device, dtype), never a rewrite of globals.

Backends are "cuda" (CUDA C++), "triton", "cpp" (C++ on the CPU) and "torch" (the plain-torch reference).
The order on a device is fixed in `ORDER`; `use_backend(name)` or the environment variable GKT_BACKEND asks for
one explicitly, which then works or raises `BackendError` with the reason. An automatic fallback is logged once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

__all__ = ["BackendError", "Implementation", "explain", "find", "register", "select", "use_backend"]

logger = logging.getLogger("gkt_fast")

ORDER = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}


class BackendError(RuntimeError):
    """The requested backend can't run this op here; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    Args:
        op: name of the op.
        backend: name of the backend.
        devices: device types whose tensors it takes; empty: all.
        dtypes: dtypes that it takes.
        load: returns the object that holds the op's functions (a module, or a namespace); raises `BackendError`
            or ImportError where the backend can't be used.
    """

    op: str
    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], ModuleType | Any]


_implementations: dict[tuple[str, str], Implementation] = {}
_requested: ContextVar[str | None] = ContextVar("gkt_fast_backend", default=None)


def register(implementation: Implementation) -> None:
    """Adds a backend of an op, or replaces it."""
    _implementations[implementation.op, implementation.backend] = implementation
    _load.cache_clear()
    _automatic.cache_clear()


def find(op: str, backend: str) -> Implementation:
    """The registered backend of an op.

    Raises:
        ValueError: the op has no such backend.
    """
    try:
        return _implementations[op, backend]
    except KeyError:
        raise ValueError(f"op {op!r} has no backend {backend!r}") from None


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Runs every op inside the block on `backend` ("cuda", "triton", "cpp" or "torch"); None: automatic.

    Raises:
        ValueError: no op has a backend of that name.
    """
    _check_name(backend, "backend")
    token = _requested.set(backend)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str | None:
    """The backend asked for by `use_backend` or GKT_BACKEND; None when the choice is automatic."""
    requested = _requested.get() or os.environ.get("GKT_BACKEND") or None
    _check_name(requested, "GKT_BACKEND")
    return requested


def select(op: str, device: str, dtype: torch.dtype) -> Any:
    """The functions of the backend that runs `op` for tensors of this device type and dtype.

    Raises:
        BackendError: the explicitly requested backend can't, with the reason.
    """
    requested = requested_backend()
    if requested is None:
        return _automatic(op, device, dtype)
    reason = _reason_against(op, requested, device, dtype)
    if reason:
        raise BackendError(f"backend {requested!r} can't run {op} on {device} tensors of {dtype}: {reason}")
    return _load(op, requested)[0]


def explain() -> list[dict[str, str]]:
    """One row per op and backend: op, backend, devices, status ("ok" or the reason why not)."""
    return [
        {
            "op": op,
            "backend": backend,
            "devices": "/".join(implementation.devices) or "all",
            "status": _load(op, backend)[1] or "ok",
        }
        for (op, backend), implementation in sorted(_implementations.items())
    ]


def _check_name(backend: str | None, argument: str) -> None:
    names = sorted({backend for _, backend in _implementations})
    if backend is not None and backend not in names:
        raise ValueError(f"{argument} is {backend!r}; it must be one of {', '.join(names)}")


@functools.cache
def _load(op: str, backend: str) -> tuple[Any, str | None]:
    try:
        return _implementations[op, backend].load(), None
    except (BackendError, ImportError) as error:
        return None, str(error)


def _reason_against(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    implementation = _implementations.get((op, backend))
    if implementation is None:
        return "the op has no such backend"
    if implementation.devices and device not in implementation.devices:
        return f"it takes tensors on {' or '.join(implementation.devices)}"
    if dtype not in implementation.dtypes:
        return f"it takes {', '.join(str(d) for d in implementation.dtypes)}"
    return _load(op, backend)[1]


@functools.cache
def _automatic(op: str, device: str, dtype: torch.dtype) -> Any:
    rejected = []
    for backend in ORDER.get(device, ("torch",)):
        reason = _reason_against(op, backend, device, dtype)
        if reason is None:
            if rejected:
                logger.info(
                    "%s on %s %s runs on %r; not on %s", op, device, dtype, backend, "; ".join(rejected)
                )
            return _load(op, backend)[0]
        rejected.append(f"{backend} ({reason})")
    raise BackendError(f"no backend can run {op} on {device} tensors of {dtype}: {'; '.join(rejected)}")
