"""What each layer of a model costs, counted by torch's own FLOP counter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .execution.interception import Site, intercept
from .plan import Layer

__all__ = ["count_layers"]


@torch.no_grad()
def count_layers(model: nn.Module, sites: Iterable[Site], inputs: tuple[Any, ...]) -> list[Layer]:
    """Runs the model once in evaluation mode and counts the layers at `sites`, in order of execution.

    Args:
        model: the network; left in the mode it was in, with the random state it had.
        sites: its blocks and the modules between them.
        inputs: the model's positional arguments; one sample is enough.
    """
    from torch.utils.flop_counter import FlopCounterMode  # importing it warns where there is no Triton

    layers: list[Layer] = []
    training = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False)

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        before = counter.get_total_flops()
        output = module(*args, **kwargs)
        layers.append(Layer(site.path, site.is_block, counter.get_total_flops() - before))
        return output

    model.eval()
    try:
        with torch.random.fork_rng(), intercept(model, sites, call), counter:
            model(*inputs)
    finally:
        for module, mode in training.items():
            module.training = mode
    return layers
