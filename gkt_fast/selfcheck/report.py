"""The results of a self-check: single checks, the whole report, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .environment import format_environment

__all__ = ["LIMITS", "Check", "Report", "compare", "failed"]

LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""What |actual - expected| / |expected| may be, by the dtype of the actual tensor: for the 16-bit types twice what
rounding a right result costs at most."""


@dataclass(frozen=True)
class Check:
    """One comparison with float64.

    Args:
        subject: the op, or the step in one mode.
        backend: the backend that ran; "automatic" for the registry's choice.
        dtype: of the inputs.
        case: what was special about the inputs.
        quantity: which result was furthest off.
        error: its relative error (norm of the difference over the norm); nan where there is no result.
        limit: what that may be.
        message: what was raised, empty otherwise.
    """

    subject: str
    backend: str
    dtype: str
    case: str
    quantity: str
    error: float
    limit: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; nan is not."""
        return self.error <= self.limit


@dataclass
class Report:
    """Everything that was found.

    Args:
        device: where tensors were.
        environment: `describe_environment` at the end, failures of backends included.
        checks: in the order in which they ran.
        unavailable: (op, backend, reason) of what could not run.
        timings: rows of the benchmark, empty without one.
        seconds: how long it all took.
    """

    device: str
    environment: dict[str, Any]
    checks: list[Check]
    unavailable: list[tuple[str, str, str]]
    timings: list[dict[str, Any]]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether something was checked and all of it is right."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """Valid JSON: errors that are no finite numbers are null."""
        checks = [dataclasses.asdict(check) | {"passed": check.passed} for check in self.checks]
        for check in checks:
            check["error"] = check["error"] if math.isfinite(check["error"]) else None
        values = {
            "passed": self.passed,
            "device": self.device,
            "seconds": self.seconds,
            "environment": self.environment,
            "checks": checks,
            "unavailable": [
                {"op": op, "backend": backend, "reason": reason} for op, backend, reason in self.unavailable
            ],
            "timings": self.timings,
        }
        return json.dumps(values, indent=2, allow_nan=False)

    def to_text(self) -> str:
        """For people: the environment, a line per subject, backend and dtype, and every check that failed."""
        lines = [*format_environment(self.environment), "", f"checked on {self.device} against float64:"]
        groups: dict[tuple[str, str, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.subject, check.backend, check.dtype), []).append(check)
        rows = [("", "backend", "dtype", "checks", "worst error", "limit", "")]
        for key, checks in groups.items():
            worst = max(checks, key=_badness)
            result = "ok" if all(check.passed for check in checks) else "FAILED"
            rows.append((*key, str(len(checks)), f"{worst.error:.1e}", f"{worst.limit:.1e}", result))
        lines += _aligned(rows)
        lines += [f"not run: {op} on {backend}: {reason}" for op, backend, reason in self.unavailable]
        for check in self.checks:
            if not check.passed:
                found = (
                    check.message
                    or f"{check.quantity} is off by {check.error:.2e}, at most {check.limit:.0e}"
                )
                lines.append(
                    f"FAILED: {check.subject}, {check.backend}, {check.dtype}, {check.case}: {found}"
                )
        if self.timings:
            columns = list(dict.fromkeys(column for row in self.timings for column in row))
            table = [tuple(columns)]
            table += [tuple(_cell(row.get(column)) for column in columns) for row in self.timings]
            lines += ["", *_aligned(table)]
        right = sum(check.passed for check in self.checks)
        lines += ["", f"{'PASSED' if self.passed else 'FAILED'}: {right} of {len(self.checks)} checks"]
        lines[-1] += f" in {self.seconds:.0f} s"
        return "\n".join(lines)


def compare(
    actual: dict[str, Tensor], expected: dict[str, Tensor], limits: dict[str, float] | None = None
) -> tuple[str, float, float]:
    """The quantity that is furthest off in relation to its limit, its error and the limit.

    Args:
        actual: what was computed, in any dtype.
        expected: the same in float64.
        limits: by quantity; without an entry that of the actual tensor's dtype.
    """
    limits = limits or {}
    found = []
    for name, wanted in expected.items():
        limit = limits.get(name, LIMITS[actual[name].dtype])
        found.append((name, _relative_error(actual[name], wanted), limit))
    return max(found, key=lambda entry: _ratio(entry[1], entry[2]))


def failed(subject: str, backend: str, dtype: str, case: str, error: Exception) -> Check:
    """A check that raised."""
    return Check(subject, backend, dtype, case, "", math.nan, 0.0, f"{type(error).__name__}: {error}")


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.double() - expected).norm().item()
    return difference / (expected.norm().item() or 1.0)


def _ratio(error: float, limit: float) -> float:
    return math.inf if math.isnan(error) or limit == 0 else error / limit


def _badness(check: Check) -> float:
    return _ratio(check.error, check.limit)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
