"""Validation of `residual_block`'s arguments; what concerns a norm alone is checked as `ghost_batch_norm` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import FLOAT_DTYPES, accumulation_dtype
from ..ghost_batch_norm.checks import check_dense, check_eps, check_rows, check_spread, check_tensor
from .problem import Convolution, Geometry, Norm, shape_after

__all__ = ["check_arguments", "check_recompute", "check_values"]


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
    check_dense(x)
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


def check_values(
    x: Tensor,
    convolutions: Sequence[Convolution],
    norms: Sequence[Norm],
    shortcut: tuple[Convolution, Norm | None] | None,
    skip: Tensor | None,
    preactivation: bool,
    keep: Tensor | None,
    ghosts: int,
    lead_rows: int | None,
    autocast: torch.dtype | None,
) -> None:
    """Sizes, dtypes and devices, after `check_arguments`; autocast: the dtype of convolutions, None: of their input.

    That a convolution's operands fit each other is torch's to say.
    """
    check_rows(x, ghosts, lead_rows)
    if keep is not None:
        check_tensor("keep", keep, (ghosts,), (torch.bool,), x.device)
    dtype = autocast or x.dtype
    shapes = [x.shape]
    for i, convolution in enumerate(convolutions):
        shapes.append(_check_convolution(f"convolutions[{i}]", convolution, shapes[-1], x.device))
    if min(min(shape[2:]) for shape in shapes) < 1:
        return  # refused by torch, in words, or nothing is computed
    for i, norm in enumerate(norms):
        before = preactivation and i == 0
        shape = shapes[i] if preactivation else shapes[i + 1]
        _check_norm(f"norms[{i}]", norm, shape, x.dtype if before else dtype, x.device, ghosts, lead_rows)
    residual, of_residual = ("x", x) if skip is None else ("skip", skip)
    if skip is not None:
        if skip.dim() != 4:
            raise ValueError(f"skip has shape {tuple(skip.shape)}; it must be (ghosts*B, C, height, width)")
        check_tensor("skip", skip, (x.shape[0], *skip.shape[1:]), FLOAT_DTYPES, x.device)
    shape, found = of_residual.shape, of_residual.dtype
    if shortcut is not None:
        residual, found = "what shortcut gives", autocast or found
        shape = _check_convolution("shortcut", shortcut[0], shape, x.device)
        if shortcut[1] is not None:
            _check_norm("shortcut's norm", shortcut[1], shape, found, x.device, ghosts, lead_rows)
    if shape != shapes[-1]:
        raise ValueError(
            f"{residual} has shape {tuple(shape)}; it must be {tuple(shapes[-1])}, as what it is added to"
        )
    if found != dtype:
        raise TypeError(f"{residual} is a tensor of {found}; it must be of {dtype}, as what it is added to")


def _check_convolution(
    name: str, convolution: Convolution, shape: torch.Size, device: torch.device
) -> torch.Size:
    """The shape of what it gives."""
    weight, bias = convolution[:2]
    if weight.dim() != 4:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}; it must be (out, in / groups, height, width)"
        )
    for tensor in (weight, bias):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, as x is")
    return shape_after(shape, weight, Geometry(*convolution[2:5], convolution.groups))


def _check_norm(
    name: str,
    norm: Norm,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    ghosts: int,
    lead_rows: int | None,
) -> None:
    """Of a norm that reads an activation of this shape and dtype."""
    check_eps(norm.eps)
    dtypes = dtype, accumulation_dtype(dtype)
    for field in ("weight", "bias", "running_mean", "running_var"):
        vector = getattr(norm, field)
        if vector is not None:
            check_tensor(f"{name}: {field}", vector, (shape[1],), dtypes, device)
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must be given together")
    if norm.running_mean is None:
        check_spread(f"what {name} reads", shape, ghosts, lead_rows)


def check_recompute(recompute: bool | str) -> None:
    if recompute not in (True, False, "pointwise"):
        raise ValueError(f"recompute is {recompute!r}; it must be True, False or 'pointwise'")
