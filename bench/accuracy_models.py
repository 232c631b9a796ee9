"""The networks of `bench/accuracy.py` by name, and how each kind is trained."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.flop_counter import FlopCounterMode

from gkt_fast import extract_subnet
from gkt_fast.models import cifar_resnet

NUM_CLASSES = 10


@dataclass(frozen=True)
class Family:
    """Networks of one kind.

    Args:
        title: of a network with this number, for people.
        build: makes the network from its number, its width and the side of the images.
        make_optimizer: from the network, the learning rate and the weight decay.
        width: unless another one is asked for, as are the next two.
        lr: the largest learning rate.
        weight_decay: as the optimizer takes it.
        warmup_epochs: epochs in which the learning rate rises to `lr`.
        depths: blocks of each stage, from the network's number.
        resizable: whether they take images of any size.
    """

    title: str
    build: Callable[[int, int, int], nn.Module]
    make_optimizer: Callable[[nn.Module, float, float], Optimizer]
    width: int
    lr: float
    weight_decay: float
    warmup_epochs: int
    depths: Callable[[int], tuple[int, ...]]
    resizable: bool


def _resnet(layers: int, width: int, image_size: int) -> nn.Module:
    return cifar_resnet(layers, NUM_CLASSES, width)


def _vision_transformer(blocks: int, width: int, image_size: int) -> nn.Module:
    """timm's, with patches of 4x4, heads of 32 channels, and the mean over patches instead of a class token."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        patch_size=4,
        num_classes=NUM_CLASSES,
        embed_dim=width,
        depth=blocks,
        num_heads=max(width // 32, 1),
        global_pool="avg",
        class_token=False,
    )


def _sgd(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)


FAMILIES = {
    "cifar_resnet": Family(
        "ResNet-{}",
        _resnet,
        _sgd,
        width=16,
        lr=0.1,
        weight_decay=5e-4,
        warmup_epochs=0,
        depths=lambda layers: ((layers - 2) // 6,) * 3,
        resizable=True,
    ),
    "vit": Family(
        "ViT of {} blocks",
        _vision_transformer,
        _adamw,
        width=96,
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=5,
        depths=lambda blocks: (blocks,),
        resizable=False,
    ),
}


def family_of(model: str) -> tuple[Family, int]:
    """The family and the number of a network: cifar_resnetN of N = 6n + 2 layers, vitN of N blocks.

    Raises:
        ValueError: there is no such network.
    """
    found = re.fullmatch(r"([a-z_]+)([1-9]\d*)", model)
    if found is None or found[1] not in FAMILIES:
        raise ValueError(
            f"model is {model!r}; it must be cifar_resnetN (N = 6n + 2 layers) or vitN (N blocks)"
        )
    return FAMILIES[found[1]], int(found[2])


def title_of(model: str) -> str:
    family, number = family_of(model)
    return family.title.format(number)


def build_model(model: str, width: int, image_size: int) -> nn.Module:
    family, number = family_of(model)
    return family.build(number, width, image_size)


def make_scheduler(family: Family, optimizer: Optimizer, epochs: int) -> LRScheduler:
    """By epochs: a linear warm-up, where the family has one, then a cosine to 0."""
    warmup = min(family.warmup_epochs, epochs - 1)
    cosine = CosineAnnealingLR(optimizer, epochs - warmup)
    if warmup == 0:
        return cosine
    rise = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, cosine], milestones=[warmup])


@functools.cache
def forward_flops(model: str, width: int, image_size: int, depths: tuple[int, ...] | None = None) -> int:
    """Floating point operations of one image's forward pass (a multiply-add is two).

    Args:
        model: the network's name.
        width: its width.
        image_size: side of the image.
        depths: blocks kept of each stage; None: all.
    """
    network = build_model(model, width, image_size)
    network = network if depths is None else extract_subnet(network, depths)
    counter = FlopCounterMode(display=False)
    # Attention as matrix products, since the fused kernel isn't counted on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network.eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops()
