"""Subnets as networks of their own: run one in place, cut it out, and estimate its BatchNorm statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..batch_norm.fusion import unfuse_blocks
from ..network.calls import run_watched, skip_block
from ..network.discovery import find_stages, stages_from_paths
from ..network.interception import Site, find_sites, intercept
from ..subnets.subnet import Stage, Subnet

__all__ = ["Stages", "active_subnet", "as_stages", "as_subnet", "extract_subnet", "recalibrate_batch_norm"]

Stages = Sequence["Stage | str | Sequence[str]"]
"""Stages as found, or named by module paths (`stages_from_paths`)."""


def as_stages(model: nn.Module, stages: Stages | None) -> list[Stage]:
    """The stages as they are, by their module paths, or found by themselves.

    Raises:
        ValueError, TypeError: none are found, or a path doesn't fit.
    """
    if stages is None:
        return find_stages(model)
    if not isinstance(stages, str) and stages and all(isinstance(stage, Stage) for stage in stages):
        return list(stages)
    return stages_from_paths(model, stages)


def as_subnet(depths: Subnet | Sequence[int], stages: Sequence[Stage]) -> Subnet:
    """The ordered subnet of these depths; a `Subnet` as it is.

    Raises:
        ValueError, TypeError: the depths don't fit the stages.
    """
    return depths if isinstance(depths, Subnet) else Subnet.ordered(depths, stages)


@contextmanager
def active_subnet(
    model: nn.Module, depths: Subnet | Sequence[int], stages: Stages | None = None
) -> Iterator[None]:
    """Inside the block the model runs as the subnet: dropped blocks hand their input through.

    Args:
        model: the network.
        depths: blocks to keep in each stage, or a `Subnet`.
        stages: the model's stages, or their module paths; None: found by themselves.

    Raises:
        ValueError: the depths don't fit the model.
    """
    stages = as_stages(model, stages)
    dropped = as_subnet(depths, stages).dropped(stages)
    sites = [site for site in find_sites(model, stages) if site.path in dropped]
    returns: dict[str, int] = {}

    def skip(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if site.path not in returns:
            returns[site.path] = _values_returned(site.path, module, args, kwargs)
        return skip_block(site.path, returns[site.path], args, kwargs)

    with intercept(model, sites, skip):
        yield


@torch.no_grad()
def _values_returned(path: str, block: nn.Module, args: tuple, kwargs: dict) -> int:
    """How many values a block returns in a tuple, 0 for a bare one; runs it in evaluation mode, without effect."""
    training = {module: module.training for module in block.modules()}
    try:
        block.eval()
        output = run_watched({}, path, block, args, kwargs)
    finally:
        for module, mode in training.items():
            module.training = mode
    return len(output) if isinstance(output, tuple) else 0


def extract_subnet(
    model: nn.Module, depths: Subnet | Sequence[int], stages: Stages | None = None
) -> nn.Module:
    """A copy of the model, of the same class, without the dropped blocks.

    Blocks in an `nn.Sequential` or `nn.ModuleList` are removed and the following ones renumbered; elsewhere an
    `nn.Identity` takes a dropped block's place. BatchNorm statistics are copied as they are: those of a subnet differ,
    see `recalibrate_batch_norm`. Fused blocks get their own class back: the copy needs nothing of this package, and
    an ordered subnet's state_dict fits a model of the same class built at these depths. The configuration of a
    Hugging Face model is shortened too, for `save_pretrained`.

    Args:
        model: the network.
        depths: blocks to keep in each stage, or a `Subnet`.
        stages: the model's stages, or their module paths; None: found by themselves.

    Raises:
        ValueError: the depths don't fit the model.
    """
    stages = as_stages(model, stages)
    subnet = as_subnet(depths, stages)
    dropped = subnet.dropped(stages)
    extracted = copy.deepcopy(model)
    unfuse_blocks(extracted)
    _shorten_configuration(extracted, stages, subnet)
    for path in sorted(dropped, key=_natural, reverse=True):
        parent_path, _, name = path.rpartition(".")
        parent = extracted.get_submodule(parent_path)
        if isinstance(parent, (nn.Sequential, nn.ModuleList)) and name.isdigit():
            del parent[int(name)]
        elif isinstance(parent, nn.Sequential):
            del parent._modules[name]
        else:
            setattr(parent, name, nn.Identity())
    return extracted


def _shorten_configuration(model: nn.Module, stages: Sequence[Stage], subnet: Subnet) -> None:
    """Where a Hugging Face model's configuration counts the blocks, counts those of the subnet."""
    config = getattr(model, "config", None)
    depths = [stage.depth for stage in stages]
    if list(getattr(config, "depths", None) or ()) == depths:
        config.depths = list(subnet.depths)
    elif getattr(config, "num_hidden_layers", None) == sum(depths):
        config.num_hidden_layers = sum(subnet.depths)


def _natural(path: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


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
        loader: batches, or (batch, ...) tuples of which the first entry is used. Give it what training saw, augmented
            and shuffled: the first batches of a loader that goes class by class are of a few classes.
        num_samples: how many samples to use; fewer when the loader ends before.
        depths: estimate for this subnet; None: the model as it is.
        stages: the model's stages, or their module paths; None: found by themselves.

    Returns:
        The number of samples used.

    Raises:
        ValueError: the loader gave no sample, or num_samples is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    training = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen = 0
    model.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        with nullcontext() if depths is None else active_subnet(model, depths, stages):
            for batch in loader:
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                images = images[: num_samples - seen]
                model(images.to(device))
                seen += len(images)
                if seen >= num_samples:
                    break
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in training.items():
            module.training = mode
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
