"""Batch normalisation with statistics per ghost batch, the residual addition and the ReLU in one op.

A stacked batch holds m ghost batches of B rows each: the activations of m states that run the same block. With
g the ghost batch of a row, c its channel, and n = B * prod(spatial) values per ghost batch and channel::

    mean[g, c] = sum(x[g, :, c]) / n            var[g, c] = sum((x[g, :, c] - mean[g, c])^2) / n
    z = (x - mean) / sqrt(var + eps) * weight + bias + residual          y = max(z, 0), or z

as the m states would be normalised one after another (Ghost Batch Norm: Hoffer et al. 2017, arXiv 1705.08741).

Shapes: m ghost batches, B rows in each, C channels; x, residual, y (m*B, C, *spatial); weight, bias (C,);
mean, var (m, C); keep (m,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ghost_batch_norm", "ghost_batch_norm_reference"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "identity")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of mean, var and the arithmetic: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ghost_batch_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ghosts: int,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch, differentiable by autograd as often as wanted; arguments of `ghost_batch_norm`."""
    dtype = statistics_dtype(x.dtype)
    by_ghost = (ghosts, x.shape[0] // ghosts, *x.shape[1:])  # (m, B, C, *spatial)
    per_channel = (ghosts, 1, -1, *[1] * (x.dim() - 2))
    values = x.to(dtype).reshape(by_ghost)
    if running_mean is not None:
        mean, var = (r.to(dtype).expand(ghosts, -1) for r in (running_mean, running_var))
    elif x.numel() == 0:
        mean = var = values.new_zeros(ghosts, x.shape[1])
    else:
        var, mean = torch.var_mean(values, (1, *range(3, values.dim())), correction=0)
    z = (values - mean.reshape(per_channel)) * torch.rsqrt(var + eps).reshape(per_channel)
    if weight is not None:
        z = z * weight.to(dtype).reshape(1, *per_channel[1:])
    if bias is not None:
        z = z + bias.to(dtype).reshape(1, *per_channel[1:])
    if residual is not None:
        z = z + residual.to(dtype).reshape(by_ghost)
    y = torch.relu(z) if activation == "relu" else z
    if keep is not None:
        y = torch.where(keep.reshape(ghosts, *[1] * (y.dim() - 1)), y, residual.to(dtype).reshape(by_ghost))
    return y.reshape(x.shape).to(x.dtype), mean.detach().clone(), var.detach().clone()


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ghosts: int,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """activation(batch_norm(x) + residual), each ghost batch normalised with its own statistics.

    Without running statistics (training) x is normalised with its own mean and biased variance and the gradient
    flows through them. With them (eval mode) the op is a folded affine map, the same for every ghost batch.

    Args:
        x: (m*B, C, *spatial), spatial of any rank, also none; float32, float64, bfloat16 or float16. Contiguous,
            channels_last and slices of them along batch or channels are read in place.
        weight: (C,) in float32 (float64 for float64 x) or in x's dtype; None for 1.
        bias: as weight; None for 0.
        ghosts: m, the number of ghost batches; must divide the number of rows.
        residual: what is added before the activation, of x's shape and dtype; None for nothing.
        keep: (m,) bool. A ghost batch with False is dropped: its y is its residual untouched (no activation), the
            gradient of y goes to the residual alone, and its x gets a gradient of zero and takes no part in the
            gradients of weight and bias. Its statistics are reported all the same. Needs a residual.
        activation: "relu" or "identity".
        eps: added to the variance.
        running_mean: (C,), eval mode: normalises with these statistics, which get no gradient. With running_var.
        running_var: (C,), see running_mean.

    Returns:
        y of x's shape, dtype and memory format; mean and biased variance used, (m, C) each, in float32 (float64
        for float64 x), without gradient. An empty batch gives an empty y and zeros.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, or value is wrong, or in training a channel of a ghost batch has one value only.
    """
    _check(x, weight, bias, ghosts, residual, keep, activation, eps, running_mean, running_var)
    return ghost_batch_norm_reference(
        x,
        weight,
        bias,
        ghosts=ghosts,
        residual=residual,
        keep=keep,
        activation=activation,
        eps=eps,
        running_mean=running_mean,
        running_var=running_var,
    )


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghosts: int,
    residual: Tensor | None,
    keep: Tensor | None,
    activation: str,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x is {_kind(x)}; it must be a tensor of {', '.join(map(str, DTYPES))}")
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (ghosts*B, C, *spatial)")
    if isinstance(ghosts, bool) or not isinstance(ghosts, (int, torch.SymInt)):
        raise TypeError(f"ghosts is {ghosts!r}; it must be an int")
    if ghosts < 1 or x.shape[0] % ghosts != 0:
        raise ValueError(f"ghosts is {ghosts}; it must be at least 1 and divide the {x.shape[0]} rows of x")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be 'relu' or 'identity'")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is {eps}; it must be finite and not negative")
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if vector is not None:
            _check_tensor(name, vector, (x.shape[1],), (x.dtype, statistics_dtype(x.dtype)), x.device)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if residual is not None:
        _check_tensor("residual", residual, tuple(x.shape), (x.dtype,), x.device)
    if keep is not None:
        _check_tensor("keep", keep, (ghosts,), (torch.bool,), x.device)
        if residual is None:
            raise ValueError(
                "keep is given without residual; a dropped ghost batch passes its residual through"
            )
    if running_mean is None and x.numel() == ghosts * x.shape[1] != 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} with ghosts={ghosts}: one value per channel and ghost batch has no "
            "variance; training needs more than one"
        )


def _check_tensor(name: str, value: object, shape: tuple, dtypes: tuple, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{name} is {_kind(value)}; it must be a tensor of {allowed}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}, as x is")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
