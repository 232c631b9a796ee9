"""`fuse_blocks`: residual blocks that run BatchNorm, the residual addition and ReLU as one op.

A fused block is the same module with the class swapped for a subclass of its own, so that parameters, buffers,
state_dict keys, hooks on the block, deepcopy, pickle and isinstance stay as they are. On every call a block looks at
its layers; where one isn't as expected, e.g. has a hook or was exchanged, the block's own forward runs.
"""

from __future__ import annotations

import importlib
import logging
from typing import NamedTuple

import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _NormBase

from ..ops.dtypes import FLOAT_DTYPES
from .kinds import is_fusible_batch_norm, is_fusible_batch_norm_relu, is_hooked
from .layer import run_batch_norm

__all__ = ["fuse_blocks", "unfuse_blocks"]

logger = logging.getLogger("gkt_fast")


def fuse_blocks(model: nn.Module) -> list[str]:
    """Fuses the residual blocks of `model` in place, for plain training as well as under `GKT`.

    Taken are the BasicBlock and Bottleneck of torchvision's and timm's ResNets, timm's pre-activation blocks with
    BatchNorm, and the blocks of `gkt_fast.models.cifar_resnet`. A block with anything unusual is left as it is:
    squeeze-excite, drop path, another norm or activation than BatchNorm and ReLU, BatchNorm without running
    statistics, SyncBatchNorm, a hook on a BatchNorm or ReLU, a subclass, a forward of its own. Results are the
    same up to rounding.

    torch.jit.script needs unfused blocks: call `unfuse_blocks` first.

    Returns:
        The module paths of the fused blocks.
    """
    fused = []
    for path, module in model.named_modules():
        name = _fused_class_name(type(module))
        if name is None:
            continue
        reason = _reason_against(module, _FORMS[name])
        if reason is None:
            module.__class__ = _fused_class(name)
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
            unfused.append(path)
    return unfused


class Form(NamedTuple):
    """What a known block class looks like.

    Args:
        module: where the class lives.
        name: the class.
        layers: the convolutions and norms, in the order in which they run.
        shortcut: attribute of what the residual goes through; None or nn.Identity there: nothing.
        relus: attributes that must be nn.ReLU. A norm that brings its own ReLU isn't listed.
        absent: attributes that must be None or nn.Identity where they exist.
    """

    module: str
    name: str
    layers: tuple[str, ...]
    shortcut: str
    relus: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def preactivation(self) -> bool:
        """Whether norms come before convolutions, and carry their ReLU."""
        return self.layers[0].startswith("norm")


_BASIC = ("conv1", "bn1", "conv2", "bn2")
_BOTTLENECK = (*_BASIC, "conv3", "bn3")
_TIMM_ABSENT = ("drop_block", "aa", "se", "drop_path")
_FORMS = {
    "FusedCifarBasicBlock": Form("gkt_fast.models.cifar_resnet", "BasicBlock", _BASIC, "shortcut"),
    "FusedTorchvisionBasicBlock": Form(
        "torchvision.models.resnet", "BasicBlock", _BASIC, "downsample", ("relu",)
    ),
    "FusedTorchvisionBottleneck": Form(
        "torchvision.models.resnet", "Bottleneck", _BOTTLENECK, "downsample", ("relu",)
    ),
    "FusedTimmBasicBlock": Form(
        "timm.models.resnet", "BasicBlock", _BASIC, "downsample", ("act1", "act2"), _TIMM_ABSENT
    ),
    "FusedTimmBottleneck": Form(
        "timm.models.resnet", "Bottleneck", _BOTTLENECK, "downsample", ("act1", "act2", "act3"), _TIMM_ABSENT
    ),
    "FusedTimmPreActBasic": Form(
        "timm.models.resnetv2",
        "PreActBasic",
        ("norm1", "conv1", "norm2", "conv2"),
        "downsample",
        absent=("drop_path",),
    ),
    "FusedTimmPreActBottleneck": Form(
        "timm.models.resnetv2",
        "PreActBottleneck",
        ("norm1", "conv1", "norm2", "conv2", "norm3", "conv3"),
        "downsample",
        absent=("drop_path",),
    ),
}


class FusedBlock:
    """Mixin before a block's own class: the fused forward, or the block's own where it can't be fused now."""

    _form: Form

    def forward(self, x: Tensor) -> Tensor:
        form = self._form
        if (
            not isinstance(x, Tensor)  # torch.fx traces the block's own forward
            or x.dtype not in FLOAT_DTYPES
            or x.device.type not in ("cpu", "cuda")
            or torch_module._has_any_global_hook()
            or _reason_against(self, form) is not None
        ):
            return super().forward(x)
        layers = [getattr(self, name) for name in form.layers]
        run = _run_preactivation if form.preactivation else _run
        return run(layers, getattr(self, form.shortcut), x)


def _run(layers: list[nn.Module], shortcut: nn.Module | None, x: Tensor) -> Tensor:
    y = x
    for convolution, norm in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        y = run_batch_norm(norm, convolution(y), activation="relu")
    y = layers[-2](y)
    residual = _run_shortcut(shortcut, x)
    if residual.dtype == y.dtype and residual.shape == y.shape:
        return run_batch_norm(layers[-1], y, residual=residual, activation="relu")
    return relu(run_batch_norm(layers[-1], y) + residual)


def _run_preactivation(layers: list[nn.Module], shortcut: nn.Module | None, x: Tensor) -> Tensor:
    y = run_batch_norm(layers[0], x, activation="relu")
    residual = x if shortcut is None else _run_shortcut(shortcut, y)
    y = layers[1](y)
    for norm, convolution in zip(layers[2::2], layers[3::2], strict=True):
        y = convolution(run_batch_norm(norm, y, activation="relu"))
    return y + residual


def _run_shortcut(shortcut: nn.Module | None, x: Tensor) -> Tensor:
    if shortcut is None:
        return x
    if type(shortcut) is not nn.Sequential or is_hooked(shortcut):
        return shortcut(x)
    for module in shortcut:
        x = run_batch_norm(module, x) if is_fusible_batch_norm(module) else module(x)
    return x


def _reason_against(block: nn.Module, form: Form) -> str | None:
    """Why the block can't run fused; None when it can."""
    if "forward" in vars(block):
        return "it has a forward of its own"
    for name in form.layers:
        module = getattr(block, name)
        if name.startswith("conv"):
            if not isinstance(module, nn.Conv2d):
                return f"{name} is a {type(module).__name__}"
        elif not (
            is_fusible_batch_norm_relu(module) if form.preactivation else is_fusible_batch_norm(module)
        ):
            return f"{name} is not a plain BatchNorm2d with running statistics, or has hooks"
    for name in form.relus:
        module = getattr(block, name)
        if type(module) is not nn.ReLU or is_hooked(module):
            return f"{name} is not a plain ReLU, or has hooks"
    for name in form.absent:
        module = getattr(block, name, None)
        if not (module is None or (type(module) is nn.Identity and not is_hooked(module))):
            return f"it has {name}"
    return _reason_against_shortcut(getattr(block, form.shortcut))


def _reason_against_shortcut(shortcut: nn.Module | None) -> str | None:
    """A BatchNorm in the shortcut must be one that is seen and run per ghost batch."""
    if shortcut is None or not any(isinstance(module, _NormBase) for module in shortcut.modules()):
        return None
    if type(shortcut) is not nn.Sequential or is_hooked(shortcut):
        return f"its shortcut is a {type(shortcut).__name__} with hooks or a norm inside"
    for module in shortcut:
        inner_norm = any(isinstance(inner, _NormBase) for inner in module.modules())
        if inner_norm and not is_fusible_batch_norm(module):
            return "its shortcut has a norm that is not a plain BatchNorm2d with running statistics"
    return None


_CLASS_OF_NAME: dict[str, type] = {}


def _fused_class_name(kind: type) -> str | None:
    for name, form in _FORMS.items():
        if kind.__name__ == form.name and kind.__module__ == form.module:
            return name
    return None


def _fused_class(name: str) -> type:
    """The subclass of that name, made when first wanted, since torchvision and timm may be missing."""
    if name not in _CLASS_OF_NAME:
        form = _FORMS[name]
        block = getattr(importlib.import_module(form.module), form.name)
        _CLASS_OF_NAME[name] = type(name, (FusedBlock, block), {"__module__": __name__, "_form": form})
    return _CLASS_OF_NAME[name]


def __getattr__(name: str) -> type:
    """Lets pickle find the fused classes."""
    if name in _FORMS:
        return _fused_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
