"""Validation of `residual_block`'s arguments; what concerns a norm alone is checked as `ghost_batch_norm` does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dtypes import FLOAT_DTYPES
from .problem import Convolution, Norm

__all__ = ["check_arguments", "check_recompute"]


def check_arguments(
    x: Tensor,
    convolutions: Sequence[Convolution],
    norms: Sequence[Norm],
    shortcut: tuple[Convolution, Norm | None] | None,
    skip: Tensor | None,
    preactivation: bool,
    recompute: bool | str,
) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        found = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"x is {found}; it must be a tensor of {', '.join(map(str, FLOAT_DTYPES))}")
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (ghosts*B, C, height, width)")
    if not convolutions or len(convolutions) != len(norms):
        raise ValueError(
            f"there are {len(convolutions)} convolutions and {len(norms)} norms; each convolution needs its norm"
        )
    check_recompute(recompute)
    if preactivation and skip is not None:
        raise ValueError(
            "skip is given and preactivation is True; the shortcut then reads what the first norm gave"
        )
    if preactivation and shortcut is not None and shortcut[1] is not None:
        raise ValueError("shortcut has a norm and preactivation is True; norms then come before convolutions")


def check_recompute(recompute: bool | str) -> None:
    if recompute not in (True, False, "pointwise"):
        raise ValueError(f"recompute is {recompute!r}; it must be True, False or 'pointwise'")
