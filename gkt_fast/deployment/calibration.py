"""Estimates BatchNorm's running statistics of a network, or of one of its subnets, anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ..network.batch import inputs_of
from ..network.discovery import Stages
from ..network.inputs import call_model, first_rows, map_tensors, model_inputs, rows_in
from ..network.look import look
from ..subnets.subnet import Subnet
from .extraction import active_subnet
from .running_buffers import running_buffers

__all__ = ["calibrate_together", "recalibrate_batch_norm"]


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
        model: the network, changed in place; nothing but these statistics changes.
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
    with nullcontext() if depths is None else active_subnet(model, depths, stages):
        return calibrate_together([model], loader, num_samples)


@torch.no_grad()
def calibrate_together(networks: Sequence[nn.Module], loader: Iterable[Any], num_samples: int = 2000) -> int:
    """`recalibrate_batch_norm` of several networks on the same batches.

    A layer that several networks have in common sees the same activations in all of them, so it counts those of the
    first one alone.

    Args:
        networks: changed in place; nothing but these statistics changes.
        loader: as of `recalibrate_batch_norm`.
        num_samples: as of `recalibrate_batch_norm`.

    Returns:
        The number of samples used.

    Raises:
        ValueError: the loader gave no sample, or num_samples is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    norms = [[module for module in network.modules() if running_buffers(module)] for network in networks]
    tracked = {layer: layer.track_running_stats for layer in itertools.chain(*norms)}
    device = next((p.device for network in networks for p in network.parameters()), torch.device("cpu"))
    seen = batches = 0
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(look(network, hooks=False))
        for layer in tracked:
            layer.reset_running_stats()
            layer.train()
        for batch in loader:
            inputs = first_rows(inputs_of(batch), num_samples - seen)
            inputs = map_tensors(lambda tensor: tensor.to(device), inputs)
            counted: set[nn.Module] = set()
            for network, layers in zip(networks, norms, strict=True):
                for layer in layers:
                    # None is the average over calls, which an InstanceNorm doesn't know.
                    layer.momentum = 1 / (batches + 1) if isinstance(layer, _InstanceNorm) else None
                    layer.track_running_stats = tracked[layer] and layer not in counted
                call_model(network, model_inputs(network, inputs))
                counted.update(layers)
            seen += rows_in(inputs) or 0
            batches += 1
            if seen >= num_samples:
                break
        estimated = {layer: dict(layer._buffers) for layer in tracked}
    if seen == 0:
        raise ValueError("loader gave no sample")
    for layer, buffers in estimated.items():
        for name in running_buffers(layer):
            layer._buffers[name].copy_(buffers[name])
    return seen
