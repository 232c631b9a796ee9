"""The shape of a vision transformer without its library, and drop path on subsets of the batch for it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["TransformerBlock", "VisionTransformerLike", "with_drop_path"]


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


class SubsetDropPathBlock(TransformerBlock):
    """The block with its branches on random subsets of the batch; `rate` is the share of samples left out."""

    rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, lambda part: self._attention(self.norm1(part)))
        return self._add(x, lambda part: self.mlp(self.norm2(part)))

    def _add(self, x: Tensor, branch) -> Tensor:
        kept = max(round((1 - self.rate) * len(x)), 1)
        rows = torch.randperm(len(x), device=x.device)[:kept]
        return torch.index_add(x, 0, rows, branch(x[rows]), alpha=len(x) / kept)


def with_drop_path(model: VisionTransformerLike, rate: float) -> VisionTransformerLike:
    """A copy whose blocks drop samples at the rate."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.__class__ = SubsetDropPathBlock
        block.rate = rate
    return model
