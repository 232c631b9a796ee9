"""Estimates BatchNorm's running statistics of a network, or of one of its subnets, anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..network.batch import inputs_of
from ..network.discovery import Stages
from ..network.inputs import call_model, first_rows, map_tensors, model_inputs, rows_in
from ..network.look import kept_modes
from ..subnets.subnet import Subnet
from .extraction import active_subnet

__all__ = ["batch_norm_state", "recalibrate_batch_norm"]


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module,
    loader: Iterable[Any],
    num_samples: int = 2000,
    depths: Subnet | Sequence[int] | None = None,
    stages: Stages | None = None,
) -> int:
    """Resets BatchNorm's running statistics and estimates them anew, as the average over batches.

    A subnet sees other activations than the full network, whose statistics the model carries after training
    (Stimulative Training re-estimates them on about 2,000 images too). Dropout and the like stay in evaluation mode.

    Args:
        model: the network, changed in place; its training flags are left as they were.
        loader: batches of inputs, or (inputs, ...) tuples of which the first entry is used, or mappings, of which
            targets are left out (see `gkt_fast.network.batch`). Give it what training saw, augmented
            and shuffled: the first batches of a loader that goes class by class are of a few classes.
        num_samples: how many samples to use; fewer when the loader ends before.
        depths: estimate for this subnet; None: the model as it is.
        stages: the model's stages, or their module paths; None: found automatically.

    Returns:
        The number of samples used.

    Raises:
        ValueError: the loader gave no sample, or num_samples is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen = 0
    with kept_modes(model):
        model.eval()
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
                layer.train()
            with nullcontext() if depths is None else active_subnet(model, depths, stages):
                for batch in loader:
                    inputs = first_rows(model_inputs(model, inputs_of(batch)), num_samples - seen)
                    call_model(model, map_tensors(lambda tensor: tensor.to(device), inputs))
                    seen += rows_in(inputs) or 0
                    if seen >= num_samples:
                        break
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    if seen == 0:
        raise ValueError("loader gave no sample")
    return seen


def batch_norm_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all BatchNorm buffers, to be put back with `model.load_state_dict(state, strict=False)`."""
    return {
        f"{path}.{name}" if path else name: buffer.clone()
        for path, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
