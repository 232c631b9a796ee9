"""Which buffers of a network training updates: BatchNorm's running statistics, and the like."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..network.inputs import call_model
from ..network.look import look

__all__ = ["has_running_buffers", "running_buffers", "updated_elsewhere"]

logger = logging.getLogger("gkt_fast")


def running_buffers(module: nn.Module) -> list[str]:
    """Names of the running statistics of this very module, where it is a BatchNorm or InstanceNorm that has them."""
    if isinstance(module, _NormBase) and module.running_mean is not None:
        return [name for name, buffer in module._buffers.items() if buffer is not None]
    return []


def has_running_buffers(model: nn.Module) -> bool:
    """Whether any of its modules has running statistics."""
    return any(map(running_buffers, model.modules()))


def updated_elsewhere(model: nn.Module, inputs: tuple[Any, ...]) -> frozenset[str]:
    """Paths of the modules, no norms, whose buffers change when the network runs in training mode.

    Such buffers can't be estimated by calibration: every depth starts from the network's own. That is logged.

    Args:
        model: the network; left as it was, with the random state it had.
        inputs: a batch of its inputs, in the form of `model_inputs`.
    """
    own = {
        path: module
        for path, module in model.named_modules()
        if not running_buffers(module) and any(buffer is not None for buffer in module._buffers.values())
    }
    if not own:
        return frozenset()
    with look(model, training=True):
        before = {path: dict(module._buffers) for path, module in own.items()}
        versions = {
            path: [b._version for b in buffers.values() if b is not None] for path, buffers in before.items()
        }
        call_model(model, inputs)
        changed = frozenset(
            path
            for path, module in own.items()
            if [b._version for b in module._buffers.values() if b is not None] != versions[path]
            or any(module._buffers[name] is not buffer for name, buffer in before[path].items())
        )
    if changed:
        logger.warning(
            "buffers of %s change in training and are no BatchNorm statistics; calibration can't estimate them, so "
            "every depth keeps the network's own",
            ", ".join(map(repr, sorted(changed))),
        )
    return changed
