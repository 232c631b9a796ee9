"""The 6n+2-layer residual networks for small images (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "CifarResNet", "PadShortcut", "cifar_resnet"]


class PadShortcut(nn.Module):
    """The parameter-free shortcut of a block that changes shape (option A): subsample, then pad with zero channels.

    Args:
        stride: keeps every `stride`-th row and column.
        added_channels: number of zero channels appended.
    """

    def __init__(self, stride: int, added_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.added_channels = added_channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.added_channels))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, added_channels={self.added_channels}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, a shortcut and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same_shape = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same_shape else PadShortcut(stride, channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Stem, three stages of `BasicBlock` (widths w, 2w, 4w), global average pooling and a linear classifier.

    Args:
        blocks: blocks of each of the three stages.
        num_classes: size of the output.
        width: channels of the first stage.
        in_channels: channels of the images.
    """

    def __init__(
        self, blocks: tuple[int, int, int], num_classes: int = 10, width: int = 16, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = (width, width, 2 * width, 4 * width)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                BasicBlock(channels[stage], channels[stage + 1], stride=1 if stage == 0 else 2),
                *(BasicBlock(channels[stage + 1], channels[stage + 1]) for _ in range(blocks[stage] - 1)),
            )
            for stage in range(3)
        )
        self.fc = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def cifar_resnet(
    depth: int = 20, num_classes: int = 10, width: int = 16, in_channels: int = 3
) -> CifarResNet:
    """A ResNet of 6n+2 layers for 32x32 images: depth 20, 32, 44, 56 or 110 in the paper.

    Args:
        depth: number of weighted layers, 6n + 2 for n blocks in each of the three stages.
        num_classes: size of the output.
        width: channels of the first stage (16 in the paper).
        in_channels: channels of the images.

    Raises:
        ValueError: depth is not 6n + 2 with n >= 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth is {depth}; it must be 6n + 2 with n >= 1 (8, 14, 20, 32, 56, 110, ...)")
    blocks = (depth - 2) // 6
    return CifarResNet((blocks, blocks, blocks), num_classes, width, in_channels)
