"""Both ops on one backend against the formulas in float64: results, gradients, odd shapes, strides, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import BackendError, ghost_batch_norm, group_knowledge_loss, use_backend
from ..ops.registry import Implementation
from . import formulas
from .report import Check, compare, failed

__all__ = ["check_op"]

GRAD_OUTPUT = 1.7
"""The gradient of a loss; with 1 a kernel could ignore it."""


@dataclass(frozen=True)
class Case:
    """Inputs of an op.

    Args:
        name: what is special about them.
        shape: of the logits, or of x.
        options: arguments of the op; for ghost_batch_norm also "residual", "keep" and "running", whether there are any.
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


def check_op(implementation: Implementation, device: torch.device) -> Iterator[Check]:
    """Every case in every dtype of the backend.

    Raises:
        BackendError: the backend turns out not to work here.
    """
    op, cases = {
        "group_knowledge_loss": (_run_loss, LOSS_CASES),
        "ghost_batch_norm": (_run_norm, NORM_CASES),
    }[implementation.op]
    for dtype in implementation.dtypes:
        for seed, case in enumerate(cases):
            yield _check(implementation, op, case, dtype, device, seed)


def _check(
    implementation: Implementation,
    op: Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]],
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Check:
    place = (implementation.op, implementation.backend, str(dtype).removeprefix("torch."), case.name)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    try:
        with use_backend(implementation.backend):
            actual, expected = op(case, dtype, normal)
            return Check(*place, *compare(actual, expected))
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
