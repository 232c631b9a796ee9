"""Subnets as networks of their own: run one in place, or cut it out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch_norm.fusion import unfuse_blocks
from ..network.calls import logits_of, run_on_shared_input, skip_block, values_returned
from ..network.copying import copy_of
from ..network.discovery import Stages, as_stages, call_form
from ..network.inputs import call_model, model_inputs
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
    model: nn.Module,
    depths: Subnet | Sequence[int],
    stages: Stages | None = None,
    *,
    example_inputs: Any = None,
) -> nn.Module:
    """A copy of the model, of the same class, without the dropped blocks.

    Blocks in an `nn.Sequential` or `nn.ModuleList` are removed, and the following ones renumbered where names are
    numbers from 0; elsewhere an `nn.Identity` takes a dropped block's place, or, where the block takes or returns more
    than one value, a `torch.fx.GraphModule` that hands on what the block would (`gkt_fast.network.calls.skip_block`).
    BatchNorm statistics are copied as they are: those of a subnet differ, see `recalibrate_batch_norm`. Fused blocks
    get their own class back: the copy needs nothing of this package, and an ordered subnet's state_dict fits a model
    of the same class built at these depths. The configuration of a Hugging Face model is shortened too, for
    `save_pretrained`.

    With `example_inputs` the copy is compared with the model with the blocks dropped (`active_subnet`), both in
    evaluation mode. A model whose forward looks at its blocks (by their number, by a list beside them) may compute
    something else without them.

    Args:
        model: the network.
        depths: blocks to keep in each stage, or a `Subnet`.
        stages: the model's stages, or their module paths; None: found automatically.
        example_inputs: an example of the model's input, in any form that `GKT` takes, on the model's device; None: the
            copy isn't run.

    Raises:
        ValueError: the depths don't fit the model, or the copy computes something else on the example, or fails.
    """
    stages = as_stages(model, stages)
    subnet = Subnet.of(depths, stages)
    dropped = subnet.dropped(stages)
    extracted = copy_of(model)
    unfuse_blocks(extracted)
    shorten_configurations(extracted, stages, subnet)
    drop_blocks(extracted, dropped)
    if example_inputs is not None:
        check_extracted(extracted, model, subnet, stages, example_inputs)
    return extracted


def drop_blocks(model: nn.Module, paths: Iterable[str]) -> None:
    """Takes blocks out of a model in place, as `extract_subnet` says."""
    names: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        names.setdefault(parent, []).append(name)
    for path, dropped in names.items():
        parent = model.get_submodule(path)
        if closes_gaps(parent):
            _remove(parent, dropped)
        else:
            for name in dropped:
                setattr(parent, name, _hands_on(getattr(parent, name)))


def closes_gaps(parent: nn.Module) -> bool:
    """Whether blocks that are dropped from this module leave nothing in their place."""
    return isinstance(parent, (nn.Sequential, nn.ModuleList))


def _remove(container: nn.Module, names: Sequence[str]) -> None:
    """Removes children by their names. Names that count from 0 count from 0 again; others stay."""
    modules = container._modules
    counts = list(modules) == [str(i) for i in range(len(modules))]
    kept = [(name, module) for name, module in modules.items() if name not in names]
    modules.clear()
    modules.update((str(i) if counts else name, module) for i, (name, module) in enumerate(kept))


def _hands_on(block: nn.Module) -> nn.Module:
    """What stands for a dropped block that can't be left out: it takes the block's arguments and hands its input on."""
    several_arguments, returns = call_form(block)
    if not several_arguments and returns == 0:
        return nn.Identity()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    others = [graph.placeholder(f"x{i}", default_value=None) for i in range(1, returns)]
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    graph.output(x if returns == 0 else (x, *others))
    return torch.fx.GraphModule({}, graph, "HandsOn")


def check_extracted(
    extracted: nn.Module, model: nn.Module, subnet: Subnet, stages: Sequence[Stage], example_inputs: Any
) -> None:
    """Checks that what was extracted computes what the model with the blocks dropped computes.

    Raises:
        ValueError: it doesn't, or it fails.
    """
    inputs = model_inputs(model, example_inputs)
    with look(model), active_subnet(model, subnet, stages):
        expected = logits_of(call_model(model, inputs))
    what = f"extracted as {subnet}, {type(model).__name__}"
    why = "its forward uses more of its blocks than their calls; use active_subnet, or change the model"
    try:
        with look(extracted):
            actual = logits_of(call_model(extracted, inputs))
    except Exception as error:  # whatever the model's own code raises without its blocks
        raise ValueError(f"{what} fails with {type(error).__name__}: {error}; {why}") from error
    if actual.shape != expected.shape:
        raise ValueError(
            f"{what} returns logits of shape {tuple(actual.shape)} instead of {tuple(expected.shape)}; {why}"
        )
    if not torch.allclose(actual, expected, rtol=0, atol=_allowed(expected), equal_nan=True):
        difference = (actual - expected).abs().max().item()
        raise ValueError(f"{what} computes other logits (largest difference {difference:.3g}); {why}")


def _allowed(expected: Tensor) -> float:
    """The rounding that other kernels may bring, for unfused blocks."""
    precision = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    return 1000 * precision * max(1.0, expected.abs().nan_to_num(0, 0, 0).max().item())


def shorten_configurations(
    model: nn.Module, stages: Sequence[Stage], subnet: Subnet, keep_of: nn.Module | None = None
) -> None:
    """Where configurations of a Hugging Face model count the blocks, counts those of the subnet.

    A configuration counts the stages within the modules that hold it; those of a composite model hold further ones.
    Configurations that `keep_of` holds too are left as they are.
    """
    kept = keep_of.modules() if keep_of is not None else ()
    done = {id(module.config) for module in kept if hasattr(module, "config")}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if not hasattr(config, "to_dict") or id(config) in done:
            continue
        done.add(id(config))
        within = [i for i, stage in enumerate(stages) if not path or stage.blocks[0].startswith(path + ".")]
        keep = [subnet.keep[i] for i in within]
        _shorten(config, keep)


_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
)
"""Under which names configurations count all blocks."""


def _shorten(config: Any, keep: Sequence[Sequence[bool]]) -> None:
    depths, kept = [len(mask) for mask in keep], [sum(mask) for mask in keep]
    blocks = [block for mask in keep for block in mask]
    if list(getattr(config, "depths", None) or ()) == depths:
        config.depths = kept  # such configurations count stages where others count blocks
        return
    counted = False
    for name in _COUNTS:
        if name in vars(config) and getattr(config, name) == len(blocks):
            setattr(config, name, sum(blocks))
            counted = True
    if not counted:
        return
    for name, value in vars(config).items():  # one entry for each block: what kind of layer it is
        if isinstance(value, list) and len(value) == len(blocks) and "layer" in name and "ind" not in name:
            setattr(config, name, [entry for entry, keeps in zip(value, blocks, strict=True) if keeps])
