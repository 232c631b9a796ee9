"""`residual_block` in plain torch, differentiable by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ghost_batch_norm.reference import ghost_batch_norm_reference
from .problem import Convolution, Norm

__all__ = ["residual_block_reference"]

Statistics = tuple[Tensor, Tensor]


def residual_block_reference(
    x: Tensor,
    convolutions: Sequence[Convolution],
    norms: Sequence[Norm],
    *,
    ghosts: int,
    lead_rows: int | None = None,
    shortcut: tuple[Convolution, Norm | None] | None = None,
    skip: Tensor | None = None,
    keep: Tensor | None = None,
    preactivation: bool = False,
) -> tuple[Tensor, list[Statistics]]:
    """The op in plain torch, differentiable by autograd as often as wanted; arguments of `residual_block`."""
    statistics: list[Statistics] = []

    def normalize(a: Tensor, norm: Norm, **options) -> Tensor:
        weight, bias, mean, var, eps = norm
        rows = {} if lead_rows is None else {"lead_rows": lead_rows}
        y, *found = ghost_batch_norm_reference(
            a, weight, bias, ghosts=ghosts, running_mean=mean, running_var=var, eps=eps, **rows, **options
        )
        statistics.append(tuple(found))
        return y

    if preactivation:
        a = normalize(x, norms[0])
        residual = x if shortcut is None else _convolve(a, shortcut[0])
        y = _convolve(a, convolutions[0])
        for convolution, norm in zip(convolutions[1:], norms[1:], strict=True):
            y = _convolve(normalize(y, norm), convolution)
        if keep is not None:
            y = torch.where(_per_row(keep, y, lead_rows), y, 0)
        return y + residual, statistics
    a = x
    for convolution, norm in zip(convolutions[:-1], norms[:-1], strict=True):
        a = normalize(_convolve(a, convolution), norm)
    c = _convolve(a, convolutions[-1])
    place = len(statistics)
    residual = x if skip is None else skip
    if shortcut is not None:
        residual = _convolve(residual, shortcut[0])
        if shortcut[1] is not None:
            residual = normalize(residual, shortcut[1], activation="identity")
    y = normalize(c, norms[-1], residual=residual, keep=keep)
    statistics.insert(place, statistics.pop())  # those of the shortcut come last
    return y, statistics


def _convolve(x: Tensor, convolution: Convolution) -> Tensor:
    weight, bias, stride, padding, dilation, groups = convolution
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _per_row(keep: Tensor, x: Tensor, lead_rows: int | None) -> Tensor:
    """keep (m,) for each row of x, (rows, 1, 1, 1)."""
    ghosts, rows = keep.shape[0], x.shape[0]
    if lead_rows is None or ghosts == 1:
        counts = torch.full((ghosts,), rows // ghosts)
    else:
        counts = torch.tensor([lead_rows] + [(rows - lead_rows) // (ghosts - 1)] * (ghosts - 1))
    return keep.repeat_interleave(counts.to(keep.device), output_size=rows)[:, None, None, None]
