"""What speaks against running the states of a network as one batch, before it runs and while its backward does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..batch_norm.kinds import is_batch_norm
from ..batch_norm.statistics import compiled_batch_norm
from ..network.calls import SharedStateError
from ..network.discovery import observes_ranges
from ..network.network import Network
from ..network.recomputation import recomputing
from ..subnets.plan import Layer
from ..subnets.streams import Streams

__all__ = [
    "RECOMPUTED",
    "StackingError",
    "allow_recomputation",
    "batch_norms",
    "forbid_recomputation",
    "reason_against",
]


class StackingError(SharedStateError):
    """Several states of the model can't run as one batch; the message says why."""


def reason_against(network: Network, streams: Streams) -> str | None:
    """Why states of this network can't be stacked; None: nothing that can be seen before it runs."""
    reason = network.once("norm against", lambda: _norm_against(network.model))
    if reason is not None:
        return reason
    layers = network.layers(streams.config.independent_noise)
    older = next((layer for layer in layers if layer.reads_back is not None), None)
    if older is not None:
        return (
            f"{older.path!r} or the code beside it reads {older.reads_back} again, after layers in between; "
            "execution='stacked' has other states stacked by then"
        )
    stem = itertools.takewhile(lambda layer: not layer.is_block, layers)
    noisy = next((layer for layer in stem if layer.draws_noise), None)
    if noisy is not None:
        return (
            f"layer {noisy.path!r} draws random numbers before the first block; execution='stacked' can't draw them "
            "for each stream (independent_noise=True)"
        )
    if streams.config.subnet_share != 1:
        return _norm_before_noise(network.model, layers)
    return None


def _norm_before_noise(model: nn.Module, layers: Sequence[Layer]) -> str | None:
    """Streams are taken apart behind a block, before all layers up to the next one; of those that draw no noise, which
    all streams in a state have in common, a BatchNorm must then see the same batch as before."""
    past_blocks, norm = False, None
    for layer in layers:
        if layer.is_block:
            past_blocks, norm = True, None
        elif layer.draws_noise and norm is not None:
            return (
                f"{norm!r} normalises over the batch and {layer.path!r} draws random numbers (independent_noise=True) "
                "between the same blocks; execution='stacked' can't take the rows of subnets (subnet_share) in between"
            )
        elif past_blocks and not layer.draws_noise:
            inside = model.get_submodule(layer.path).modules()
            if any(is_batch_norm(module) and module.training for module in inside):
                norm = layer.path
    return None


def _norm_against(model: nn.Module) -> str | None:
    """Which normalisation layer or quantiser can't run per ghost batch, and why; None: there is none."""
    compiled = compiled_batch_norm(model)
    if compiled is not None:
        return f"{compiled!r} is compiled, so that the BatchNorm inside can't be run for each state by itself"
    for path, module in model.named_modules():
        if observes_ranges(module):
            return f"{path!r} ({type(module).__name__}) takes its range over all stacked states"
        if not isinstance(module, _NormBase):
            continue
        name = f"{path!r} ({type(module).__name__})"
        if not is_batch_norm(module):
            if isinstance(module, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
                if module.track_running_stats:
                    return f"{name} averages its running statistics over all stacked states"
                continue
            return f"{name} looks across the batch in a way of its own"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if module._backward_hooks or any(hook is not _refuse_recomputation for hook in hooks):
            return f"{name} has hooks, which would see several states as one batch"
    return None


def batch_norms(network: Network) -> list[nn.Module]:
    """The batch norms of the network's model."""
    return network.once("batch norms", lambda: [m for m in network.model.modules() if is_batch_norm(m)])


def forbid_recomputation(network: Network, loss: Tensor) -> None:
    """While backward runs, a BatchNorm that is called would take all stacked states for one batch: it refuses."""
    layers = [layer for layer in batch_norms(network) if layer.training]

    def forbid(gradient: Tensor) -> None:
        for layer in layers:  # `register_forward_pre_hook` would take longer than all the rest of this
            layer._forward_pre_hooks[_REFUSAL] = _refuse_recomputation
        torch.autograd.Variable._execution_engine.queue_callback(lambda: allow_recomputation(layers))

    if layers and loss.requires_grad:
        loss.register_hook(forbid)


_REFUSAL = -1
"""The key of a hook; torch's own are not negative."""

RECOMPUTED = (
    "a BatchNorm would be recomputed during backward (activation checkpointing), where execution='stacked' can't tell "
    "the states apart. Use execution='shared' or 'lean'"
)


def _refuse_recomputation(layer: nn.Module, args: tuple) -> None:
    if recomputing():
        raise StackingError(RECOMPUTED)


def allow_recomputation(layers: list[nn.Module]) -> None:
    for layer in layers:
        layer._forward_pre_hooks.pop(_REFUSAL, None)
