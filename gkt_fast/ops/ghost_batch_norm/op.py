"""Batch normalisation with statistics per ghost batch, the residual addition and the ReLU in one op.

A stacked batch holds m ghost batches of B rows each: the activations of m states that run the same block. With
g the ghost batch of a row, c its channel, and n = B * prod(spatial) values per ghost batch and channel::

    mean[g, c] = sum(x[g, :, c]) / n            var[g, c] = sum((x[g, :, c] - mean[g, c])^2) / n
    z = (x - mean) / sqrt(var + eps) * weight + bias + residual          y = max(z, 0), or z

as the m states would be normalised one after another (Ghost Batch Norm: Hoffer et al. 2017, arXiv 1705.08741).

Shapes: m ghost batches, B rows in each, C channels; x, residual, y (m*B, C, *spatial); weight, bias (C,);
mean, var (m, C); keep (m,). The first ghost batch may have another number of rows than the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .. import library
from ..dtypes import FLOAT_DTYPES, accumulation_dtype
from ..native import native_cuda_module, native_module
from ..registry import Implementation, register, run
from .checks import check_arguments
from .native import CppBackend, CudaBackend
from .passes import FAKE_PASSES, PassesOn
from .reference import TorchBackend
from .triton import DEVICES as TRITON_DEVICES
from .triton import DTYPES as TRITON_DTYPES
from .triton import TritonBackend

__all__ = ["ghost_batch_norm"]

NAME = "ghost_batch_norm"


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ghosts: int,
    lead_rows: int | None = None,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """activation(batch_norm(x) + residual), each ghost batch normalised with its own statistics.

    Without running statistics (training) x is normalised with its own mean and biased variance and the gradient
    flows through them. With them (eval mode) the op is a folded affine map, the same for every ghost batch. With them
    and a momentum (training) x is normalised with its own, and the running ones are updated in place.

    Args:
        x: (m*B, C, *spatial), spatial of any rank, also none; float32, float64, bfloat16 or float16. Contiguous,
            channels_last and slices of them along batch or channels are read in place.
        weight: (C,) in float32 (float64 for float64 x) or in x's dtype; None for 1.
        bias: as weight; None for 0.
        ghosts: m, the number of ghost batches; must divide the number of rows.
        lead_rows: rows of the first ghost batch, if not as many as of each other one: x is then
            (lead_rows + (m-1)*B, C, *spatial). None: all have as many.
        residual: what is added before the activation, of x's shape and dtype; None for nothing.
        keep: (m,) bool. A ghost batch with False is dropped: its y is its residual untouched (no activation), the
            gradient of y goes to the residual alone, and its x gets a gradient of zero and takes no part in the
            gradients of weight and bias. Its statistics are reported all the same. Needs a residual.
        activation: "relu" or "identity".
        eps: added to the variance.
        running_mean: (C,), eval mode: normalises with these statistics, which get no gradient. With running_var.
        running_var: (C,), see running_mean.
        momentum: updates the running statistics with those of the one ghost batch, the variance unbiased:
            r <- (1 - momentum) r + momentum * statistic. They must be in float32 (float64 for float64 x); an empty
            batch leaves them as they are. None: they are not updated.

    Returns:
        y of x's shape, dtype and memory format; mean and biased variance used, (m, C) each, in float32 (float64
        for float64 x), without gradient. An empty batch gives an empty y and zeros.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, or value is wrong, or in training a channel of a ghost batch has one value only.
        RuntimeError: its gradient is differentiated; that of `ghost_batch_norm_reference` can be.
    """
    check_arguments(
        x,
        weight,
        bias,
        ghosts,
        lead_rows,
        residual,
        keep,
        activation,
        eps,
        running_mean,
        running_var,
        momentum,
    )
    dtype = accumulation_dtype(x.dtype)
    if x.dtype != dtype:
        weight, bias, running_mean, running_var = (
            None if vector is None else vector.to(dtype)
            for vector in (weight, bias, running_mean, running_var)
        )
    if momentum is not None:
        y, statistics, _ = _tracking_op(
            x, weight, bias, residual, keep, running_mean, running_var, momentum, activation == "relu", eps
        )
        return y, statistics[0], statistics[2]
    y, statistics, _ = _op(
        x,
        weight,
        bias,
        residual,
        keep,
        running_mean,
        running_var,
        ghosts,
        activation == "relu",
        eps,
        lead_rows,
    )
    return y, statistics[0], statistics[2]


def _forward(x, *arguments):
    return run(NAME, x.device, x.dtype, lambda backend: PassesOn(backend).forward(x, *arguments))


def _tracking_forward(x, weight, bias, residual, keep, running_mean, running_var, momentum, relu, eps):
    return _forward(x, weight, bias, residual, keep, running_mean, running_var, 1, relu, eps, None, momentum)


def _fake_tracking_forward(x, weight, bias, residual, keep, running_mean, running_var, momentum, relu, eps):
    return FAKE_PASSES.forward(x, weight, bias, residual, keep, running_mean, running_var, 1, relu, eps)


def _backward(grad_y, x, *arguments):
    def on(backend):
        return PassesOn(backend).backward(grad_y, x, *arguments)

    return _present(run(NAME, x.device, x.dtype, on))


def _fake_backward(*arguments):
    return _present(FAKE_PASSES.backward(*arguments))


def _present(gradients):
    """As results of a torch op, which are tensors: an empty one for none."""
    grad_x, grad_residual, *of_parameters = gradients
    return grad_x, grad_x.new_empty(0) if grad_residual is None else grad_residual, *of_parameters


def _save(ctx, x, weight, keep, results, options, lead_rows):
    y, statistics, mask = results
    ctx.mark_non_differentiable(statistics, mask)
    ctx.set_materialize_grads(False)
    library.save(ctx, x, weight, statistics, mask, keep)
    ctx.options, ctx.lead_rows = options, lead_rows
    return y, statistics, mask


def _gradients(ctx, grad_y):
    """Of x, weight, bias and residual."""
    if grad_y is None:
        return (None,) * 4
    x, weight, statistics, mask, keep = library.saved(ctx)
    needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    own_residual = needs_residual and ctx.options[1]  # without ReLU it is the gradient of y
    grad_x = grad_residual = grad_weight = grad_bias = None
    if needs_x or needs_weight or needs_bias or own_residual:
        gradients = library.below_autograd(
            _backward_op,
            grad_y,
            x,
            weight,
            statistics,
            mask,
            keep,
            *ctx.options,
            own_residual,
            ctx.lead_rows,
        )
        if torch.is_grad_enabled():
            through = (grad_y, x) if weight is None else (grad_y, x, weight)
            gradients = library.refuse_second_derivative(NAME, gradients, through)
        grad_x, grad_residual, grad_weight, grad_bias = gradients
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_residual if own_residual else grad_y if needs_residual else None,
    )


class _Differentiated(Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps, lead_rows=None
    ):
        inputs = x, weight, bias, residual, keep, running_mean, running_var, ghosts, relu, eps, lead_rows
        results = library.below_autograd(_op, *inputs)
        options = ghosts, relu, eps, running_mean is not None
        return _save(ctx, x, weight, keep, results, options, lead_rows)

    @staticmethod
    def backward(ctx, grad_y, *_: None):
        return *_gradients(ctx, grad_y), *(None,) * 7


class _DifferentiatedTracking(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, keep, running_mean, running_var, momentum, relu, eps):
        inputs = x, weight, bias, residual, keep, running_mean, running_var, momentum, relu, eps
        results = library.below_autograd(_tracking_op, *inputs)
        return _save(ctx, x, weight, keep, results, (1, relu, eps, False), None)

    @staticmethod
    def backward(ctx, grad_y, *_: None):
        return *_gradients(ctx, grad_y), *(None,) * 6


for _implementation in (
    Implementation(NAME, "cpp", ("cpu",), FLOAT_DTYPES, lambda: CppBackend(native_module())),
    Implementation(NAME, "cuda", ("cuda",), FLOAT_DTYPES, lambda: CudaBackend(native_cuda_module())),
    Implementation(NAME, "triton", TRITON_DEVICES, TRITON_DTYPES, TritonBackend),
    Implementation(NAME, "torch", ("cpu", "cuda"), FLOAT_DTYPES, TorchBackend),
):
    register(_implementation)

_op = library.define(
    f"{NAME}(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? keep, "
    "Tensor? running_mean, Tensor? running_var, int ghosts, bool relu, float eps, SymInt? lead_rows=None) "
    "-> (Tensor y, Tensor statistics, Tensor mask)",
    _forward,
    FAKE_PASSES.forward,
)
_backward_op = library.define(
    f"{NAME}_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor statistics, Tensor mask, "
    "Tensor? keep, int ghosts, bool relu, float eps, bool use_running, bool residual, SymInt? lead_rows=None) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _backward,
    _fake_backward,
)
_tracking_op = library.define(
    f"{NAME}_tracking(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? keep, "
    "Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, bool relu, float eps) "
    "-> (Tensor y, Tensor statistics, Tensor mask)",
    _tracking_forward,
    _fake_tracking_forward,
)
library.differentiate(_op, _Differentiated)
library.differentiate(_tracking_op, _DifferentiatedTracking)
