"""A GKT step of a small network in every execution mode against the plain loop over its streams, in float64.

The loop shares nothing with the package's execution: every stream is the model's own forward with the dropped blocks
replaced by nothing, the loss is written from its formulas, one backward goes over all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..config import GKTConfig
from ..gkt import GKT
from ..models import cifar_resnet
from ..ops import use_backend
from . import formulas
from .report import Check, compare, failed

__all__ = ["check_step"]

CONFIG = GKTConfig(
    groups=2,
    loops=2,
    sampler="fixed",
    subnets=((2, 2, 1), (2, 1, 1), (1, 2, 1), (1, 1, 1)),
    batch_norm="all_streams",
)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4}
GRADIENT_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-2}
"""In float32 rounding decides beside the corner of a ReLU, in a few of the network's activations."""


def check_step(
    backend: str | None, modes: Iterable[str], dtype: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """One check for each mode.

    Args:
        backend: what runs the ops; None: the registry's choice.
        modes: names in `EXECUTION_MODES`.
        dtype: float64 or float32.
        device: where the network is.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cifar_resnet(14, num_classes=5, width=4)
    images = torch.randn(6, 3, 8, 8, generator=generator).to(device)
    targets = torch.randint(5, (6,), generator=generator).to(device)
    expected = loop_step(copy.deepcopy(model).to(device).double(), images.double(), targets)
    limits = dict.fromkeys(expected, LIMITS[dtype]) | {"gradients": GRADIENT_LIMITS[dtype]}
    name = str(dtype).removeprefix("torch.")
    for mode in modes:
        place = (f"step, {mode}", backend or "automatic", name, "two loops of two subnets")
        try:
            # TF32 would round the convolutions' inputs to 10 bits.
            with use_backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                actual = mode_step(mode, copy.deepcopy(model).to(device, dtype), images.to(dtype), targets)
            yield Check(*place, *compare(actual, expected, limits))
        except Exception as error:  # a report is wanted whatever goes wrong
            yield failed(*place, error)


def mode_step(mode: str, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What the package's step leaves behind."""
    gkt = GKT(model, CONFIG.replace(execution=mode))
    output = gkt(images, targets, step=0)
    output.loss.backward()
    terms = torch.cat([output.ce.reshape(1), output.kd])
    return _outcome(model, output.loss, terms, output.logits)


def loop_step(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What the loop leaves behind."""
    stages = ("layer1", "layer2", "layer3")
    logits = [model(images)]
    for depths in CONFIG.subnets:
        dropped = [
            f"{stage}.{i}"
            for stage, depth in zip(stages, depths, strict=True)
            for i in range(depth, len(model.get_submodule(stage)))
        ]
        logits.append(_forward_without(model, dropped, images))
    loss, terms = formulas.group_knowledge_loss(torch.stack(logits), targets, CONFIG.groups)
    loss.backward()
    return _outcome(model, loss, terms, logits[0])


def _forward_without(model: nn.Module, paths: Iterable[str], images: Tensor) -> Tensor:
    blocks = {path: model.get_submodule(path) for path in paths}
    for path in blocks:
        model.set_submodule(path, nn.Identity())
    try:
        return model(images)
    finally:
        for path, block in blocks.items():
            model.set_submodule(path, block)


def _outcome(model: nn.Module, loss: Tensor, terms: Tensor, logits: Tensor) -> dict[str, Tensor]:
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return {
        "loss": loss.detach(),
        "terms": terms.detach(),
        "logits": logits.detach(),
        "gradients": torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
        "running statistics": torch.cat([buffer.flatten() for buffer in statistics]),
    }
