"""The full network after training by stochastic depth: every residual branch weighted by its survival probability.

Huang et al. (ECCV 2016) train block l as x + b f(x), with b = 1 in a share p of the steps, and test x + p f(x): the
branch weighs what it weighed on average in training. An activation after the addition applies to the sum.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..network.discovery import _ADDITIONS, _passes, find_stages
from ..network.interception import Site, find_sites, intercept
from ..subnets.sampling import survival_probabilities
from ..subnets.subnet import Stage

__all__ = ["survival_scaling"]

logger = logging.getLogger("gkt_fast")


@contextmanager
def survival_scaling(
    model: nn.Module, drop_rate: float = 0.5, stages: Sequence[Stage] | None = None
) -> Iterator[None]:
    """Inside the block, the residual branches of the blocks that can be dropped are scaled by 1 - drop_rate * l / L.

    For evaluation after stochastic depth (Huang et al., ECCV 2016). The branch is found in the graph of a block's
    forward, traced as the block is first called; hooks on the block itself don't fire. A block that can't be traced
    gives x + p (block(x) - x): the same where nothing follows its addition, and otherwise its mean output in training,
    given its input.

    Args:
        model: the network.
        drop_rate: drop probability of the last block in training, as in `GKTConfig`, in [0, 1).
        stages: the model's stages; None: found automatically.

    Raises:
        ValueError: drop_rate is out of its range, or the model has no residual blocks.
    """
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}; it must be in [0, 1)")
    stages = find_stages(model) if stages is None else stages
    probabilities = {
        path: probability
        for stage, row in zip(stages, survival_probabilities(stages, drop_rate), strict=True)
        for path, probability in zip(stage.blocks, row, strict=True)
        if probability < 1.0
    }
    scaled: dict[Hashable, nn.Module | None] = {}

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        probability = probabilities[site.path]
        key = (site.path, *map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
        if key not in scaled:
            scaled[key] = _scaled_branch(module, probability, args, kwargs)
            if scaled[key] is None:
                logger.info("block %r can't be traced; its output is scaled, not its branch", site.path)
        block = scaled[key]
        if block is not None:
            return block(*_tensors(args, kwargs))
        return _interpolated(module, probability, args, kwargs)

    sites = [site for site in find_sites(model, stages) if site.path in probabilities]
    with intercept(model, sites, call):
        yield


_OPTIONS = (type(None), bool, int, float, str)
"""What an argument other than a tensor may be: a value that a traced block holds fixed."""


def _form(value: Any) -> Hashable:
    """What two calls must have in common to run the same traced block."""
    return (type(value), value) if isinstance(value, _OPTIONS) else type(value)


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


class _CallTracer(torch.fx.Tracer):
    """Traces a block's own forward in one call of it: tensors are placeholders, other arguments what they are.

    Everything inside the block stays a call.
    """

    def __init__(self, args: tuple, kwargs: dict) -> None:
        super().__init__()
        self._args = args
        self._kwargs = kwargs

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        def placeholder(name: str, value: Any) -> Any:
            return self.create_proxy("placeholder", name, (), {}) if isinstance(value, Tensor) else value

        args = [placeholder(f"input_{index}", value) for index, value in enumerate(self._args)]
        kwargs = {name: placeholder(name, value) for name, value in self._kwargs.items()}
        return functools.partial(root_fn, **kwargs), [self.root, *args]


def _scaled_branch(block: nn.Module, probability: float, args: tuple, kwargs: dict) -> nn.Module | None:
    """The block as this call runs it, with what is added to its input multiplied by `probability`.

    It takes the call's tensors. None where the branch can't be told apart, or an argument is a structure of tensors.
    """
    if not all(isinstance(value, (Tensor, *_OPTIONS)) for value in (*args, *kwargs.values())):
        return None
    try:
        graph = _CallTracer(args, kwargs).trace(block)
    except Exception:  # fx raises whatever the traced code raises when it meets a proxy
        return None
    branches = _branches(graph, dict(block.named_modules()))
    if not branches:
        return None
    for addition, branch in branches:
        with graph.inserting_before(addition):
            addition.replace_input_with(branch, graph.call_function(operator.mul, (branch, probability)))
    return torch.fx.GraphModule(block, graph)


def _branches(
    graph: torch.fx.Graph, modules: dict[str, nn.Module]
) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
    """The additions between a block's input and its output, each with its operand that is not the input.

    Empty where there are none, or where the input reaches both operands.
    """
    source = next(node for node in graph.nodes if node.op == "placeholder")

    def operands(node: torch.fx.Node) -> list[torch.fx.Node]:
        return [value for value in node.args[:2] if isinstance(value, torch.fx.Node)]

    def is_addition(node: torch.fx.Node) -> bool:
        return node.op in ("call_function", "call_method") and node.target in _ADDITIONS

    @functools.cache
    def carries(node: torch.fx.Node) -> bool:
        if node is source:
            return True
        if is_addition(node):
            return any(map(carries, operands(node)))
        return _passes(node, modules) and any(map(carries, operands(node)[:1]))

    node = next(node for node in graph.nodes if node.op == "output").args[0]
    node = node[0] if isinstance(node, (tuple, list)) else node
    found = []
    while node is not source:
        if not isinstance(node, torch.fx.Node) or not carries(node):
            return []
        if is_addition(node):
            carrying = [operand for operand in operands(node) if carries(operand)]
            others = [operand for operand in operands(node) if not carries(operand)]
            if len(carrying) != 1 or len(others) != 1:
                return []
            found.append((node, others[0]))
            node = carrying[0]
        else:
            node = operands(node)[0]
    return found


def _interpolated(block: nn.Module, probability: float, args: tuple, kwargs: dict) -> Any:
    x = args[0] if args else next(iter(kwargs.values()))
    output = block(*args, **kwargs)

    def scale(value: Any) -> Any:
        return torch.lerp(x, value, probability) if isinstance(value, Tensor) else value

    return (scale(output[0]), *output[1:]) if isinstance(output, tuple) else scale(output)
