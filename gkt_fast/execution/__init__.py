"""How the streams of a step are run: modes that give the same numbers at different cost and memory."""

from __future__ import annotations

from .lean import run_lean
from .plain import run_plain
from .sequential import run_sequential
from .shared import run_shared
from .step import Execution, Network, StepResult, Streams

__all__ = [
    "EXECUTION_MODES",
    "Execution",
    "Network",
    "StepResult",
    "Streams",
    "choose_execution",
    "run_plain",
]

EXECUTION_MODES: dict[str, Execution] = {
    "sequential": run_sequential,
    "shared": run_shared,
    "lean": run_lean,
}


def choose_execution(requested: str) -> str:
    """The mode that runs: the requested one; for `auto`, `shared`."""
    return "shared" if requested == "auto" else requested
