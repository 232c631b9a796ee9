"""Whether this installation computes what it should: every op on every backend, a GKT step in every mode.

Everything is compared with float64 formulas and a loop that share nothing with the package's own code. `bench` adds how
fast the ops are beside plain torch, torch.compile and a copy of the bytes that they must move.
"""

from __future__ import annotations

import time

import torch

from ..execution import EXECUTION_MODES
from ..ops import BackendError, registry
from .environment import describe_environment
from .op_checks import check_op
from .report import Check, Report
from .step_check import check_step
from .timing import time_ops, time_steps

__all__ = ["Check", "Report", "run_selfcheck"]

MODE_OF_OPS = "stacked"
"""The mode that runs most in our ops: with it a step goes through every backend, not only the registry's choice."""


def run_selfcheck(device: str | torch.device, bench: bool = False) -> Report:
    """Checks every backend that works on the device's tensors.

    Args:
        device: where tensors are put.
        bench: also measures.

    Returns:
        The report. A backend that can't run here, or turns out not to, is listed there with the reason and doesn't
        count: the ops fall back to the next one.
    """
    start = time.monotonic()
    device = torch.device(device)
    checks: list[Check] = []
    unavailable: list[tuple[str, str, str]] = []
    working = []
    for implementation in registry.implementations():
        op, backend = implementation.op, implementation.backend
        reason = registry.reason_against(op, backend, device, implementation.dtypes[0])
        try:
            if reason is not None:
                raise BackendError(reason)
            checks += check_op(implementation, device)
            working.append(implementation)
        except BackendError as error:
            unavailable.append((op, backend, str(error)))
    for dtype in (torch.float64, torch.float32):
        checks += check_step(None, EXECUTION_MODES, dtype, device)
        for backend in _of_all_ops(working, dtype):
            checks += check_step(backend, [MODE_OF_OPS], dtype, device)
    timings = [*time_ops(working, device), *time_steps(device)] if bench else []
    seconds = time.monotonic() - start
    return Report(str(device), describe_environment(), checks, unavailable, timings, seconds)


def _of_all_ops(working: list[registry.Implementation], dtype: torch.dtype) -> list[str]:
    """The backends on which every op works in this dtype."""
    ops = {implementation.op for implementation in registry.implementations()}
    backends = dict.fromkeys(implementation.backend for implementation in working)
    return [
        backend
        for backend in backends
        if {w.op for w in working if w.backend == backend and dtype in w.dtypes} == ops
    ]
