"""Finds the stages of residual blocks of any network, without running it.

A block is *residual* when its input reaches its output through nothing but additions, activations, reshapes that are
undone, and layers that are the identity in evaluation (`nn.Identity`, dropout, stochastic depth): dropping such a
block leaves a valid network. The path is looked for in the graph of the block's own forward in evaluation mode, traced
by torch.fx with all inner modules opaque. A stage is a run of neighbours of one class in a container, or in any other
module that holds such blocks side by side; a block that is not residual (because it changes shape) starts a new stage.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..subnets.subnet import Stage
from .look import look
from .wrappers import check_blocks_visible, check_not_scripted, is_scripted

__all__ = [
    "NAME_STAGES",
    "Stages",
    "as_stages",
    "call_form",
    "find_stages",
    "is_residual",
    "observes_ranges",
    "stages_from_paths",
]

Stages = Sequence["Stage | str | Sequence[str]"]
"""Stages as found, or named by module paths (`stages_from_paths`)."""

NAME_STAGES = (
    "Name the stages yourself with stages=[['layer1.0', 'layer1.1'], ...] or by the "
    "paths of their containers, stages=['layer1', ...]"
)
"""What error messages suggest."""

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PASSING_FUNCTIONS = {
    F.relu, torch.relu, torch.relu_, F.relu_, F.relu6, F.gelu, F.silu, F.leaky_relu, F.dropout,
    "relu", "relu_", "contiguous", "clone",
}  # fmt: skip
_PASSING_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Hardswish,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
_QUANTISER_NAMES = ("FakeQuantize", "FakeQuantizer", "Observer")
_PASSING_MODULE_NAMES = ("DropPath", "StochasticDepth", *_QUANTISER_NAMES)
"""How the names of such classes end: of timm, torchvision, transformers; of fake quantisation, which rounds."""
_RESHAPES = {torch.reshape, torch.flatten, torch.unflatten, "reshape", "view", "flatten", "unflatten"}
_RESHAPES_LIKE = {"reshape_as", "view_as"}


def as_stages(model: nn.Module, stages: Stages | None) -> list[Stage]:
    """The stages as they are, by their module paths, or found automatically.

    Raises:
        ValueError, TypeError: none are found, or a path doesn't fit.
    """
    if stages is None:
        return find_stages(model)
    check_blocks_visible(model, is_residual)
    if not isinstance(stages, str) and stages and all(isinstance(stage, Stage) for stage in stages):
        return list(stages)
    return stages_from_paths(model, stages)


def find_stages(model: nn.Module) -> list[Stage]:
    """The stages of a network: runs of residual blocks with at least one that can be dropped.

    Raises:
        ValueError: there is no droppable block; the message lists what was found where.
    """
    check_blocks_visible(model, is_residual)
    runs = list(_runs(model, ""))
    block_classes = {type(block) for run in runs for _, block in run if is_residual(block)}
    found = [stage for run in runs if type(run[0][1]) in block_classes for stage in _split(run)]
    stages = [stage for stage in found if any(stage.droppable)]
    if not stages:
        described = [_description(run) for run in runs if len(run) > 1]
        more = f" and {len(described) - 5} more" if len(described) > 5 else ""
        raise ValueError(
            f"model ({type(model).__name__}) has no run of residual blocks that can be dropped. A block can be dropped "
            "when its input reaches its output by an addition, as in ResNet, ConvNeXt or ViT. "
            f"Runs of modules found in containers: {', '.join(described[:5]) or 'none'}{more}. {NAME_STAGES}"
        )
    return stages


def _description(run: list[tuple[str, nn.Module]]) -> str:
    """Where a run stands, what it holds, and whether its blocks withstood tracing."""
    container = run[0][0].rpartition(".")[0] or "the model"
    why = ""
    if any(is_scripted(block) for _, block in run):
        why = " (ScriptModules, whose forward can't be seen: put the modules there that they were made from)"
    elif any(_has_skip_connection(block) is None for _, block in run):
        why = " (their forward can't be traced: its control flow depends on its input)"
    return f"{container}: {len(run)} x {type(run[0][1]).__name__}{why}"


def stages_from_paths(model: nn.Module, stages: Sequence[str | Sequence[str]]) -> list[Stage]:
    """Stages named by hand.

    A block whose forward can't be traced is taken at the caller's word: it can be dropped, so leave out one
    that changes shape.

    Args:
        model: the network.
        stages: for every stage the module path of its container, or the module paths of its blocks in order.

    Raises:
        ValueError: a path doesn't exist, is named twice or lies within another, or no block can be dropped.
        TypeError: an entry is neither a path nor a sequence of paths.
    """
    if isinstance(stages, str) or not isinstance(stages, Sequence) or not stages:
        raise ValueError(f"stages is {stages!r}; it must be a sequence with one entry per stage")
    found = []
    for entry in stages:
        if isinstance(entry, str):
            container = _submodule(model, entry)
            if not container._modules:
                raise ValueError(
                    f"stages names {entry!r} ({type(container).__name__}), which holds no blocks"
                )
            paths = [f"{entry}.{name}" for name in container._modules]
        elif isinstance(entry, Sequence) and all(isinstance(path, str) for path in entry):
            paths = list(entry)
        else:
            raise TypeError(f"stages has the entry {entry!r}; it must be a module path or a sequence of them")
        if not paths:
            raise ValueError("stages has an entry without blocks; it must name at least one")
        droppable = [_has_skip_connection(_submodule(model, path)) is not False for path in paths]
        found.append(Stage(tuple(paths), tuple(droppable)))
    check_not_scripted(model, found)
    _check_distinct([path for stage in found for path in stage.blocks])
    if not any(any(stage.droppable) for stage in found):
        names = sorted({type(_submodule(model, path)).__name__ for stage in found for path in stage.blocks})
        raise ValueError(
            f"stages names blocks of {', '.join(names)}; none of them has a skip connection, so none can be dropped"
        )
    return found


def is_residual(block: nn.Module) -> bool:
    """Whether the block's input reaches its output through additions alone, so that it can be dropped."""
    return bool(_has_skip_connection(block))


def _has_skip_connection(block: nn.Module) -> bool | None:
    """`is_residual`, with None where the block's forward can't be traced."""
    if isinstance(block, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or not block._modules:
        return False
    if is_scripted(block):
        return False
    if not isinstance(type(block).forward, FunctionType):
        return None
    try:
        with look(block, training=None):  # what the forward stores meanwhile are fx's proxies
            training, block.training = block.training, False
            try:
                graph = _BlockTracer().trace(block)
            finally:
                block.training = training
    except Exception:  # fx raises whatever the traced code raises when it meets a proxy
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    results = output.args[0]
    result = results[0] if isinstance(results, (tuple, list)) and results else results
    if not inputs or not isinstance(result, torch.fx.Node):
        return False
    modules = dict(block.named_modules())
    return _reaches(result, inputs[0], modules)


def call_form(block: nn.Module) -> tuple[bool, int]:
    """How a block is called: whether it may take more than one argument, and how many values it returns in a tuple.

    0 values: a bare one, or the block's forward can't be traced.
    """
    parameters = inspect.signature(block.forward).parameters.values()
    try:
        output = next(node for node in _BlockTracer().trace(block).nodes if node.op == "output").args[0]
    except Exception:  # fx raises whatever the traced code raises when it meets a proxy
        output = None
    return len(parameters) > 1, len(output) if isinstance(output, tuple) else 0


class _BlockTracer(torch.fx.Tracer):
    """Traces one block's own forward; everything inside it stays a call.

    Arguments that are None by default may be activations (a shortcut that the caller computes); flags and numbers have
    their defaults.
    """

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module that the forward makes on the fly, `nn.ReLU(inplace=True)(x)`, is a part of the forward's code."""
        if any(m is module for module in self.root.modules()):
            return super().call_module(m, forward, args, kwargs)
        return forward(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        arguments = [
            self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.default is inspect.Parameter.empty or parameter.default is None
            else parameter.default
            for parameter in list(inspect.signature(root_fn).parameters.values())[1:]
            if parameter.kind in _POSITIONAL
        ]
        return root_fn, [self.root, *(arguments or [self.create_proxy("placeholder", "input", (), {})])]


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _reaches(result: torch.fx.Node, source: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a path of passing operations with at least one addition leads from `source` to `result`."""

    @functools.cache
    def search(node: torch.fx.Node, added: bool, reshaped: bool) -> bool:
        """Backwards from `node`; `reshaped`: a later operation gives the result the shape of `source`."""
        if node is source:
            return added
        first = node.args[0] if node.args else None
        if not isinstance(first, torch.fx.Node):
            return False
        if node.op in ("call_function", "call_method"):
            if node.target in _ADDITIONS:
                operands = [operand for operand in node.args[:2] if isinstance(operand, torch.fx.Node)]
                return len(operands) == 2 and any(search(operand, True, reshaped) for operand in operands)
            if node.target in _RESHAPES or node.target in _RESHAPES_LIKE:
                return (reshaped or _restores_shape(node, source)) and search(first, added, True)
        return _passes(node, modules) and search(first, added, reshaped)

    return search(result, False, False)


def _restores_shape(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether a reshape has all of the source's dimensions as its target, in order."""
    sizes = node.args[1:]
    if node.target in _RESHAPES_LIKE:
        return sizes == (source,)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if len(sizes) == 1:
        return _is_shape(sizes[0], source)
    return len(sizes) > 1 and all(_is_size(size, source, dim) for dim, size in enumerate(sizes))


def _is_shape(node: Any, source: torch.fx.Node) -> bool:
    if not isinstance(node, torch.fx.Node):
        return False
    return (node.target is getattr and node.args == (source, "shape")) or (
        node.target == "size" and node.args == (source,)
    )


def _is_size(node: Any, source: torch.fx.Node, dim: int) -> bool:
    if not isinstance(node, torch.fx.Node):
        return False
    if node.target is operator.getitem:
        return node.args[1] == dim and _is_shape(node.args[0], source)
    return node.target == "size" and node.args == (source, dim)


def _passes(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return _is_passing_module(modules[str(node.target)])
    return node.op in ("call_function", "call_method") and node.target in _PASSING_FUNCTIONS


def _is_passing_module(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:  # an empty one stands for a shortcut in some models
        return all(map(_is_passing_module, module))
    return isinstance(module, _PASSING_MODULES) or type(module).__name__.endswith(_PASSING_MODULE_NAMES)


def observes_ranges(module: nn.Module) -> bool:
    """Whether a module prepares for quantisation: rounds, to a range that it finds in what passes through."""
    return type(module).__name__.endswith(_QUANTISER_NAMES)


def _runs(module: nn.Module, path: str) -> Iterator[list[tuple[str, nn.Module]]]:
    """Runs of neighbours of one class below `module`, outermost first: in containers all of them, elsewhere those of
    two or more that hold a residual block.

    The search doesn't look into the blocks of a run that holds a residual block. Children are taken from
    `_modules`, so that a module that stands in two places counts as two blocks.
    """
    children = [
        (f"{path}.{name}" if path else name, child)
        for name, child in module._modules.items()
        if child is not None
    ]
    is_container = isinstance(module, (nn.Sequential, nn.ModuleList))
    for run in _neighbours(children):
        holds_containers = isinstance(run[0][1], (nn.Sequential, nn.ModuleList))
        counts = not holds_containers and (is_container or len(run) > 1)
        if counts and _is_residual_run(run):
            yield run
            continue
        inner = [found for child_path, child in run for found in _runs(child, child_path)]
        if counts and is_container and not any(map(_is_residual_run, inner)) and not _holds_container(run):
            yield run
        else:
            yield from inner


def _is_residual_run(run: list[tuple[str, nn.Module]]) -> bool:
    return any(is_residual(block) for _, block in run)


def _neighbours(children: list[tuple[str, nn.Module]]) -> Iterator[list[tuple[str, nn.Module]]]:
    run: list[tuple[str, nn.Module]] = []
    for path, child in children:
        if run and type(child) is not type(run[0][1]):
            yield run
            run = []
        run.append((path, child))
    if run:
        yield run


def _holds_container(run: list[tuple[str, nn.Module]]) -> bool:
    return any(
        isinstance(inner, (nn.Sequential, nn.ModuleList)) for _, block in run for inner in block.modules()
    )


def _split(run: list[tuple[str, nn.Module]]) -> Iterator[Stage]:
    """Cuts a run before every block that is not residual."""
    stage: list[tuple[str, bool]] = []
    for path, block in run:
        droppable = is_residual(block)
        if stage and not droppable:
            yield Stage(*zip(*stage, strict=True))
            stage = []
        stage.append((path, droppable))
    yield Stage(*zip(*stage, strict=True))


def _check_distinct(paths: list[str]) -> None:
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"stages names {path!r} twice")
        outer = next((other for other in paths if path.startswith(other + ".")), None)
        if outer is not None:
            raise ValueError(f"stages names {path!r}, which lies within {outer!r}, a block itself")


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"stages names {path!r}, which the model doesn't have; its children are {children}"
        ) from error
