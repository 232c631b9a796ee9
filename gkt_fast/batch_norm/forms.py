"""The residual blocks that are known: what their classes look like, and how their layers run one by one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _NormBase

from .kinds import is_fusible_batch_norm, is_fusible_batch_norm_relu, is_hooked
from .layer import run_batch_norm

__all__ = ["FORMS", "Form", "reason_against", "run_layers", "run_modules"]


class Form(NamedTuple):
    """What a known block class looks like.

    Args:
        module: where the class lives.
        name: the class.
        layers: the convolutions and norms, in the order in which they run.
        shortcut: attribute of what the residual goes through; None or nn.Identity there: nothing.
        relus: attributes that must be nn.ReLU. A norm that brings its own ReLU isn't listed.
        absent: attributes that must be None or nn.Identity where they exist.
        adds_in_place: whether the residual is added to the branch in place, so that the sum has the branch's dtype.
    """

    module: str
    name: str
    layers: tuple[str, ...]
    shortcut: str
    relus: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    adds_in_place: bool = False

    @property
    def preactivation(self) -> bool:
        """Whether norms come before convolutions, and carry their ReLU."""
        return self.layers[0].startswith("norm")


_BASIC = ("conv1", "bn1", "conv2", "bn2")
_BOTTLENECK = (*_BASIC, "conv3", "bn3")
_TIMM_ABSENT = ("drop_block", "aa", "se", "drop_path")
FORMS = {
    "FusedCifarBasicBlock": Form("gkt_fast.models.cifar_resnet", "BasicBlock", _BASIC, "shortcut"),
    "FusedTorchvisionBasicBlock": Form(
        "torchvision.models.resnet", "BasicBlock", _BASIC, "downsample", ("relu",), adds_in_place=True
    ),
    "FusedTorchvisionBottleneck": Form(
        "torchvision.models.resnet", "Bottleneck", _BOTTLENECK, "downsample", ("relu",), adds_in_place=True
    ),
    "FusedTimmBasicBlock": Form(
        "timm.models.resnet", "BasicBlock", _BASIC, "downsample", ("act1", "act2"), _TIMM_ABSENT, True
    ),
    "FusedTimmBottleneck": Form(
        "timm.models.resnet",
        "Bottleneck",
        _BOTTLENECK,
        "downsample",
        ("act1", "act2", "act3"),
        _TIMM_ABSENT,
        True,
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


def run_layers(form: Form, layers: list[nn.Module], shortcut: nn.Module | None, x: Tensor) -> Tensor:
    """A block's layers one by one, each norm with what follows it as one op."""
    run = _run_preactivation if form.preactivation else _run_postactivation
    return run(form, layers, shortcut, x)


def _run_postactivation(form: Form, layers: list[nn.Module], shortcut: nn.Module | None, x: Tensor) -> Tensor:
    y = x
    for convolution, norm in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        y = run_batch_norm(norm, convolution(y), activation="relu")
    y = layers[-2](y)
    residual = _run_shortcut(shortcut, x)
    if residual.dtype == y.dtype and residual.shape == y.shape:
        return run_batch_norm(layers[-1], y, residual=residual, activation="relu")
    y = run_batch_norm(layers[-1], y)
    total = y + residual
    return relu(total.to(y.dtype) if form.adds_in_place else total)


def _run_preactivation(form: Form, layers: list[nn.Module], shortcut: nn.Module | None, x: Tensor) -> Tensor:
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
    return run_modules(list(shortcut), x)


def run_modules(modules: list[nn.Module], x: Tensor) -> Tensor:
    """One after another, plain norms per ghost batch."""
    for module in modules:
        x = run_batch_norm(module, x) if is_fusible_batch_norm(module) else module(x)
    return x


def reason_against(block: nn.Module, form: Form) -> str | None:
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
