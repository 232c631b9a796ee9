"""What others wrap a model, or a part of it, in: recognised here, and refused where GKT can't work through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..subnets.subnet import Stage

__all__ = [
    "check_blocks_visible",
    "check_called_as_written",
    "check_not_compiled",
    "check_not_scripted",
    "check_not_wrapped",
    "is_compiled",
    "is_scripted",
]

_COMPILE_BLOCKS = "compile its blocks by gkt_fast.compile_blocks(model)"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs compiled: by `module.compile()`, or as what `torch.compile(module)` returned."""
    return module._compiled_call_impl is not None or _is_compiled_copy(module)


def _is_compiled_copy(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is of TorchScript, whose layers and forward can't be seen from Python."""
    return isinstance(module, torch.jit.ScriptModule)


def check_not_wrapped(model: nn.Module) -> None:
    """Checks that a model for `GKT` isn't in a wrapper that belongs around `GKT`.

    Raises:
        ValueError: it is, or it is a ScriptModule.
    """
    if isinstance(model, DataParallel):
        raise ValueError(
            "model is in DataParallel, whose copies lose what a step writes into them; give GKT model.module, and "
            "train on several GPUs with one process for each (torchrun and DistributedDataParallel)"
        )
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model is in DistributedDataParallel, which expects one forward and one backward pass per step; wrap GKT "
            "instead: DistributedDataParallel(GKT(model.module))"
        )
    if is_scripted(model):
        raise ValueError(
            f"model is a ScriptModule ({type(model).__name__}), whose blocks can't be told apart; give GKT the module "
            "that it was made from"
        )


def check_called_as_written(gkt: nn.Module) -> None:
    """Checks that `GKT` itself is neither compiled nor one of DataParallel's copies.

    Raises:
        ValueError: it is.
    """
    if torch.compiler.is_compiling():
        _refuse_compilation()
    if getattr(gkt, "_is_replica", False):
        raise ValueError(
            "GKT runs in a copy made by DataParallel, which loses its step counter and statistics; use "
            "DistributedDataParallel, with one process for each GPU (torchrun)"
        )


_COMPILED = (
    "GKT is compiled by torch.compile, which would compile a graph for every subnet; don't compile GKT, but "
    + _COMPILE_BLOCKS
)


def _refuse_compilation() -> None:
    raise ValueError(_COMPILED)


# What torch.compiler.disable sets, without importing the compiler: the error comes out as it is, or with fullgraph=True
# as the reason in the compiler's own.
_refuse_compilation._torchdynamo_disable = True  # type: ignore[attr-defined]
_refuse_compilation._torchdynamo_disable_msg = _COMPILED  # type: ignore[attr-defined]


def check_not_compiled(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Checks that nothing which holds several blocks is compiled as a whole: the model, or a container of blocks.

    Raises:
        ValueError: it is.
    """
    if is_compiled(model):
        raise ValueError(
            "model is compiled as a whole, which would compile a graph for every subnet; "
            f"give GKT the model itself and {_COMPILE_BLOCKS}"
        )
    for path in _containers(stages):
        if is_compiled(model.get_submodule(path)):
            raise ValueError(
                f"{path!r} is compiled as a whole and holds residual blocks, which would compile a graph for every "
                f"subnet; leave it as it is and {_COMPILE_BLOCKS}"
            )


def _containers(stages: Iterable[Stage]) -> set[str]:
    """The paths of everything but the model that holds blocks."""
    paths = {block.rpartition(".")[0] for stage in stages for block in stage.blocks}
    return {path.rsplit(".", level)[0] for path in paths if path for level in range(path.count(".") + 1)}


def check_blocks_visible(model: nn.Module, is_residual: Callable[[nn.Module], bool]) -> None:
    """Checks that no residual blocks stand in what `torch.compile` returned, one by one or in containers.

    Args:
        model: the network.
        is_residual: tells a residual block.

    Raises:
        ValueError: some do.
    """
    for path, module in model.named_modules():
        if path and _is_compiled_copy(module) and any(map(is_residual, module.modules())):
            raise ValueError(
                f"{path!r} is what torch.compile returned for a module with residual blocks, which hides them; put the "
                f"module itself there and {_COMPILE_BLOCKS}, which compiles in place"
            )


def check_not_scripted(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Checks that no block is a ScriptModule, or stands in one.

    Raises:
        ValueError: one is.
    """
    paths = {block for stage in stages for block in stage.blocks} | _containers(stages)
    for path in sorted(paths):
        if is_scripted(model.get_submodule(path)):
            raise ValueError(
                f"{path!r} is a ScriptModule, whose layers (BatchNorm, say) GKT can't see; put the module there that "
                "it was made from, or leave it out of the stages"
            )
