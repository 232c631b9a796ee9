"""The networks that the benchmarks measure, with their input shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gkt_fast.models import cifar_resnet

__all__ = ["MODELS", "BenchModel", "VisionTransformerLike"]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.projection(y.transpose(1, 2).reshape(batch, tokens, width))


class VisionTransformerLike(nn.Module):
    """Patches, identical pre-norm blocks, mean over tokens, linear head: the shape of a ViT without its library."""

    def __init__(self, blocks: int = 12, width: int = 192, heads: int = 3, tokens: int = 64) -> None:
        super().__init__()
        self.patches = nn.Linear(48, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


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
