"""Validation of `ghost_batch_norm`'s arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import FLOAT_DTYPES, accumulation_dtype

__all__ = ["check_arguments", "check_dense", "check_eps", "check_rows", "check_spread", "check_tensor"]

ACTIVATIONS = ("relu", "identity")


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghosts: int,
    lead_rows: int | None,
    residual: Tensor | None,
    keep: Tensor | None,
    activation: str,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x is {_kind(x)}; it must be a tensor of {', '.join(map(str, FLOAT_DTYPES))}")
    check_dense(x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (ghosts*B, C, *spatial)")
    check_rows(x, ghosts, lead_rows)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be 'relu' or 'identity'")
    check_eps(eps)
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if vector is not None:
            check_tensor(name, vector, (x.shape[1],), (x.dtype, accumulation_dtype(x.dtype)), x.device)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if momentum is not None:
        _check_update(x, ghosts, running_mean, running_var, momentum)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), (x.dtype,), x.device)
    if keep is not None:
        check_tensor("keep", keep, (ghosts,), (torch.bool,), x.device)
        if residual is None:
            raise ValueError(
                "keep is given without residual; a dropped ghost batch passes its residual through"
            )
    if running_mean is None or momentum is not None:
        check_spread("x", x.shape, ghosts, lead_rows)


def check_dense(x: Tensor) -> None:
    """x has memory of its own that kernels can read."""
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
        raise TypeError(f"x is {kind}; it must be a dense tensor")


def check_eps(eps: float) -> None:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps}; it must be finite and not negative")


def check_spread(name: str, shape: torch.Size, ghosts: int, lead_rows: int | None) -> None:
    """What a norm reads has more than one value per channel of each ghost batch, or none."""
    if 0 in shape:
        return
    rows = shape[0] // ghosts
    if lead_rows is not None and ghosts > 1:
        rows = min(lead_rows, (shape[0] - lead_rows) // (ghosts - 1))
    if rows * math.prod(shape[2:]) == 1:
        raise ValueError(
            f"{name} has shape {tuple(shape)} with ghosts={ghosts}, lead_rows={lead_rows}: one value per channel and "
            "ghost batch has no variance; training needs more than one"
        )


def _check_update(
    x: Tensor, ghosts: int, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum is {momentum!r}; it must be a float or None")
    if not abs(momentum) < float("inf"):
        raise ValueError(f"momentum is {momentum}; it must be finite")
    if running_mean is None:
        raise ValueError("momentum is given without running_mean and running_var, which it updates")
    if ghosts != 1:
        raise ValueError(
            f"momentum is given with ghosts={ghosts}; running statistics are those of one ghost batch"
        )
    dtype = accumulation_dtype(x.dtype)
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running.dtype != dtype:
            raise TypeError(f"{name} is {_kind(running)}; to be updated it must be a tensor of {dtype}")
        if running.requires_grad:
            raise ValueError(f"{name} requires grad; to be updated it must not")


def check_rows(x: Tensor, ghosts: int, lead_rows: int | None) -> None:
    """x can be divided into these ghost batches."""
    if isinstance(ghosts, bool) or not isinstance(ghosts, (int, torch.SymInt)):
        raise TypeError(f"ghosts is {ghosts!r}; it must be an int")
    rows = x.shape[0]
    if lead_rows is None:
        if ghosts < 1 or rows % ghosts != 0:
            raise ValueError(f"ghosts is {ghosts}; it must be at least 1 and divide the {rows} rows of x")
        return
    if isinstance(lead_rows, bool) or not isinstance(lead_rows, (int, torch.SymInt)):
        raise TypeError(f"lead_rows is {lead_rows!r}; it must be an int or None")
    if ghosts < 1:
        raise ValueError(f"ghosts is {ghosts}; it must be at least 1")
    if ghosts == 1:
        if lead_rows != rows:
            raise ValueError(f"lead_rows is {lead_rows}; the one ghost batch has all {rows} rows of x")
        return
    least, rest = min(rows, 1), rows - lead_rows
    if lead_rows < least or rest < (ghosts - 1) * least or rest % (ghosts - 1) != 0:
        raise ValueError(
            f"lead_rows is {lead_rows}; it must be at least 1 and leave rows of x, {rows} in all, that the other "
            f"{ghosts - 1} ghost batches can share equally"
        )


def check_tensor(name: str, value: object, shape: tuple, dtypes: tuple, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{name} is {_kind(value)}; it must be a tensor of {allowed}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}, as x is")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
