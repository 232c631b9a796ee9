"""How the streams of a step are run: modes that give the same numbers at different cost and memory."""

from __future__ import annotations

from .choice import Choice, choose_execution
from .lean import run_lean
from .plain import run_plain
from .sequential import run_sequential
from .shared import run_shared
from .stacked import StackingError, run_stacked
from .step import Execution, Network, StepResult, Streams

__all__ = [
    "EXECUTION_MODES",
    "Choice",
    "Execution",
    "Network",
    "StackingError",
    "StepResult",
    "Streams",
    "choose_execution",
    "run_plain",
]

EXECUTION_MODES: dict[str, Execution] = {
    "sequential": run_sequential,
    "shared": run_shared,
    "stacked": run_stacked,
    "lean": run_lean,
}
