"""`group_knowledge_loss`: cross entropy of the full network and distillation from each group to the next one.

z_s are the logits of stream s; stream 0 is the full network, then come the subnets loop by loop, group 1 to G
in each loop. n(z) = z, or with `normalize_logits` n(z) = (z - mean_c z) / sqrt(var_c z + eps), biased
variance over classes. The knowledge K_g of group g is a constant for the gradient; K_0 = n(z_0). For stream
s of group g, in order:

    p = softmax(K_{g-1} / T)          q = softmax(n(z_s) / T)
    kd_s = T^2 * mean over rows of sum_c p (log p - log q)
    K_g <- n(z_s) on the group's first visit, ema * K_g + (1 - ema) * n(z_s) afterwards

    loss = ce_weight * CE(z_0) + kd_weight * sum_s kd_s + subnet_ce_weight * sum_s CE(z_s)

Shapes: S streams, S = 1 + loops * groups; B batch; C classes; a row is one sample, or one position of a dense
prediction, so that B * prod(spatial) rows of C classes belong to each stream.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import registry
from ..native import native_cuda_module
from . import native as group_knowledge_loss_native
from . import triton as group_knowledge_loss_triton
from .checks import FLOAT_DTYPES, check_class_indices, check_hyperparameters, check_streams, check_tensors

__all__ = ["GroupKnowledge", "group_knowledge_loss", "group_knowledge_loss_reference"]


class GroupKnowledge:
    """The loss one stream at a time, in plain torch: the terms, and the knowledge that they leave behind.

    Made anew for each training step. Logits here are one stream's: (B, C, *spatial). Low precision is
    computed in float32. The arguments are those of `group_knowledge_loss`; the weights are left to the
    caller:

        knowledge = GroupKnowledge(ema=0.5)
        loss = ce_weight * knowledge.full(logits, targets)
        loss += kd_weight * knowledge.subnet(logits, targets, group=1)      # and so on, in stream order

    Raises:
        TypeError: a hyper-parameter has the wrong type.
        ValueError: a hyper-parameter is out of range.
    """

    def __init__(
        self,
        *,
        ema: float = 0.5,
        temperature: float = 1.0,
        normalize_logits: bool = False,
        eps: float = 1e-7,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        distill_ignored: bool = True,
    ) -> None:
        check_hyperparameters(
            ema=ema,
            temperature=temperature,
            normalize_logits=normalize_logits,
            eps=eps,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            distill_ignored=distill_ignored,
        )
        self.ema = ema
        self.temperature = temperature
        self.normalize_logits = normalize_logits
        self.eps = eps
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.distill_ignored = distill_ignored
        self._knowledge: dict[int, Tensor] = {}

    def full(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Stores the full network's knowledge and returns its cross entropy, a scalar, not weighted."""
        ce = self.cross_entropy(logits, targets)
        self._knowledge[0] = self._normalized(logits.detach())
        return ce

    def subnet(self, logits: Tensor, targets: Tensor, group: int) -> Tensor:
        """Returns kd of a subnet of `group` against group - 1, a scalar, not weighted; updates K_group.

        Raises:
            ValueError: `group` isn't positive, or nothing was stored yet for the group before it.
        """
        if group < 1 or group - 1 not in self._knowledge:
            raise ValueError(
                f"group is {group}; it must be at least 1, and a stream of group {group - 1} must come first"
            )
        check_tensors(logits, targets, self.ignore_index, class_dim=1)
        normalized = self._normalized(logits)
        log_p = F.log_softmax(self._knowledge[group - 1] / self.temperature, dim=1)
        log_q = F.log_softmax(normalized / self.temperature, dim=1)
        divergence = _divergence(log_p, log_q)
        if self.distill_ignored or targets.is_floating_point():
            kd = divergence.mean()
        else:
            counts = targets != self.ignore_index
            kd = torch.where(counts, divergence, 0.0).sum() / counts.sum()
        self._update(group, normalized.detach())
        return kd * self.temperature**2

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy of raw logits with this loss's options, a scalar."""
        check_tensors(logits, targets, self.ignore_index, class_dim=1)
        if targets.is_floating_point():
            targets = targets.to(_compute_dtype(logits))
        else:
            check_class_indices(targets, logits.shape[1], self.ignore_index)
        return F.cross_entropy(
            logits.to(_compute_dtype(logits)),
            targets,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def _normalized(self, logits: Tensor) -> Tensor:
        logits = logits.to(_compute_dtype(logits))
        if not self.normalize_logits:
            return logits
        centered = logits - logits[:, :1].detach()  # exact for equal logits, whatever their size
        centered = centered - centered.mean(dim=1, keepdim=True)
        return centered * (centered.square().mean(dim=1, keepdim=True) + self.eps).rsqrt()

    def _update(self, group: int, normalized: Tensor) -> None:
        old = self._knowledge.get(group)
        if old is None or self.ema == 0:
            self._knowledge[group] = normalized
        elif self.ema < 1:
            self._knowledge[group] = self.ema * old + (1 - self.ema) * normalized


def group_knowledge_loss_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    groups: int = 3,
    loops: int = 1,
    ema: float = 0.5,
    temperature: float = 1.0,
    normalize_logits: bool = False,
    eps: float = 1e-7,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    subnet_ce_weight: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    distill_ignored: bool = True,
) -> tuple[Tensor, Tensor]:
    """`group_knowledge_loss` in plain torch: same arguments and results, differentiated by autograd."""
    check_hyperparameters(
        groups=groups,
        loops=loops,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        subnet_ce_weight=subnet_ce_weight,
    )
    check_streams(logits, groups, loops)
    knowledge = GroupKnowledge(
        ema=ema,
        temperature=temperature,
        normalize_logits=normalize_logits,
        eps=eps,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        distill_ignored=distill_ignored,
    )
    terms = [knowledge.full(logits[0], targets)]
    weighted = [ce_weight * terms[0]] if ce_weight else []
    for stream in range(1, logits.shape[0]):
        terms.append(knowledge.subnet(logits[stream], targets, group=(stream - 1) % groups + 1))
        if kd_weight:
            weighted.append(kd_weight * terms[-1])
        if subnet_ce_weight:
            weighted.append(subnet_ce_weight * knowledge.cross_entropy(logits[stream], targets))
    loss = torch.stack(weighted).sum() if weighted else 0.0 * terms[0].nan_to_num(0.0, 0.0, 0.0)
    return loss, torch.stack(terms).detach()


def group_knowledge_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    groups: int = 3,
    loops: int = 1,
    ema: float = 0.5,
    temperature: float = 1.0,
    normalize_logits: bool = False,
    eps: float = 1e-7,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    subnet_ce_weight: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    distill_ignored: bool = True,
) -> tuple[Tensor, Tensor]:
    """Loss of Group Knowledge based Training over the logits of all streams (formula: module docstring).

    Args:
        logits: (S, B, C, *spatial), S = 1 + loops * groups, in the order full network, then per loop the
            subnets of group 1 to `groups`. float32, float64, bfloat16 or float16, any strides. Low
            precision is computed in float32.
        targets: class indices (B, *spatial), int64, or class probabilities (B, C, *spatial), floating point
            and without gradient. Class indices must lie in [0, C) or equal `ignore_index`. Probabilities
            are taken as they are, as torch's cross_entropy does.
        groups: levels of nesting below the full network; 0: the loss is the full network's cross entropy.
        loops: chains of subnets, each from group 1 to `groups`.
        ema: weight of a group's old knowledge against a new subnet's logits, in [0, 1].
        temperature: T > 0.
        normalize_logits: distil between logits normalised over classes.
        eps: added to the variance when logits are normalised, > 0.
        ce_weight: weight of the full network's cross entropy. A term of weight 0 is left out of the loss.
        kd_weight: weight of the subnets' distillation terms.
        subnet_ce_weight: weight of the subnets' cross entropies.
        ignore_index: rows of this target count neither in a cross entropy nor in its mean.
        label_smoothing: as in torch's cross_entropy, in [0, 1].
        distill_ignored: whether rows of target `ignore_index` are distilled all the same.

    Returns:
        The loss, a scalar (float64 for float64 logits, float32 otherwise), and the terms (S,) of the same
        dtype, not weighted and detached: the full network's cross entropy, then every subnet's distillation
        term.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, hyper-parameter or class index is wrong. On a GPU a class index out of
            range is a device-side assertion instead, since reading it here would stall the device.
    """
    options = {
        "ema": ema,
        "temperature": temperature,
        "normalize_logits": normalize_logits,
        "eps": eps,
        "ce_weight": ce_weight,
        "kd_weight": kd_weight,
        "subnet_ce_weight": subnet_ce_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "distill_ignored": distill_ignored,
    }
    check_hyperparameters(groups=groups, loops=loops, **options)
    check_streams(logits, groups, loops)
    check_tensors(logits, targets, ignore_index, class_dim=2)
    if _runs_in_plain_torch(logits.device.type, logits.dtype):
        return group_knowledge_loss_reference(logits, targets, groups=groups, loops=loops, **options)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not with_gradient:
        op = torch.ops.gkt_fast.group_knowledge_loss.default
    elif torch._C._are_functorch_transforms_active():
        op = _DifferentiatedUnderTransforms.apply
    else:
        op = _Differentiated.apply
    scale = _gradient_scale(logits, ce_weight, kd_weight * temperature, subnet_ce_weight)
    loss, terms, _ = op(logits, targets, groups, *options.values(), with_gradient, scale)
    return loss, terms


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_c p (log p - log q) over dimension 1, taken as sum_c (q - p - p (log q - log p)), since sum_c (q - p) = 0.

    All summands are positive and errors of log p and log q cancel to first order: small divergences stay
    accurate.
    """
    p, difference = log_p.exp(), log_q - log_p
    near = difference.abs() < 1
    change = torch.where(near, p * torch.expm1(torch.where(near, difference, 0.0)), log_q.exp() - p)
    return (change - torch.where(p == 0, 0.0, p * difference)).sum(dim=1)  # 0 log 0 = 0


def _gradient_scale(logits: Tensor, *weights: float) -> float:
    """The power of two by which the op multiplies the gradient it stores.

    float16 would lose the small gradients of a mean over many rows before a loss scale can reach them.
    """
    rows, largest = logits.numel() // (logits.shape[0] * logits.shape[2]), max(weights)
    if logits.dtype != torch.float16 or rows == 0 or largest == 0:
        return 1.0
    return 2.0 ** math.floor(math.log2(64 * rows / largest))


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.compiler.assume_constant_result
def _runs_in_plain_torch(device: str, dtype: torch.dtype) -> bool:
    """Whether autograd differentiates the reference; torch.compile asks once, when it traces."""
    return registry.select("group_knowledge_loss", device, dtype) is _plain_torch


# Inside an op, and more so inside a compiled graph, the dispatcher leaves autograd out.
_OUTSIDE_OPS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def _plain_torch(
    logits: Tensor, targets: Tensor, groups: int, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference as the op, for a call whose backend turned out not to work."""
    *options, with_gradient, gradient_scale = options
    names = group_knowledge_loss_triton.OPTIONS[1:]
    arguments = {"groups": groups, "loops": (logits.shape[0] - 1) // groups if groups else 1}
    arguments |= dict(zip(names, options, strict=True))
    if not with_gradient:
        return *group_knowledge_loss_reference(logits, targets, **arguments), logits.new_empty(0)

    def scaled(logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss, terms = group_knowledge_loss_reference(logits, targets, **arguments)
        return loss * gradient_scale, (loss, terms)

    with torch._C._ForceDispatchKeyGuard(*_OUTSIDE_OPS):
        gradient, (loss, terms) = torch.func.grad(scaled, has_aux=True)(logits)
    return loss, terms, torch.empty_like(logits).copy_(gradient)


registry.register(
    registry.Implementation("group_knowledge_loss", "torch", (), FLOAT_DTYPES, lambda: _plain_torch)
)
registry.register(
    registry.Implementation(
        "group_knowledge_loss", "cpp", ("cpu",), FLOAT_DTYPES, group_knowledge_loss_native.load_cpp
    )
)
registry.register(
    registry.Implementation(
        "group_knowledge_loss",
        "cuda",
        ("cuda",),
        FLOAT_DTYPES,
        lambda: group_knowledge_loss_native.load_cuda(native_cuda_module()),
    )
)
registry.register(
    registry.Implementation(
        "group_knowledge_loss",
        "triton",
        group_knowledge_loss_triton.DEVICES,
        group_knowledge_loss_triton.DTYPES,
        group_knowledge_loss_triton.load_triton,
    )
)

torch.library.define(
    "gkt_fast::group_knowledge_loss",
    "(Tensor logits, Tensor targets, int groups, float ema, float temperature, bool normalize_logits, "
    "float eps, float ce_weight, float kd_weight, float subnet_ce_weight, int ignore_index, "
    "float label_smoothing, bool distill_ignored, bool with_gradient, float gradient_scale) "
    "-> (Tensor loss, Tensor terms, Tensor gradient)",
)


@torch.library.impl("gkt_fast::group_knowledge_loss", ("cpu", "cuda"))
def _forward(logits: Tensor, targets: Tensor, groups: int, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    return registry.run(
        "group_knowledge_loss",
        logits.device.type,
        logits.dtype,
        lambda backend: backend(logits, targets, groups, *options),
    )


@torch.library.register_fake("gkt_fast::group_knowledge_loss")
def _fake_forward(
    logits: Tensor, targets: Tensor, groups: int, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    with_gradient = options[-2]
    dtype = _compute_dtype(logits)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(logits.shape[0], dtype=dtype),
        torch.empty_like(logits) if with_gradient else logits.new_empty(0),
    )


_TWICE = "group_knowledge_loss can't be differentiated twice; group_knowledge_loss_reference can"


def _keep_gradient(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, terms, gradient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(terms)
    ctx.save_for_backward(gradient)
    ctx.unscale = 1 / inputs[-1]


def _keep_constant_gradient(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _keep_gradient(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _scale_gradient(ctx, grad_loss: Tensor | None, *_: None) -> tuple:
    (gradient,) = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 15
    factor = grad_loss * ctx.unscale
    if gradient.dtype != factor.dtype:  # as a scalar it would be rounded to the gradient's dtype first
        factor = factor.reshape(1)
    return ((gradient * factor).to(gradient.dtype), *[None] * 14)


torch.library.register_autograd(
    "gkt_fast::group_knowledge_loss", _scale_gradient, setup_context=_keep_constant_gradient
)


class _Differentiated(torch.autograd.Function):
    """The op with autograd for eager mode.

    The gradient, the op's third output, stays differentiable: differentiating twice then arrives in
    `backward` as a gradient of that output and is refused, instead of being taken for zero.
    """

    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, Tensor, Tensor]:
        output = torch.ops.gkt_fast.group_knowledge_loss.default(*inputs)
        _keep_gradient(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _: None, grad_gradient: Tensor | None) -> tuple:
        if grad_gradient is not None:
            raise RuntimeError(_TWICE)
        if grad_loss is None or torch._C._autograd._get_current_graph_task_keep_graph():
            return _scale_gradient(ctx, grad_loss)
        # Nobody can ask for the gradient again: its memory is handed on, scaled in place. On the CPU reading the
        # factor costs nothing, and the usual 1 saves a pass over the gradient.
        (gradient,) = ctx.saved_tensors
        if type(grad_loss) is Tensor and grad_loss.device.type == "cpu":
            factor = grad_loss.item() * ctx.unscale
            if factor != 1:
                gradient.mul_(factor)
        else:
            gradient.mul_((grad_loss * ctx.unscale).reshape(1))
        return (gradient, *[None] * 14)


class _DifferentiatedUnderTransforms(torch.autograd.Function):
    """The same in the form that torch.func's transforms ask for, which costs more per call."""

    forward = staticmethod(torch.ops.gkt_fast.group_knowledge_loss.default)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _keep_gradient(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _: None, grad_gradient: Tensor | None) -> tuple:
        if grad_gradient is not None:
            raise RuntimeError(_TWICE)
        return _scale_gradient(ctx, grad_loss)
