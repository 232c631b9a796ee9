"""Activation checkpointing as seen from within a forward: which calls a backward will run again.

torch's two kinds are told apart. The one that saves no tensors (use_reentrant=False) recomputes a region of the forward
when the backward needs a tensor that was saved in it. The other (use_reentrant=True) hides the region from autograd
and runs it anew in any case. timm, transformers and torch's own wrappers are built on these.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["REENTRANT", "Regions", "in_region", "recomputing"]

REENTRANT = "use_reentrant=True"


def recomputing() -> bool:
    """Whether this runs within a backward."""
    return torch._C._current_graph_task_id() != -1


def _region(reentrant_possible: bool) -> Any:
    """The innermost checkpointed region in which this runs: what torch keeps of it, `REENTRANT`, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    if getattr(pack, "__qualname__", "").startswith("_checkpoint_hook."):
        cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
        return cells["frame"].cell_contents
    if reentrant_possible and not torch.is_grad_enabled():
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            in_checkpoint = code.co_name == "forward" and code.co_filename.endswith("checkpoint.py")
            if in_checkpoint and "run_function" in frame.f_locals:
                return REENTRANT
            frame = frame.f_back
    return None


def in_region() -> bool:
    """Whether a backward would run this again: it is within a checkpointed region, and gradients will be needed."""
    return _region(reentrant_possible=True) is not None


class Regions:
    """The layers that were called in each checkpointed region of a forward whose layers are partly left out.

    A recomputed region calls its layers anew. That gives what the forward gave where all of them ran, each by itself,
    and where none ran and nothing was saved beside them.

    Attributes:
        in_region: whether the last call was in such a region.
        crowded: whether it was not the first there.
    """

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._calls: dict[int, tuple[Any, list[tuple[str, bool]]]] = {}
        self.in_region = False
        self.crowded = False

    def call(self, path: str, ran: bool) -> str | None:
        """Records a call of a layer; `ran`: it ran, and was neither dropped nor known already.

        Returns:
            Why the region can't be recomputed; None: nothing is known to speak against it yet.
        """
        region = _region(self._gradients) if self._gradients else None
        self.in_region = region is not None
        if region is None:
            self.crowded = False
            return None
        if region is REENTRANT:
            return f"layer {path!r} is checkpointed with use_reentrant=True, which runs it anew without its stream"
        calls = self._calls.setdefault(id(region), (region, []))[1]
        calls.append((path, ran))
        self.crowded = len(calls) > 1
        return None

    def reason_against(self) -> str | None:
        """Why a region of those recorded can't be recomputed; None: they all can."""
        for region, calls in self._calls.values():
            ran = [ran for _, ran in calls]
            if not all(ran) and (any(ran) or region.weak_holders):
                paths = ", ".join(repr(path) for path, _ in calls[:4])
                return (
                    f"activation checkpointing holds {paths} in one region, of which a subnet leaves a part out; "
                    "recomputed, it would run whole. Checkpoint each block by itself, or use execution='sequential'"
                )
        return None
