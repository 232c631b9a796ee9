"""How the streams of a step are run: modes that give the same numbers at different cost and memory."""

from __future__ import annotations

from .choice import Choice, choose_execution
from .explanation import explain_step
from .memory import GroupKnowledgeMemory
from .modes import EXECUTION_MODES
from .remembered_batch import check_remembered
from .stackable import StackingError
from .step import Execution, Mode, StepResult

__all__ = [
    "EXECUTION_MODES",
    "Choice",
    "Execution",
    "GroupKnowledgeMemory",
    "Mode",
    "StackingError",
    "StepResult",
    "check_remembered",
    "choose_execution",
    "explain_step",
]
