"""Subnets of one network as light modules that share every weight.

A copy of the network has the network's own structure and its own Python objects, but the same parameter tensors. What
depths have in common is one module: a module without running statistics is the same object in every subnet, and one
with running statistics (BatchNorm) is the same object in two subnets that reach it in the same *state*, having
executed the same sequence of blocks before it. So a state has one set of statistics, whoever gets there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..subnets.plan import Layer, make_plan
from ..subnets.subnet import Stage, Subnet
from .extraction import closes_gaps, drop_blocks, shorten_configurations
from .running_buffers import running_buffers

__all__ = ["LightSubnet", "light_subnets", "part_name"]


@dataclass(frozen=True)
class LightSubnet:
    """A subnet that shares its weights with others.

    Args:
        subnet: which blocks are kept.
        network: the module.
        names: for every module path of it, the path in the whole network (they differ where a container closed a gap).
    """

    subnet: Subnet
    network: nn.Module
    names: dict[str, str]


def part_name(subnet: Subnet) -> str:
    """A subnet's name that may stand in a module path."""
    return str(subnet).replace(".", "o").replace("/", "_")


def light_subnets(
    model: nn.Module,
    stages: Sequence[Stage],
    subnets: Sequence[Subnet],
    layers: Sequence[Layer],
    running: frozenset[str] = frozenset(),
) -> list[LightSubnet]:
    """The subnets as modules over the weights of `model`, which is used up: its modules go into them.

    Args:
        model: the network, with blocks of their own classes (`unfuse_blocks`).
        stages: its stages.
        subnets: those wanted, distinct.
        layers: its layers in order of execution (`count_layers`); empty where no module has running buffers.
        running: paths of further modules whose buffers belong to a state (`updated_elsewhere`).
    """
    dropped = [subnet.dropped(stages) for subnet in subnets]
    plan = make_plan(layers, dropped)
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    shared = _shared_tensors(model, running)
    ever_dropped = frozenset().union(*dropped)
    varying = {
        module
        for module, paths in places.items()
        if any(running_buffers(inner) for inner in module.modules())
        or any(_is_below(path, top) for path in running | ever_dropped for top in paths)
    }
    instances: dict[object, nn.Module] = {}
    found = []
    for subnet, absent, states in zip(subnets, dropped, plan.paths, strict=True):
        calls = [(state, layers[plan.layer_of[state]].path) for state in states]
        memo: dict[int, object] = dict(shared)
        # A module is what it is in another subnet if it runs in the same states there and lacks the same blocks, and
        # so does everything inside it: a norm that stands in two blocks is in other states where one of them is gone.
        own = {module: _states_of(paths, calls, absent) for module, paths in places.items()}
        keys = {module: (module, tuple(own[inner] for inner in module.modules())) for module in varying}
        for module, paths in places.items():
            if module not in varying or set(paths) <= absent:
                memo[id(module)] = module
            elif keys[module] in instances:
                memo[id(module)] = instances[keys[module]]
        known = set(memo)
        network = copy.deepcopy(model, memo)
        fresh = {module for module in places if id(module) in memo and id(module) not in known}
        for module in fresh:
            instances[keys[module]] = memo[id(module)]  # type: ignore[assignment]
        drop_blocks(
            network, [path for path in absent if model.get_submodule(path.rpartition(".")[0]) in fresh]
        )
        shorten_configurations(network, stages, subnet, keep_of=model)
        found.append(LightSubnet(subnet, network, _names(model, network, absent)))
    return found


def _states_of(
    paths: Sequence[str], calls: Sequence[tuple[int, str]], absent: frozenset[str]
) -> tuple[tuple[int, ...], frozenset[str]]:
    """The states in which the module at the paths, or a layer inside it, runs; and the blocks missing inside it."""
    states = tuple(state for state, layer in calls if any(_is_related(layer, path) for path in paths))
    return states, frozenset(block for block in absent if any(_is_below(block, path) for path in paths))


def _shared_tensors(model: nn.Module, running: frozenset[str]) -> dict[int, Tensor]:
    """A memo for deepcopy under which all tensors but the running buffers stay the same objects."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    for path, module in model.named_modules():
        own = set(running_buffers(module)) if path not in running else set(module._buffers)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in own:
                memo[id(buffer)] = buffer
    return memo


def _is_below(path: str, top: str) -> bool:
    """Whether a path is `top`, or lies in it."""
    return not top or path == top or path.startswith(top + ".")


def _is_related(layer: str, path: str) -> bool:
    """Whether the layer is at the path, in it or around it."""
    return _is_below(layer, path) or _is_below(path, layer)


def _names(model: nn.Module, network: nn.Module, absent: frozenset[str]) -> dict[str, str]:
    """For every module path of a subnet the path in the whole network."""
    names: dict[str, str] = {}

    def visit(whole: nn.Module, part: nn.Module, old: str, new: str) -> None:
        names[new] = old
        children = [
            name for name in whole._modules if not (_join(old, name) in absent and closes_gaps(whole))
        ]
        for name, mine in zip(children, part._modules, strict=True):
            if whole._modules[name] is not None and _join(old, name) not in absent:
                visit(whole._modules[name], part._modules[mine], _join(old, name), _join(new, mine))

    visit(model, network, "", "")
    return names


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
