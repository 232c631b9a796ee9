"""Which layers are batch norms, and which of them can run in what way.

Asked for is `__class__` and not `type()`: a stand-in for an intercepted layer looks like the layer that it stands for.
"""

from __future__ import annotations

from torch import nn

__all__ = [
    "carries_activation",
    "is_batch_norm",
    "is_fusible_batch_norm",
    "is_fusible_batch_norm_relu",
    "is_hooked",
]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm whose forward is known, so that it can run per ghost batch: torch's or timm's.

    A subclass isn't: its forward may do anything.
    """
    known = module.__class__ in _BATCH_NORMS or getattr(module, "unsynchronized", False)
    return known or carries_activation(module)


def carries_activation(module: nn.Module) -> bool:
    """Whether the module is timm's BatchNorm2d that is followed by its attributes `drop` and `act`."""
    kind = module.__class__
    return kind.__name__ == "BatchNormAct2d" and kind.__module__ == "timm.layers.norm_act"


def is_fusible_batch_norm(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm2d with running statistics and without hooks, which a fused block may run."""
    return module.__class__ is nn.BatchNorm2d and module.running_mean is not None and not is_hooked(module)


def is_fusible_batch_norm_relu(module: nn.Module) -> bool:
    """The same of timm's BatchNorm2d that carries its activation, where that is ReLU and nothing is dropped."""
    return (
        carries_activation(module)
        and module.running_mean is not None
        and type(module.drop) is nn.Identity
        and type(module.act) is nn.ReLU
        and not any(is_hooked(m) for m in (module, module.drop, module.act))
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module would run more than the forward of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
