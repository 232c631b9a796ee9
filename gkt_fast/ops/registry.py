"""Which backend runs an op: a lookup per (op, device, dtype), never a rewrite of globals.

Backends are "cuda" (CUDA C++), "triton", "cpp" (C++ on the CPU) and "torch" (the plain-torch reference).
The order on a device is fixed in `ORDER`; `use_backend(name)` or the environment variable GKT_BACKEND asks for
one explicitly, which then works or raises `BackendError` with the reason. An automatic fallback is logged once.

A backend can also turn out not to work when it first runs: kernels that don't fit the GPU or its driver, a compiler
that is missing. It then raises `BackendError` from its functions; `run` gives it up for this op, dtype and device (each
GPU by itself) as long as the process lives, so that the cost of failing is paid once, and goes on with the next one. A
GPU that none of the kernels fit (`UnfitDevice`) is given up as a whole, with one warning; other GPUs go on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Backend",
    "BackendError",
    "BackendWithBackward",
    "Implementation",
    "UnfitDevice",
    "explain",
    "find",
    "implementations",
    "isolated",
    "reason_against",
    "register",
    "run",
    "run_in_plain_torch",
    "select",
    "use_backend",
]

Result = TypeVar("Result")

logger = logging.getLogger("gkt_fast")

_CPU = torch.device("cpu")

ORDER = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}


class BackendError(RuntimeError):
    """The requested backend can't run this op here; the message says why."""


class UnfitDevice(BackendError):
    """The backend can't run on this device, whatever the op and the dtype."""


class Backend(Protocol):
    """What runs an op. The op allocates its results, with `outputs` of its `problem` module; the backend fills them."""

    def forward(self, problem: Any, *tensors: Tensor | None) -> None:
        """Fills the results.

        Args:
            problem: the op's `Problem`, everything that is not a tensor.
            tensors: the inputs in the order of the op's schema, then the results in that order, then what is updated in
                place; None for one that is not given or not wanted.

        Raises:
            BackendError, NotImplementedError: the backend doesn't work here after all.
        """


class BackendWithBackward(Backend, Protocol):
    """What runs an op whose backward pass is a kernel too (`group_knowledge_loss` has its gradient from `forward`)."""

    def backward(self, problem: Any, *tensors: Tensor | None) -> None:
        """Fills the gradients; arguments as for `forward`, in the order of the schema of `<op>_backward`."""


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    Args:
        op: name of the op.
        backend: name of the backend.
        devices: device types whose tensors it takes; empty: all.
        dtypes: dtypes that it takes.
        load: makes the backend; raises `BackendError` or ImportError where it can't be used.
    """

    op: str
    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], Backend]


@dataclass
class _State:
    """What is known of backends.

    Args:
        implementations: by op and backend.
        given_up: why a backend failed when it ran, by op, backend, device and dtype.
        unfit: why a device is not for a backend, by backend and device.
        loaded: the backends that were asked for, each with the reason why it can't be used.
        automatic: the backend that an automatic choice takes, and its name, by op, device and dtype.
        told: what has been said to run in plain torch.
    """

    implementations: dict[tuple[str, str], Implementation] = field(default_factory=dict)
    given_up: dict[tuple[str, str, torch.device, torch.dtype], str] = field(default_factory=dict)
    unfit: dict[tuple[str, torch.device], str] = field(default_factory=dict)
    loaded: dict[tuple[str, str], tuple[Backend | None, str | None]] = field(default_factory=dict)
    automatic: dict[tuple[str, torch.device, torch.dtype], tuple[str, Backend]] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)


_state = _State()
_requested: ContextVar[str | None] = ContextVar("gkt_fast_backend", default=None)


@contextmanager
def isolated(without: str | None = None) -> Iterator[None]:
    """For tests: what the block registers, and which backends turn out not to work in it, is forgotten at its end.

    It begins with every backend that is registered, none of them loaded or given up. It holds for all threads, as those
    of autograd must see it too.

    Args:
        without: a backend that no op has inside the block.
    """
    global _state
    kept = {place: found for place, found in _state.implementations.items() if place[1] != without}
    outer, _state = _state, _State(kept)
    try:
        yield
    finally:
        _state = outer


def register(implementation: Implementation) -> None:
    """Adds a backend of an op, or replaces it."""
    place = implementation.op, implementation.backend
    _state.implementations[place] = implementation
    for key in [key for key in _state.given_up if key[:2] == place]:
        del _state.given_up[key]
    for key in [key for key in _state.unfit if key[0] == implementation.backend]:
        del _state.unfit[key]
    _state.loaded.pop(place, None)
    _state.automatic.clear()


def find(op: str, backend: str) -> Implementation:
    """The registered backend of an op.

    Raises:
        ValueError: the op has no such backend.
    """
    try:
        return _state.implementations[op, backend]
    except KeyError:
        raise ValueError(f"op {op!r} has no backend {backend!r}") from None


def implementations() -> list[Implementation]:
    """Every backend of every op, in the order of their names."""
    return [implementation for _, implementation in sorted(_state.implementations.items())]


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Runs every op inside the block on `backend` ("cuda", "triton", "cpp" or "torch"); None: automatic.

    An op that this backend can't run for its tensors then raises a `BackendError` with the reason.

    Raises:
        ValueError: no op has a backend of that name.
    """
    if backend is not None:
        _check_name(backend, "backend")
    token = _requested.set(backend)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str | None:
    """The backend asked for by `use_backend` or GKT_BACKEND; None when the choice is automatic."""
    requested = _requested.get() or _from_environment() or None
    if requested is not None:
        _check_name(requested, "GKT_BACKEND")
    return requested


def _from_environment() -> str | None:
    """GKT_BACKEND, of which `os.environ.get` takes longer to say that it isn't set than a choice takes else."""
    kept = getattr(os.environ, "_data", None)  # by encoded names, in CPython
    if kept is not None and _VARIABLE not in kept:
        return None
    return os.environ.get("GKT_BACKEND")


_VARIABLE = getattr(os.environ, "encodekey", str)("GKT_BACKEND")


def select(op: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend that runs `op` for tensors of this device and dtype.

    Raises:
        BackendError: the explicitly requested backend can't, with the reason.
    """
    return _choose(op, _exact(device), dtype)[1]


def run(op: str, device: torch.device | str, dtype: torch.dtype, call: Callable[[Any], Result]) -> Result:
    """`call` with the backend that runs `op`, as `select` gives it.

    Where that raises `BackendError`, or NotImplementedError (native kernels that don't fit the GPU or its driver), the
    backend is given up on this device and the next one is called.

    Raises:
        BackendError: the explicitly requested backend can't, with the reason.
    """
    device = _exact(device)
    name, backend = _choose(op, device, dtype)
    try:
        return call(backend)
    except UnfitDevice as error:
        _give_up_device(name, device, str(error))
        return run(op, device, dtype, call)
    except (BackendError, NotImplementedError) as error:
        _give_up(op, name, device, dtype, str(error))
        return run(op, device, dtype, call)  # ends: every turn has one backend less


def run_in_plain_torch(op: str, what: str, call: Callable[[Any], Result]) -> Result:
    """`call` with the op's plain-torch backend, for what no kernel computes; said once.

    Args:
        op: name of the op.
        what: what is asked for, in words.
        call: as of `run`.

    Raises:
        BackendError: another backend was explicitly requested.
    """
    requested = requested_backend()
    if requested not in (None, "torch"):
        raise BackendError(f"backend {requested!r} can't run {op} with {what}: only 'torch' can")
    if (op, what) not in _state.told:
        _state.told.add((op, what))
        logger.info("%s with %s runs on 'torch': it has no kernel", op, what)
    return call(_load(op, "torch")[0])


def explain() -> list[dict[str, str]]:
    """One row per op and backend: op, backend, devices, status ("ok" or the reason why not)."""
    return [
        {
            "op": implementation.op,
            "backend": implementation.backend,
            "devices": "/".join(implementation.devices) or "all",
            "status": _status(implementation),
        }
        for implementation in implementations()
    ]


def _status(implementation: Implementation) -> str:
    op, backend = implementation.op, implementation.backend
    failures = [
        f"failed for {dtype} on {device}: {reason}"
        for (*failed, device, dtype), reason in _state.given_up.items()
        if (op, backend) == tuple(failed)
    ]
    failures += [
        f"no op runs on {device}: {reason}"
        for (unfit, device), reason in _state.unfit.items()
        if unfit == backend
    ]
    reason = _load(op, backend)[1] or "; ".join(failures)
    if not reason and implementation.devices == ("cuda",) and not torch.cuda.is_available():
        reason = "torch sees no GPU"
    return reason or "ok"


def _check_name(backend: str, argument: str) -> None:
    names = sorted({backend for _, backend in _state.implementations})
    if backend not in names:
        raise ValueError(f"{argument} is {backend!r}; it must be one of {', '.join(names)}")


def _load(op: str, backend: str) -> tuple[Any, str | None]:
    """The backend, or None and the reason why it can't be used; asked once."""
    place = op, backend
    if place not in _state.loaded:
        _state.loaded[place] = _try_to_load(_state.implementations[place])
    return _state.loaded[place]


def _try_to_load(implementation: Implementation) -> tuple[Backend | None, str | None]:
    try:
        return implementation.load(), None
    except (BackendError, ImportError) as error:
        return None, str(error)
    except Exception as error:  # whatever a broken installation of a compiler raises
        return None, f"{type(error).__name__}: {error}"


def reason_against(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why a backend can't run `op` for tensors of this device and dtype; None when nothing speaks against it.

    A GPU without a number is the current one.
    """
    device = _exact(device)
    implementation = _state.implementations.get((op, backend))
    if implementation is None:
        return "the op has no such backend"
    if implementation.devices and device.type not in implementation.devices:
        return f"it takes tensors on {' or '.join(implementation.devices)}"
    if dtype not in implementation.dtypes:
        return f"it takes {', '.join(str(d) for d in implementation.dtypes)}"
    reason = _load(op, backend)[1] or _state.unfit.get((backend, device))
    return reason or _state.given_up.get((op, backend, device, dtype))


def _exact(device: torch.device | str) -> torch.device:
    if isinstance(device, str):
        device = torch.device(device)
    if device != _CPU and device.index is None and device.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _choose(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Backend]:
    """The backend and its name."""
    requested = requested_backend()
    if requested is None:
        return _automatic(op, device, dtype)
    reason = reason_against(op, requested, device, dtype)
    if reason:
        raise BackendError(f"backend {requested!r} can't run {op} on {device} tensors of {dtype}: {reason}")
    return requested, _load(op, requested)[0]


def _give_up_device(backend: str, device: torch.device, reason: str) -> None:
    _state.unfit[backend, device] = reason
    _state.automatic.clear()
    if requested_backend() is None:
        logger.warning("no op runs on %r on %s: %s", backend, device, reason)


def _give_up(op: str, backend: str, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    _state.given_up[op, backend, device, dtype] = reason
    _state.automatic.clear()
    if requested_backend() is None:
        logger.warning(
            "%s on %s %s no longer runs on %r, which failed: %s", op, device, dtype, backend, reason
        )


def _automatic(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Backend]:
    """The first backend that nothing speaks against; chosen once."""
    place = op, device, dtype
    found = _state.automatic.get(place)
    if found is None:
        name = _first_possible(op, device, dtype)
        found = _state.automatic[place] = name, _load(op, name)[0]
    return found


def _first_possible(op: str, device: torch.device, dtype: torch.dtype) -> str:
    rejected = []
    for backend in ORDER.get(device.type, ("torch",)):
        reason = reason_against(op, backend, device, dtype)
        if reason is None:
            if rejected:
                logger.info(
                    "%s on %s %s runs on %r; not on %s", op, device, dtype, backend, "; ".join(rejected)
                )
            return backend
        rejected.append(f"{backend} ({reason})")
    raise BackendError(f"no backend can run {op} on {device} tensors of {dtype}: {'; '.join(rejected)}")
