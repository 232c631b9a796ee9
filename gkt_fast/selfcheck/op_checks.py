"""The ops on one backend against the formulas in float64: results, gradients, odd shapes, strides, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import BackendError, ghost_batch_norm, group_knowledge_loss, residual_block, use_backend
from ..ops.registry import Implementation
from ..ops.residual_block import Convolution, Norm
from . import formulas
from .report import LIMITS, Check, compare, failed

__all__ = ["check_op"]

GRAD_OUTPUT = 1.7
"""The gradient of a loss; with 1 a kernel could ignore it."""


@dataclass(frozen=True)
class Case:
    """Inputs of an op.

    Args:
        name: what is special about them.
        shape: of the logits, or of x.
        options: arguments of the op; for ghost_batch_norm also "residual", "keep" and "running", whether there are any;
            for residual_block "kernels" (sizes of its convolutions), "projection" and "keep", whether there are any.
        layout: "contiguous", "channels_last", "sliced" (every second element of the last dimension, part of the
            channels or classes) or "transposed" (first and last dimension swapped in memory).
    """

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"


LOSS_CASES = (
    Case("one row", (4, 1, 2)),
    Case("defaults", (4, 5, 7)),
    Case("two loops, normalised logits", (7, 6, 129), {"loops": 2, "normalize_logits": True, "ema": 0.3}),
    Case("long rows", (3, 2, 4099), {"groups": 2, "temperature": 3.0, "label_smoothing": 0.1}),
    Case(
        "dense, ignored targets",
        (4, 2, 21, 5, 3),
        {"ignore_index": 2, "distill_ignored": False, "subnet_ce_weight": 0.5},
    ),
    Case("probabilities", (4, 5, 11), {"probabilities": True, "kd_weight": 0.25}),
    Case("sliced", (4, 5, 33), {"normalize_logits": True}, "sliced"),
    Case("transposed", (4, 3, 19, 4), {}, "transposed"),
)
NORM_CASES = (
    Case("planes, residual", (6, 5, 7, 3), {"ghosts": 2, "residual": True}),
    Case(
        "channels_last, dropped ghost batch",
        (6, 19, 5, 5),
        {"ghosts": 3, "residual": True, "keep": True},
        "channels_last",
    ),
    Case("no spatial dimension, no activation", (8, 3), {"ghosts": 2, "activation": "identity"}),
    Case("three spatial dimensions", (4, 3, 3, 2, 5), {"ghosts": 4}),
    Case("eval mode", (4, 6, 3, 3), {"ghosts": 2, "residual": True, "running": True}, "channels_last"),
    Case("sliced", (4, 17, 4, 6), {"ghosts": 2, "residual": True}, "sliced"),
    Case("transposed", (4, 9, 5, 3), {"ghosts": 1, "activation": "identity"}, "transposed"),
    Case("first ghost batch larger", (7, 9, 5, 3), {"ghosts": 3, "lead_rows": 3, "residual": True}),
    Case("first ghost batch smaller", (6, 9, 4, 4), {"ghosts": 2, "lead_rows": 2}, "channels_last"),
    Case("large mean", (4, 4, 9, 9), {"ghosts": 2, "mean": 30.0}),
)
BLOCK_CASES = (
    Case("basic", (6, 5, 7, 3), {"ghosts": 3, "kernels": (3, 3)}),
    Case(
        "dropped ghost batch", (6, 5, 5, 5), {"ghosts": 3, "kernels": (3, 3), "keep": True}, "channels_last"
    ),
    Case(
        "projection, first ghost batch larger",
        (7, 9, 5, 3),
        {"ghosts": 3, "lead_rows": 3, "kernels": (3, 3, 3), "projection": True},
        "channels_last",
    ),
    Case(
        "preactivation, dropped ghost batch",
        (6, 5, 4, 6),
        {"ghosts": 3, "kernels": (3, 3), "preactivation": True, "keep": True},
        "sliced",
    ),
)


def check_op(implementation: Implementation, device: torch.device) -> Iterator[Check]:
    """Every case in every dtype of the backend, also of the op that consists of this one.

    Raises:
        BackendError: the backend turns out not to work here.
    """
    checked = {
        "group_knowledge_loss": {"group_knowledge_loss": (_run_loss, LOSS_CASES)},
        "ghost_batch_norm": {
            "ghost_batch_norm": (_run_norm, NORM_CASES),
            "residual_block": (_run_block, BLOCK_CASES),
        },
    }[implementation.op]
    for dtype in implementation.dtypes:
        for subject, (op, cases) in checked.items():
            for seed, case in enumerate(cases):
                yield _check(subject, implementation.backend, op, case, dtype, device, seed)


def _check(
    subject: str,
    backend: str,
    op: Callable[..., tuple[dict, ...]],
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Check:
    place = (subject, backend, str(dtype).removeprefix("torch."), case.name)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    try:
        # TF32 would round the convolutions' inputs to 10 bits.
        with use_backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return Check(*place, *compare(*op(case, dtype, normal)))
    except BackendError:
        raise
    except Exception as error:  # a report is wanted whatever goes wrong
        return failed(*place, error)


def _run_loss(case: Case, dtype: torch.dtype, normal: Callable[..., Tensor]) -> tuple[dict, dict]:
    options = dict(case.options)
    probabilities = options.pop("probabilities", False)
    groups, loops = options.pop("groups", 3), options.pop("loops", 1)
    logits = _laid_out((3 * normal(*case.shape)).to(dtype), case.layout)
    rows = (case.shape[1], *case.shape[3:])
    if probabilities:
        targets = normal(case.shape[1], case.shape[2], *case.shape[3:]).softmax(1).to(dtype)
    else:
        targets = (normal(*rows).abs() * 1e3).long() % case.shape[2]
    leaf = logits.detach().requires_grad_()
    loss, terms = group_knowledge_loss(leaf, targets, groups=groups, loops=loops, **options)
    (gradient,) = torch.autograd.grad(loss * GRAD_OUTPUT, leaf)
    exact = logits.double().requires_grad_()
    exact_targets = targets.double() if probabilities else targets
    exact_loss, exact_terms = formulas.group_knowledge_loss(exact, exact_targets, groups, **options)
    (exact_gradient,) = torch.autograd.grad(exact_loss * GRAD_OUTPUT, exact)
    return (
        {"loss": loss.detach(), "terms": terms, "gradient": gradient},
        {"loss": exact_loss.detach(), "terms": exact_terms, "gradient": exact_gradient},
    )


def _run_norm(case: Case, dtype: torch.dtype, normal: Callable[..., Tensor]) -> tuple[dict, dict]:
    options = dict(case.options)
    ghosts, relu = options.pop("ghosts"), options.get("activation") != "identity"
    channels = case.shape[1]
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "x": _laid_out((2 * normal(*case.shape) + options.pop("mean", 0.5)).to(dtype), case.layout),
        "weight": normal(channels).to(vector_dtype),
        "bias": normal(channels).to(vector_dtype),
    }
    if options.pop("residual", False):
        inputs["residual"] = _laid_out(normal(*case.shape).to(dtype), case.layout)
    keep = torch.arange(ghosts, device=inputs["x"].device) != 1 if options.pop("keep", False) else None
    running = None
    if options.pop("running", False):
        running = (normal(channels).to(vector_dtype), normal(channels).square().to(vector_dtype) + 0.5)
    exact = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    exact_running = None if running is None else tuple(r.double() for r in running)
    y, mean, variance, z = formulas.ghost_batch_norm(
        exact["x"],
        exact["weight"],
        exact["bias"],
        ghosts,
        exact.get("residual"),
        keep,
        relu,
        running=exact_running,
        lead_rows=options.get("lead_rows"),
    )
    grad_y = normal(*case.shape).to(dtype)
    if relu:  # beside the corner of the ReLU rounding decides, so nothing is asked there
        grad_y = grad_y.masked_fill(z.detach().abs() < 1e-3, 0)
    expected = {"y": y.detach(), "mean": mean.detach(), "variance": variance.detach()}
    expected |= _gradients(y, exact, grad_y.double())
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    if running is not None:
        options |= {"running_mean": running[0], "running_var": running[1]}
    y, mean, variance = ghost_batch_norm(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        ghosts=ghosts,
        residual=leaves.get("residual"),
        keep=keep,
        **options,
    )
    actual = {"y": y.detach(), "mean": mean, "variance": variance} | _gradients(y, leaves, grad_y)
    return actual, expected


def _run_block(case: Case, dtype: torch.dtype, normal: Callable[..., Tensor]) -> tuple[dict, dict, dict]:
    options = dict(case.options)
    ghosts, kernels, channels = options.pop("ghosts"), options.pop("kernels"), case.shape[1]
    projection, keep = options.pop("projection", False), options.pop("keep", False)
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"x": _laid_out(normal(*case.shape).to(dtype), case.layout)}
    for i, kernel in enumerate([*kernels, 1] if projection else kernels):
        scale = (channels * kernel**2) ** -0.5
        inputs[f"convolution {i}"] = (scale * normal(channels, channels, kernel, kernel)).to(dtype)
        # Shifts are large, so that no inner ReLU is near its corner, where rounding decides.
        inputs[f"gain {i}"] = (0.1 + 0.02 * normal(channels)).to(vector_dtype)
        inputs[f"shift {i}"] = (0.1 * normal(channels) + normal(channels).sign()).to(vector_dtype)
    keep = torch.arange(ghosts, device=inputs["x"].device) != 1 if keep else None
    preactivation, lead_rows = options.get("preactivation", False), options.get("lead_rows")

    def layers(tensors: dict[str, Tensor]) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        places = range(len(kernels) + projection)
        return [(tensors[f"convolution {i}"], (tensors[f"gain {i}"], tensors[f"shift {i}"])) for i in places]

    exact = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    *main, last = layers(exact) if projection else [*layers(exact), None]
    weights, norms = zip(*main, strict=True)
    y, statistics, z = formulas.residual_block(
        exact["x"], weights, norms, last, ghosts, keep, preactivation, lead_rows
    )
    grad_y = normal(*y.shape).to(dtype)
    if not preactivation:
        grad_y = grad_y.masked_fill(z.detach().abs() < (1e-3 if dtype == vector_dtype else 0.1), 0)
    expected = {"y": y.detach(), **_named(statistics), **_gradients(y, exact, grad_y.double())}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    ours = [
        (Convolution(weight, padding=(weight.shape[-1] // 2,) * 2), Norm(*norm))
        for weight, norm in layers(leaves)
    ]
    *main, last = ours if projection else [*ours, None]
    y, statistics = residual_block(
        leaves["x"], *zip(*main, strict=True), ghosts=ghosts, shortcut=last, keep=keep, **options
    )
    actual = {"y": y.detach(), **_named(statistics), **_gradients(y, leaves, grad_y)}
    # Every layer rounds what the next one reads, whose norm takes away most of a shift, though not of its error.
    limits = {name: 4 * len(ours) * LIMITS[dtype] for name in actual}
    return actual, expected, limits


def _named(statistics: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Means and variances of a block's norms."""
    names = ("mean", "variance")
    return {
        f"{name} {i}": value.detach()
        for i, found in enumerate(statistics)
        for name, value in zip(names, found, strict=True)
    }


def _gradients(y: Tensor, leaves: dict[str, Tensor], grad_y: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place of memory."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        padded = torch.full(
            (*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype, device=tensor.device
        )
        padded[..., ::2] = tensor
        return padded[..., ::2]
    return tensor
