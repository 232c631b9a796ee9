"""Subnets as networks of their own: run one in place, or cut it out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..batch_norm.fusion import unfuse_blocks
from ..network.calls import run_on_shared_input, skip_block, values_returned
from ..network.discovery import Stages, as_stages
from ..network.interception import Site, find_sites, intercept
from ..network.look import look
from ..subnets.subnet import Stage, Subnet

__all__ = ["active_subnet", "extract_subnet"]


@contextmanager
def active_subnet(
    model: nn.Module, depths: Subnet | Sequence[int], stages: Stages | None = None
) -> Iterator[None]:
    """Inside the block the model runs as the subnet: dropped blocks hand their input through.

    Args:
        model: the network.
        depths: blocks to keep in each stage, or a `Subnet`.
        stages: the model's stages, or their module paths; None: found automatically.

    Raises:
        ValueError: the depths don't fit the model.
    """
    stages = as_stages(model, stages)
    dropped = Subnet.of(depths, stages).dropped(stages)
    sites = [site for site in find_sites(model, stages) if site.path in dropped]
    returns: dict[str, int] = {}

    def skip(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if site.path not in returns:
            returns[site.path] = _values_returned(site.path, module, args, kwargs)
        return skip_block(site.path, returns[site.path], args, kwargs)

    with intercept(model, sites, skip):
        yield


def _values_returned(path: str, block: nn.Module, args: tuple, kwargs: dict) -> int:
    with look(block):
        return values_returned(run_on_shared_input({}, path, block, args, kwargs))


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
        stages: the model's stages, or their module paths; None: found automatically.

    Raises:
        ValueError: the depths don't fit the model.
    """
    stages = as_stages(model, stages)
    subnet = Subnet.of(depths, stages)
    dropped = subnet.dropped(stages)
    extracted = copy.deepcopy(model)
    unfuse_blocks(extracted)
    shorten_configuration(extracted, stages, subnet)
    drop_blocks(extracted, dropped)
    return extracted


def drop_blocks(model: nn.Module, paths: Iterable[str]) -> None:
    """Takes blocks out of a model in place, as `extract_subnet` says."""
    for path in sorted(paths, key=_natural, reverse=True):
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if not removed_from_container(parent, name):
            setattr(parent, name, nn.Identity())
        elif name.isdigit():
            del parent[int(name)]  # type: ignore[operator]
        else:
            del parent._modules[name]


def removed_from_container(parent: nn.Module, name: str) -> bool:
    """Whether a dropped block leaves no `nn.Identity` in its parent."""
    return isinstance(parent, nn.Sequential) or (isinstance(parent, nn.ModuleList) and name.isdigit())


def shorten_configuration(model: nn.Module, stages: Sequence[Stage], subnet: Subnet) -> None:
    """Where a Hugging Face model's configuration counts the blocks, counts those of the subnet."""
    config = getattr(model, "config", None)
    depths = [stage.depth for stage in stages]
    if list(getattr(config, "depths", None) or ()) == depths:
        config.depths = list(subnet.depths)
    elif getattr(config, "num_hidden_layers", None) == sum(depths):
        config.num_hidden_layers = sum(subnet.depths)


def _natural(path: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
