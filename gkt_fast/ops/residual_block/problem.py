"""How a residual block is described: its layers as users give them, and what of them is not a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SLOTS", "Convolution", "Geometry", "Norm", "Problem", "describe", "parameters_of", "shape_after"]


class Convolution(NamedTuple):
    """A convolution that pads with zeros.

    Args:
        weight: (out, in / groups, height, width).
        bias: (out,), or None.
        stride: vertical and horizontal; so are padding and dilation.
        padding: zeros at each edge.
        dilation: distance between taps.
        groups: of channels.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Norm(NamedTuple):
    """A batch norm.

    Args:
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        running_mean: (C,): normalises with these statistics (eval mode), which get no gradient. With running_var.
        running_var: (C,), see running_mean.
        eps: added to the variance.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5


SLOTS = 6
"""Tensors of a layer: weight and bias of its convolution; weight, bias, running mean and variance of its norm."""


class Geometry(NamedTuple):
    """What of a convolution is not a tensor."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Problem(NamedTuple):
    """What is told of a block besides tensors. A layer is a convolution with its norm.

    Args:
        convolutions: those of the main branch in the order in which they run, then that of the shortcut.
        eps: of the layers' norms; None: the layer, that of the shortcut, has none.
        shortcut: whether the last layer is that of the shortcut.
        preactivation: whether the main branch's norms come before their convolutions.
        ghosts: number of ghost batches.
        lead_rows: rows of the first ghost batch; None: as many as the others have.
        recompute: whether backward recomputes normalised activations instead of finding them saved.
        pointwise: whether it recomputes the outputs of 1x1 convolutions too.
        dtype: in which convolutions run; None: in that of their input.
    """

    convolutions: tuple[Geometry, ...]
    eps: tuple[float | None, ...]
    shortcut: bool
    preactivation: bool
    ghosts: int
    lead_rows: int | None = None
    recompute: bool = True
    pointwise: bool = False
    dtype: torch.dtype | None = None

    @property
    def depth(self) -> int:
        """Layers of the main branch."""
        return len(self.convolutions) - self.shortcut

    def flatten(self) -> tuple:
        """As arguments of a torch op."""
        geometry = [n for c in self.convolutions for n in (*c.stride, *c.padding, *c.dilation, c.groups)]
        eps = [-1.0 if e is None else e for e in self.eps]
        return (
            geometry,
            eps,
            self.shortcut,
            self.preactivation,
            self.ghosts,
            self.lead_rows,
            self.recompute,
            self.pointwise,
            self.dtype,
        )

    @classmethod
    def unflatten(cls, geometry: Sequence[int], eps: Sequence[float], *options) -> Problem:
        """The inverse of `flatten`."""
        numbers = (geometry[i : i + 7] for i in range(0, len(geometry), 7))
        convolutions = tuple(Geometry((a, b), (c, d), (e, f), groups) for a, b, c, d, e, f, groups in numbers)
        return cls(convolutions, tuple(None if e < 0 else e for e in eps), *options)


def describe(
    convolutions: Sequence[Convolution],
    norms: Sequence[Norm | None],
    *,
    shortcut: bool,
    preactivation: bool,
    ghosts: int,
    lead_rows: int | None,
    recompute: bool,
    pointwise: bool,
    dtype: torch.dtype | None,
) -> Problem:
    """The problem of these layers, that of the shortcut last."""
    geometry = tuple(Geometry(*(c[2:5]), c.groups) for c in convolutions)
    eps = tuple(None if norm is None else norm.eps for norm in norms)
    return Problem(geometry, eps, shortcut, preactivation, ghosts, lead_rows, recompute, pointwise, dtype)


def parameters_of(convolutions: Sequence[Convolution], norms: Sequence[Norm | None]) -> list[Tensor | None]:
    """The tensors of these layers, `SLOTS` of each."""
    return [
        tensor
        for convolution, norm in zip(convolutions, norms, strict=True)
        for tensor in (*convolution[:2], *(Norm() if norm is None else norm)[:4])
    ]


def shape_after(shape: torch.Size, weight: Tensor, geometry: Geometry) -> torch.Size:
    """Of a convolution's output."""
    places = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    ]
    return torch.Size((shape[0], weight.shape[0], *places))
