"""Copies of models."""

from __future__ import annotations

import copy

from torch import Tensor, nn

__all__ = ["copy_of"]


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model whose modules keep computed tensors.

    torch's hooks of `weight_norm`, `spectral_norm` and `prune` leave the weight of the last forward in an attribute,
    with its graph, which `copy.deepcopy` refuses. The copy has its values; its hooks compute it anew before every
    forward.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    return copy.deepcopy(model, computed)
