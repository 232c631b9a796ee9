"""Knowledge kept by sample, in loops that don't say which samples a batch holds."""

from __future__ import annotations

from ..config import GKTConfig

__all__ = ["refuse_knowledge_by_sample"]


def refuse_knowledge_by_sample(config: GKTConfig, loop: str) -> None:
    """Refuses what a library's loop can't do.

    Raises:
        ValueError: knowledge is to outlive the step.
    """
    if config.knowledge == "dataset":
        raise ValueError(
            f"knowledge is 'dataset', which needs the indices of a batch's samples, and {loop} has none; use "
            "knowledge='batch', or GKTTrainer, Accelerate or a loop of your own"
        )
