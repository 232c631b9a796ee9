"""torch.compile for the blocks of a model: each by itself, never a sampled subnet as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..subnets.subnet import Stage
from .discovery import find_stages

__all__ = ["compile_blocks"]

VARIANTS = 8
"""How many graphs a block of one shape may need: training and evaluation, with and without gradients, fixed and dynamic
batch."""


def compile_blocks(model: nn.Module, stages: Sequence[Stage] | None = None, **options: Any) -> list[str]:
    """Compiles each residual block in place, by `torch.nn.Module.compile`.

    Compiling the model as a whole would compile a graph for every sampled subnet; ResNet-50 alone has 216. Blocks of
    one shape share a graph, and new subnets need no new ones. Parameters and state_dict keys stay as they are;
    copies (`extract_subnet`) are not compiled. Call it before or after `GKT` takes the model. Compiled blocks with
    BatchNorm run in all modes but `stacked`, and not with batch_norm="all_streams" in `shared` and `lean`.

    torch gives up on a function after `torch._dynamo.config.recompile_limit` graphs (8), and all blocks of a class
    are one function: the limit is raised to 8 graphs for each distinct block where it is lower.

    Args:
        model: the network.
        stages: its stages, e.g. `gkt.stages`; None: found automatically.
        options: of torch.compile, such as mode="max-autotune".

    Returns:
        The module paths of the blocks.

    Raises:
        ValueError: the model has no residual blocks.
    """
    import torch._dynamo

    stages = find_stages(model) if stages is None else stages
    paths = [path for stage in stages for path in stage.blocks]
    limit = VARIANTS * len({_shape(model.get_submodule(path)) for path in paths})
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for path in paths:
        model.get_submodule(path).compile(**options)
    return paths


def _shape(block: nn.Module) -> tuple[Any, ...]:
    """What blocks that share a graph have in common: classes and options of their modules, shapes of their tensors."""
    modules = tuple((name, type(module), module.extra_repr()) for name, module in block.named_modules())
    return modules, tuple((name, tensor.shape) for name, tensor in block.state_dict().items())
