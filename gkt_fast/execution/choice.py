"""Which mode `execution="auto"` runs. The rule, in one place:

1. `sequential` where subnets see smaller images (`subnet_resolution`): there is nothing to share.
2. `stacked` where the model's layers allow it: every state once, in the fewest calls.
3. Otherwise `shared`: the same states, computed one by one.

The rule is the same on a GPU: predicted bounds (docs/roofline.md) put `stacked` far ahead of `shared` where launches
decide, in small networks, and within 3 % of it where memory does.

`lean` saves memory and `sequential` is the baseline; both are chosen by hand. A model that can't be stacked after all
in its first step (blocks with several arguments, computations between blocks) falls back to `shared`. Every choice
other than `stacked` is logged once, with its reason.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .stacked import reason_against_stacking

__all__ = ["Choice", "choose_execution"]


class Choice(NamedTuple):
    """A mode and why."""

    mode: str
    reason: str


def choose_execution(
    requested: str, model: nn.Module, refused: str | None = None, *, resized: bool = False
) -> Choice:
    """The mode that runs.

    Args:
        requested: the configuration's `execution`.
        model: the network.
        refused: why an earlier step of this model couldn't be stacked; None: it could, or wasn't tried.
        resized: whether subnets see the images at another resolution than the full network.
    """
    if requested != "auto":
        return Choice(requested, "asked for")
    if resized:
        return Choice(
            "sequential",
            "subnets see smaller images (subnet_resolution), so that no activation can be shared",
        )
    reason = refused or reason_against_stacking(model)
    if reason is not None:
        return Choice("shared", f"states can't be stacked: {reason}")
    return Choice("stacked", "every state once, states that run the same layer as one batch")
