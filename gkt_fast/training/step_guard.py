"""Optimizer steps that are taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["StepGuard"]


class StepGuard:
    """Takes a step back on the device, without the host knowing whether it was: `torch.where(finite, new, old)`.

    Works with any optimizer, at the price of a copy of the parameters, the buffers and the optimizer's state. What an
    optimizer keeps on another device than its parameters (Adam's step count on the host, without `fused` or
    `capturable`) or as a plain number counts on.

    Args:
        model: the network; its buffers are kept too, since BatchNorm's statistics take in a bad batch before its loss
            is known.
        optimizer: over its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._old: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def remember(self) -> None:
        """Before the forward pass of a step: keeps everything that the step may change."""
        tensors = dict(self._tensors())
        self._old = {
            key: self._old[key] if key in self._old else torch.empty_like(tensor)
            for key, tensor in tensors.items()
        }
        if tensors:
            torch._foreach_copy_(list(self._old.values()), list(tensors.values()))

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """After the step: puts back what was kept, where `finite` (a bool scalar on the device) is False.

        State that the step created (momentum, in the first step) becomes zero, as optimizers begin with.
        """
        for key, tensor in self._tensors():
            if tensor.device == finite.device:
                old = self._old[key] if key in self._old else torch.zeros_like(tensor)
                tensor.copy_(torch.where(finite, tensor, old))

    def _tensors(self) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            yield ("parameter", i), parameter
            yield from _tensors_in(("state", i), self._optimizer.state.get(parameter, {}))
        for name, buffer in self._model.named_buffers():
            yield ("buffer", name), buffer


def _tensors_in(key: tuple[Any, ...], values: dict[Any, Any]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield (*key, name), value
        elif isinstance(value, dict):
            yield from _tensors_in((*key, name), value)
