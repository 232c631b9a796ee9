"""Argument checks of `group_knowledge_loss`: errors name the argument, its value and what it must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..dtypes import FLOAT_DTYPES, accumulation_dtype

__all__ = [
    "Check",
    "boolean",
    "check_full_logits",
    "check_streams",
    "check_tensors",
    "check_values",
    "fraction",
    "integer",
    "one_of",
    "positive",
    "weight",
]

Check = Callable[[str, object], None]
"""Raises where the value of the option of that name is wrong."""


def integer(least: int | None = None) -> Check:
    def check(name: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be an int")
        if least is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")

    return check


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def one_of(*choices: str) -> Check:
    def check(name: str, value: object) -> None:
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}")

    return check


def _number(in_range: Callable[[float], bool], requirement: str) -> Check:
    def check(name: str, value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be a number")
        if not in_range(value):
            raise ValueError(f"{name} is {value}; it must be {requirement}")

    return check


fraction = _number(lambda x: 0 <= x <= 1, "in [0, 1]")
positive = _number(lambda x: 0 < x < math.inf, "positive and finite")
weight = _number(lambda x: 0 <= x < math.inf, "finite and not negative")


def check_streams(logits: Tensor, groups: int, loops: int, full_logits: Tensor | None) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}; it must be a tensor")
    if logits.dim() < 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (S, B, C, *spatial)")
    if full_logits is not None:
        if logits.shape[0] != loops * groups:
            raise ValueError(
                f"logits has {logits.shape[0]} streams (its first dimension); beside full_logits it must have those of "
                f"the subnets alone, loops * groups = {loops * groups} for loops={loops} and groups={groups}"
            )
    elif logits.shape[0] != 1 + loops * groups:
        raise ValueError(
            f"logits has {logits.shape[0]} streams (its first dimension); it must have 1 + loops * groups = "
            f"{1 + loops * groups} for loops={loops} and groups={groups}"
        )


def check_full_logits(full_logits: Tensor, logits: Tensor) -> None:
    """Checks the full network's logits (B, C, *spatial) against the subnets' (S - 1, m, C, *spatial)."""
    if not isinstance(full_logits, Tensor):
        raise TypeError(f"full_logits is a {type(full_logits).__name__}; it must be a tensor")
    for what in ("dtype", "device"):
        if getattr(full_logits, what) != getattr(logits, what):
            raise ValueError(
                f"full_logits has {what} {getattr(full_logits, what)}; it must be that of logits, "
                f"{getattr(logits, what)}"
            )
    if full_logits.shape[1:] != logits.shape[2:]:
        raise ValueError(
            f"full_logits has shape {tuple(full_logits.shape)}; it must be "
            f"(B, {', '.join(map(str, logits.shape[2:]))}) for subnets' logits of shape {tuple(logits.shape)}"
        )
    if full_logits.shape[0] < logits.shape[1]:
        raise ValueError(
            f"full_logits has a batch of {full_logits.shape[0]}; the subnets' {logits.shape[1]} must be its first ones"
        )


def check_tensors(
    logits: Tensor, targets: Tensor, ignore_index: int, class_dim: int, name: str = "logits"
) -> None:
    """Checks targets and logits, whose classes are at `class_dim`: 1 for one stream, 2 for several."""
    for argument, tensor in ((name, logits), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument} is a {type(tensor).__name__}; it must be a tensor")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} is {logits.dtype}; it must be float32, float64, bfloat16 or float16")
    if logits.dim() <= class_dim:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; it must be (B, C, *spatial)")
    shape = logits.shape[class_dim - 1 :]
    if shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; it must have at least one class")
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device}; it must be on {logits.device}, as {name} is")
    if targets.is_floating_point():
        if targets.shape != shape:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; class probabilities must have shape "
                f"{tuple(shape)} for {name} of shape {tuple(logits.shape)}"
            )
        if targets.requires_grad:
            raise ValueError("targets requires gradients; the loss has none for it, so it must be detached")
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index is {ignore_index}; with class probabilities as targets it must be negative"
            )
        return
    if targets.dtype != torch.int64:
        raise TypeError(
            f"targets is {targets.dtype}; it must be int64 (class indices) or floating point (probabilities)"
        )
    expected = shape[:1] + shape[2:]
    if targets.shape != expected:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; class indices must have shape "
            f"{tuple(expected)} for {name} of shape {tuple(logits.shape)}{_hint(targets, shape)}"
        )


def _hint(targets: Tensor, shape: torch.Size) -> str:
    """What to do about the most frequent wrong shapes of class indices; `shape` is that of one stream's logits."""
    if targets.shape == (shape[0], 1) and len(shape) == 2:
        return "; use targets.squeeze(1)"
    if len(shape) > 2 and targets.shape == shape[:-1]:
        return (
            f". If these are logits of tokens {tuple(shape)}, classes last: they must come after the batch, so let the "
            "model return logits.transpose(1, -1)"
        )
    return ""


def check_values(logits: Tensor, targets: Tensor, normalize_logits: bool, class_dim: int) -> None:
    """Checks, on the CPU, what takes reading values: probabilities, and that the variance over classes stays finite.

    Logits that are NaN or infinite pass: they are for the watch on the loss.

    Raises:
        ValueError: a probability is negative, or the variance overflows.
    """
    if torch.compiler.is_compiling() or logits.device.type != "cpu" or not logits.numel():
        return
    if isinstance(logits, FakeTensor):  # has none
        return
    if targets.is_floating_point() and (targets < 0).any():
        raise ValueError(
            f"targets has the value {targets.min().item():.4g}; floating point targets are class probabilities, which "
            "are not negative"
        )
    if normalize_logits and bool(_overflows(logits, class_dim) & (largest := logits.abs().amax()).isfinite()):
        raise ValueError(
            f"logits reach {largest.item():.3g}, and normalize_logits standardises them over all classes, whose "
            "variance then overflows. Are classes masked by such values? Leave them out of the logits, mask by at most "
            "-1e4, or set normalize_logits=False"
        )


def _overflows(logits: Tensor, class_dim: int) -> Tensor:
    """Whether the variance over classes may be infinite or NaN: a bool scalar on the logits' device."""
    largest = torch.finfo(accumulation_dtype(logits.dtype)).max
    return ~(logits.detach().abs().amax() <= math.sqrt(largest / (4 * logits.shape[class_dim])))
