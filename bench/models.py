"""The networks that the benchmarks measure, with their input shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gkt_fast.instruments.transformer import VisionTransformerLike
from gkt_fast.models import cifar_resnet

__all__ = ["MODELS", "BenchModel"]


@dataclass(frozen=True)
class BenchModel:
    """A network and the shape of one sample of its input."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    classes: int
    batch_size: int


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=100)


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=100)

    return build


MODELS = {
    "cifar_resnet56": BenchModel(lambda: cifar_resnet(56, num_classes=100), (3, 32, 32), 100, 64),
    "cifar_resnet20": BenchModel(lambda: cifar_resnet(20, num_classes=100), (3, 32, 32), 100, 64),
    "resnet50_64px": BenchModel(_resnet50, (3, 64, 64), 100, 32),
    "vit_like": BenchModel(VisionTransformerLike, (64, 48), 100, 64),
    "vit_tiny": BenchModel(_timm("vit_tiny_patch16_224"), (3, 224, 224), 100, 8),
    "convnext_atto_64px": BenchModel(_timm("convnext_atto"), (3, 64, 64), 100, 32),
}
