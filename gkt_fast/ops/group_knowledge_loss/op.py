"""`group_knowledge_loss`: cross entropy of the full network and distillation from each group to the next one.

z_s are the logits of stream s; stream 0 is the full network, then come the subnets loop by loop, group 1 to G
in each loop. n(z) = z, or with `normalize_logits` n(z) = (z - mean_c z) / sqrt(var_c z + eps), biased
variance over classes. The knowledge K_g of group g is a constant for the gradient; K_0 = n(z_0). For stream
s of group g, in order:

    p = softmax(K_{g-1} / T)          q = softmax(n(z_s) / T)
    kd_s = T^2 * mean over rows of sum_c p (log p - log q)
    K_g <- n(z_s) on the group's first visit, ema * K_g + (1 - ema) * n(z_s) afterwards

    loss = ce_weight * CE(z_0) + kd_weight * sum_s kd_s + subnet_ce_weight * sum_s CE(z_s)

Shapes: S streams, S = 1 + loops * groups; B batch; m the subnets' batch, the first m of it; C classes; a row is one
sample, or one position of a dense prediction, so that B * prod(spatial) rows of C classes belong to the full network
and m * prod(spatial) to each subnet. Means are over a stream's own rows. m = B unless the full network's logits come
apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function

from .. import library
from ..dtypes import FLOAT_DTYPES
from ..native import native_cuda_module, native_module
from ..registry import Implementation, register, run, run_in_plain_torch
from .checks import check_full_logits, check_streams, check_tensors, check_values
from .native import CppBackend, CudaBackend
from .options import SCHEMA, LossOptions, lists_options, loss_options
from .problem import Problem, outputs
from .reference import TorchBackend
from .triton import DEVICES as TRITON_DEVICES
from .triton import DTYPES as TRITON_DTYPES
from .triton import TritonBackend

__all__ = ["group_knowledge_loss"]

NAME = "group_knowledge_loss"


@lists_options
def group_knowledge_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    full_logits: Tensor | None = None,
    options: LossOptions | None = None,
    **fields: int | float | bool | str,
) -> tuple[Tensor, Tensor]:
    """Loss of Group Knowledge based Training over the logits of all streams (formula: module docstring).

    Args:
        logits: (S, B, C, *spatial), S = 1 + loops * groups, in the order full network, then per loop the
            subnets of group 1 to `groups`. float32, float64, bfloat16 or float16, any strides. Low
            precision is computed in float32. Beside `full_logits`: the subnets alone, (S - 1, m, C, *spatial), m <= B.
        targets: class indices (B, *spatial), int64, or class probabilities (B, C, *spatial), floating point
            and without gradient. Class indices must lie in [0, C) or equal `ignore_index`. Probabilities
            are taken as they are, as torch's cross_entropy does. Subnets use the first m.
        full_logits: the full network's logits (B, C, *spatial), of the same dtype as `logits` and with strides of their
            own, when the subnets ran on the first m of the batch only; the first m of them teach. None: they are
            the first of `logits`.
        options: the options of the loss; None: the defaults.
        fields: fields of `LossOptions`, by name, which replace those of `options`: groups, loops, ema, temperature,
            normalize_logits, eps, ce_weight, kd_weight, subnet_ce_weight, ignore_index, label_smoothing,
            distill_ignored, distillation.

    Returns:
        The loss, a scalar (float64 for float64 logits, float32 otherwise), and the terms (S,) of the same
        dtype, not weighted and detached: the full network's cross entropy, then every subnet's distillation
        term.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, option or class index is wrong. On a GPU a class index out of range makes the
            loss and the gradient of every cross entropy NaN instead, since reading it here would stall the device;
            `gkt_fast.ops.wrong_class_index` then names it.
        RuntimeError: its gradient is differentiated; that of `group_knowledge_loss_reference` can be.
    """
    o = loss_options(options, **fields)
    check_streams(logits, o.groups, o.loops, full_logits)
    if full_logits is None:
        check_tensors(logits, targets, o.ignore_index, class_dim=2)
        with_gradient = logits.requires_grad and torch.is_grad_enabled()
    else:
        check_full_logits(full_logits, logits)
        check_tensors(full_logits, targets, o.ignore_index, class_dim=1, name="full_logits")
        with_gradient = (logits.requires_grad or full_logits.requires_grad) and torch.is_grad_enabled()
    scale = _gradient_scale(logits, o.ce_weight, o.kd_weight * o.temperature, o.subnet_ce_weight)
    loss, terms, _, _ = _op(logits, targets, full_logits, *o.flatten(), with_gradient, scale)
    return loss, terms


def _gradient_scale(logits: Tensor, *weights: float) -> float:
    """The power of two by which the op multiplies the gradient it stores.

    float16 would lose the small gradients of a mean over many rows before a loss scale can reach them.
    """
    rows, largest = logits.shape[1] * math.prod(logits.shape[3:]), max(weights)
    if logits.dtype != torch.float16 or rows == 0 or largest == 0:
        return 1.0
    return 2.0 ** math.floor(math.log2(64 * rows / largest))


def _forward(
    logits: Tensor, targets: Tensor, full_logits: Tensor | None, *values: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *flat, with_gradient, gradient_scale = values
    problem = Problem(LossOptions.unflatten(tuple(flat)), gradient_scale)
    normalize = problem.options.normalize_logits
    check_values(logits, targets, normalize, class_dim=2)
    if full_logits is not None:
        check_values(full_logits, targets, normalize, class_dim=1)
    loss, terms, gradient, full_gradient = outputs(logits, full_logits, with_gradient)
    gradients = (
        gradient if with_gradient else None,
        full_gradient if with_gradient and full_logits is not None else None,
    )
    tensors = logits, targets, full_logits, loss, terms, *gradients
    if problem.options.distillation == "sigmoid":
        run_in_plain_torch(NAME, "distillation='sigmoid'", lambda backend: backend.forward(problem, *tensors))
    else:
        run(
            NAME,
            logits.device,
            logits.dtype,
            lambda backend: backend.forward(problem, *tensors),
        )
    return loss, terms, gradient, full_gradient


def _fake_forward(
    logits: Tensor, targets: Tensor, full_logits: Tensor | None, *values: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return outputs(logits, full_logits, with_gradient=values[-2])


class _Differentiated(Function):
    """The gradient is a result of the op, so that the logits are read once; backward scales it."""

    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, terms, *gradients = library.below_autograd(_op, *inputs)
        ctx.mark_non_differentiable(terms, *gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients, loss)
        ctx.apart = inputs[2] is not None
        ctx.unscale = 1 / inputs[-1]
        return loss, terms, *gradients

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, *_: None) -> tuple:
        if grad_loss is None:
            return None, None, None, *_NO_GRADIENTS
        *gradients, loss = ctx.saved_tensors
        gradients = tuple(gradients) if ctx.apart else (gradients[0],)
        last = not torch._C._autograd._get_current_graph_task_keep_graph()
        if torch.is_grad_enabled():
            gradients = library.refuse_second_derivative(NAME, gradients, through=(loss,))
        elif all(type(gradient) is Tensor for gradient in gradients) and last:
            return _in_place_of_inputs([_scale_in_place(g, grad_loss, ctx.unscale) for g in gradients])
        factor = grad_loss * ctx.unscale
        if (
            gradients[0].dtype != factor.dtype
        ):  # as a scalar it would be rounded to the gradient's dtype first
            factor = factor.reshape(1)
        return _in_place_of_inputs([(gradient * factor).to(gradient.dtype) for gradient in gradients])


def _in_place_of_inputs(gradients: list[Tensor]) -> tuple:
    """One gradient per input of the op, None where there is none."""
    return gradients[0], None, gradients[1] if len(gradients) == 2 else None, *_NO_GRADIENTS


def _scale_in_place(gradient: Tensor, grad_loss: Tensor, unscale: float) -> Tensor:
    """For a gradient that nobody can ask for again.

    On the CPU reading the factor costs nothing, and the usual 1 saves a pass over the gradient.
    """
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu":
        factor = grad_loss.item() * unscale
        return gradient if factor == 1 else gradient.mul_(factor)
    return gradient.mul_((grad_loss * unscale).reshape(1))


for _implementation in (
    Implementation(NAME, "cpp", ("cpu",), FLOAT_DTYPES, lambda: CppBackend(native_module())),
    Implementation(NAME, "cuda", ("cuda",), FLOAT_DTYPES, lambda: CudaBackend(native_cuda_module())),
    Implementation(NAME, "triton", TRITON_DEVICES, TRITON_DTYPES, TritonBackend),
    Implementation(NAME, "torch", (), FLOAT_DTYPES, TorchBackend),
):
    register(_implementation)

_op = library.define(
    f"{NAME}(Tensor logits, Tensor targets, Tensor? full_logits, {SCHEMA}, bool with_gradient, float gradient_scale) "
    "-> (Tensor loss, Tensor terms, Tensor gradient, Tensor full_gradient)",
    _forward,
    _fake_forward,
)
_NO_GRADIENTS = (None,) * (len(_op._schema.arguments) - 3)
library.differentiate(_op, _Differentiated)
