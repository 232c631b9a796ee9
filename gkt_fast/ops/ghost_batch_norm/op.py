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

import functools

import torch
from torch import Tensor

from ..registry import run
from . import backends as backends
from .checks import check_arguments, statistics_dtype

__all__ = ["ghost_batch_norm", "ghost_batch_norm_reference"]


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
    check_arguments(x, weight, bias, ghosts, residual, keep, activation, eps, running_mean, running_var)
    dtype = statistics_dtype(x.dtype)
    if x.dtype != dtype:
        weight, bias, running_mean, running_var = (
            None if vector is None else vector.to(dtype)
            for vector in (weight, bias, running_mean, running_var)
        )
    y, statistics, _ = _op(
        x, weight, bias, residual, keep, running_mean, running_var, ghosts, activation == "relu", eps
    )
    return y, statistics[0], statistics[2]


# The op's statistics are (3, m, C): mean, what rounding took from the mean, variance. The mask has one bit per
# element of y, 1 where the ReLU passes the gradient (layout: csrc/gkt_abi.h); it is empty without ReLU.
_library = torch.library.Library("gkt_fast", "FRAGMENT")
_library.define(
    "ghost_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? keep, "
    "Tensor? running_mean, Tensor? running_var, int ghosts, bool relu, float eps) "
    "-> (Tensor y, Tensor statistics, Tensor mask)"
)
_library.define(
    "ghost_batch_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor statistics, Tensor mask, "
    "Tensor? keep, int ghosts, bool relu, float eps, bool use_running, bool residual) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)


def _outputs(x: Tensor, channels_last: bool, ghosts: int, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    statistics = x.new_empty((3, ghosts, x.shape[1]), dtype=statistics_dtype(x.dtype))
    mask = x.new_empty(backends.mask_size(x.shape, channels_last) if relu else 0, dtype=torch.uint8)
    return y, statistics, mask


def _forward(x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps):
    x, channels_last = backends.readable(x)
    y, statistics, mask = _outputs(x, channels_last, ghosts, relu)
    if running_mean is not None:
        statistics[0] = running_mean
        statistics[1] = 0
        statistics[2] = running_var
    if x.numel() == 0:
        return y, statistics if running_mean is not None else statistics.zero_(), mask
    if residual is not None:
        residual = backends.readable_as(residual, channels_last)
    problem = backends.describe(x, channels_last, ghosts, relu, eps, running_mean is not None)
    tensors = (x, residual, weight, bias, keep, y, statistics, mask)
    run("ghost_batch_norm", x.device.type, x.dtype, lambda backend: backend.forward(problem, *tensors))
    return y, statistics, mask


def _backward(grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, residual):
    x, channels_last = backends.readable(x)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if residual else x.new_empty(0)
    grad_weight, grad_bias = statistics.new_empty((2, x.shape[1])).unbind()
    if x.numel() == 0:
        return grad_x, grad_residual, grad_weight.zero_(), grad_bias.zero_()
    problem = backends.describe(x, channels_last, ghosts, relu, eps, use_running)
    grad_y = backends.readable_as(grad_y, channels_last)
    saved = (grad_y, x, weight, statistics, mask, keep)
    gradients = (grad_x, grad_residual if residual else None, grad_weight, grad_bias)
    run(
        "ghost_batch_norm",
        x.device.type,
        x.dtype,
        lambda backend: backend.backward(problem, *saved, *gradients),
    )
    return grad_x, grad_residual, grad_weight, grad_bias


for _device in ("CPU", "CUDA"):
    _library.impl("ghost_batch_norm", _forward, _device)
    _library.impl("ghost_batch_norm_backward", _backward, _device)


@torch.library.register_fake("gkt_fast::ghost_batch_norm", lib=_library)
def _fake_forward(x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps):
    x, channels_last = backends.readable(x)
    return _outputs(x, channels_last, ghosts, relu)


@torch.library.register_fake("gkt_fast::ghost_batch_norm_backward", lib=_library)
def _fake_backward(grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, residual):
    x, _ = backends.readable(x)
    grad_residual = torch.empty_like(x) if residual else x.new_empty(0)
    return (
        torch.empty_like(x),
        grad_residual,
        statistics.new_empty(x.shape[1]),
        statistics.new_empty(x.shape[1]),
    )


class _GhostBatchNorm(torch.autograd.Function):
    """The Autograd key's kernel. torch.library.register_autograd does the same at five times the overhead."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps):
        inputs = x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps
        y, statistics, mask = _below_autograd(_op, *inputs)
        ctx.mark_non_differentiable(statistics, mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, statistics, mask, keep)
        ctx.options = ghosts, relu, eps, running_mean is not None
        return y, statistics, mask

    @staticmethod
    def backward(ctx, grad_y, _statistics, _mask):
        if grad_y is None:
            return (None,) * 10
        x, weight, statistics, mask, keep = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        ghosts, relu, eps, use_running = ctx.options
        own_residual = needs_residual and relu  # without ReLU it is the gradient of y
        if needs_x or needs_weight or needs_bias or own_residual:
            # Without create_graph the Autograd key has nothing to do.
            call = (
                _backward_op if torch.is_grad_enabled() else functools.partial(_below_autograd, _backward_op)
            )
            grad_x, grad_residual, grad_weight, grad_bias = call(
                grad_y, x, weight, statistics, mask, keep, ghosts, relu, eps, use_running, own_residual
            )
        else:
            grad_x = grad_residual = grad_weight = grad_bias = None
        return (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_residual if own_residual else grad_y if needs_residual else None,
            *(None,) * 6,
        )


class _GhostBatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        return _below_autograd(_backward_op, *inputs)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "ghost_batch_norm can't be differentiated twice; ghost_batch_norm_reference can, and computes the same"
        )


def _below_autograd(op, *inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _autograd_kernel(function: type[torch.autograd.Function], op):
    return lambda *inputs: (
        function.apply(*inputs) if torch.is_grad_enabled() else _below_autograd(op, *inputs)
    )


_op = torch.ops.gkt_fast.ghost_batch_norm.default
_backward_op = torch.ops.gkt_fast.ghost_batch_norm_backward.default
_library.impl("ghost_batch_norm", _autograd_kernel(_GhostBatchNorm, _op), "Autograd")
_library.impl(
    "ghost_batch_norm_backward", _autograd_kernel(_GhostBatchNormBackward, _backward_op), "Autograd"
)
