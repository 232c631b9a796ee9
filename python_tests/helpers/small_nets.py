"""A small residual network to set traps in, its batches, and streams that drop some of its blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gkt_fast import GKTConfig, Stage

CLASSES = 4

CONFIG = GKTConfig(groups=2, loops=2)


class Block(nn.Module):
    """x + f(x) on (B, C, H, W)."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + F.gelu(self.bn(self.conv(x)))


class Net(nn.Module):
    """Stem, blocks in a list, head."""

    def __init__(self, make_block=Block, depth=4, channels=6):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self.head = nn.Linear(channels, CLASSES)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def batch(size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)
    return (images,), torch.randint(CLASSES, (size,), generator=generator)


def drops(*streams, path="blocks.{}"):
    """The full network, then streams that drop the blocks of the given numbers."""
    return [frozenset(), *(frozenset(path.format(i) for i in stream) for stream in streams)]


SOME = drops([0], [0, 2], [3], [1, 3])

STAGES = [Stage(tuple(f"blocks.{i}" for i in range(4)), (True,) * 4)]
"""All four blocks of `Net`, whether or not they can be traced."""
