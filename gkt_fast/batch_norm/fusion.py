"""`fuse_blocks`: residual blocks that run BatchNorm, the residual addition and ReLU as one op.

A fused block is the same module with the class swapped for a subclass of its own, so that parameters, buffers,
state_dict keys, hooks on the block, deepcopy, pickle and isinstance stay as they are. On every call a block looks at
its layers; where one isn't as expected, e.g. has a hook or was exchanged, the block's own forward runs.
"""

from __future__ import annotations

import importlib
import logging
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from ..network.interception import Site, find_layers, intercept
from ..ops.dtypes import FLOAT_DTYPES
from ..ops.residual_block import check_recompute
from .block_plan import BlockPlan
from .forms import FORMS, Form, reason_against, run_layers
from .kinds import is_batch_norm
from .layer import run_batch_norm_layer, surrounding_ghost_batches

__all__ = ["fuse_blocks", "unfuse_blocks"]

logger = logging.getLogger("gkt_fast")


def fuse_blocks(model: nn.Module, *, recompute: bool | Literal["pointwise"] = True) -> list[str]:
    """Fuses the residual blocks of `model` in place, for plain training as well as under `GKT`.

    Taken are the BasicBlock and Bottleneck of torchvision's and timm's ResNets, timm's pre-activation blocks with
    BatchNorm, and the blocks of `gkt_fast.models.cifar_resnet`. A block with anything unusual is left as it is:
    squeeze-excite, drop path, another norm or activation than BatchNorm and ReLU, BatchNorm without running
    statistics, SyncBatchNorm, a hook on a BatchNorm or ReLU, a subclass, a forward of its own. Results are the
    same up to rounding.

    A block runs as one node of the autograd graph (`gkt_fast.residual_block`) where its convolutions are torch's own,
    without hooks and padded with zeros, and layer by layer otherwise: also under torch.compile and under modes of the
    dispatcher, such as a FLOP counter. Blocks that are fused already keep their `recompute`. torch.jit.script needs
    unfused blocks: call `unfuse_blocks` first.

    Args:
        model: the network.
        recompute: whether backward computes normalised activations again instead of keeping them: about a fourth less
            memory for activations in a ResNet of basic blocks, a seventh in one of bottlenecks, for one more pass over
            each convolution's output. "pointwise": the outputs of 1x1 convolutions too, for one
            more run of each: a ResNet of bottlenecks then keeps about half as much (bench/memory.py), and a step takes
            about 14 % longer on a CPU.

    Returns:
        The module paths of the fused blocks.

    Raises:
        ValueError: `recompute` is another value.
    """
    check_recompute(recompute)
    fused = []
    for path, module in model.named_modules():
        name = _fused_class_name(type(module))
        if name is None:
            continue
        reason = reason_against(module, FORMS[name])
        if reason is None:
            module.__class__ = _fused_class(name)
            if recompute is not True:
                module.recompute = recompute
            fused.append(path)
        else:
            logger.info("block %r stays as it is: %s", path, reason)
    return fused


def unfuse_blocks(model: nn.Module) -> list[str]:
    """Gives all fused blocks of `model` their own class back. Returns their module paths."""
    unfused = []
    for path, module in model.named_modules():
        if isinstance(module, FusedBlock):
            module.__class__ = type(module).__mro__[2]
            module.__dict__.pop("recompute", None)
            unfused.append(path)
    return unfused


class FusedBlock:
    """Mixin before a block's own class: the fused forward, or the block's own where it can't be fused now."""

    _form: Form
    recompute: bool | Literal["pointwise"] = True

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run_layers(x)
        plan = _plans.get(self)
        if plan is None or not plan.is_current(self):
            plan = _plans[self] = BlockPlan(self, self._form)
        if (
            plan.reason is not None
            or not isinstance(x, Tensor)  # torch.fx traces the block's own forward
            or x.dtype not in FLOAT_DTYPES
            or not (x.is_cpu or x.is_cuda)
            or torch_module._has_any_global_hook()
        ):
            return self._own_forward(x)
        return plan.run(x)

    def _run_layers(self, x: Tensor) -> Tensor:
        """Without a plan, which a compiler can't look at, and layer by layer, which is what it optimises."""
        form = self._form
        if reason_against(self, form) is not None:
            return super().forward(x)
        layers = [getattr(self, name) for name in form.layers]
        return run_layers(form, layers, getattr(self, form.shortcut), x)

    def _own_forward(self, x: Tensor) -> Tensor:
        """The block's own; inside `ghost_batches` its norms run per ghost batch all the same."""
        if surrounding_ghost_batches() is None:
            return super().forward(x)
        with intercept(self, find_layers(self, is_batch_norm), _call_batch_norm):
            return super().forward(x)


_plans: WeakKeyDictionary[FusedBlock, BlockPlan] = WeakKeyDictionary()
"""What is known of blocks; nothing of it is kept in the model."""


def _call_batch_norm(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    return run_batch_norm_layer(module, *args, **kwargs)


_CLASS_OF_NAME: dict[str, type] = {}


def _fused_class_name(kind: type) -> str | None:
    for name, form in FORMS.items():
        if kind.__name__ == form.name and kind.__module__ == form.module:
            return name
    return None


def _fused_class(name: str) -> type:
    """The subclass of that name, made when first wanted, since torchvision and timm may be missing."""
    if name not in _CLASS_OF_NAME:
        form = FORMS[name]
        block = getattr(importlib.import_module(form.module), form.name)
        _CLASS_OF_NAME[name] = type(name, (FusedBlock, block), {"__module__": __name__, "_form": form})
    return _CLASS_OF_NAME[name]


def __getattr__(name: str) -> type:
    """Lets pickle find the fused classes."""
    if name in FORMS:
        return _fused_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
