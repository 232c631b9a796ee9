"""The images of `bench/accuracy.py`: decoded once, kept in memory, augmented batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gkt_fast.data import IndexedSample

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
AUGMENTATIONS = ("shift-mirror", "randaugment")
"""Shifts by up to an eighth and mirroring; the same, then RandAugment (two operations of magnitude 9)."""
SHARE_A_DRAW = 5
"""Images of a batch that share a draw of RandAugment: one for each would cost a fifth of a small network's step."""


@dataclass(frozen=True)
class Images:
    """Images in memory: uint8 (N, 3, H, W), class indices (N,)."""

    images: Tensor
    targets: Tensor


def decode(folder: Path, number: int, image_size: int) -> Images:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    shape = [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
    resize = v2.Compose([v2.PILToTensor(), *shape])
    dataset = ImageFolder(folder, resize)
    each = number // len(dataset.classes)
    if each * len(dataset.classes) != number:
        raise SystemExit(
            f"{number} images can't be the same number of each of {len(dataset.classes)} classes"
        )
    of_class: dict[int, list[int]] = {}
    for index, target in enumerate(dataset.targets):
        of_class.setdefault(target, []).append(index)
    if min(map(len, of_class.values())) < each:
        raise SystemExit(f"{folder} has classes with fewer than {each} images")
    chosen = [index for indices in of_class.values() for index in indices[:each]]
    images = torch.stack([dataset[index][0] for index in chosen])
    return Images(images, torch.tensor([dataset.targets[index] for index in chosen]))


def normalized(images: Tensor) -> Tensor:
    mean, std = (255 * torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def train_loader(
    data: Images, batch_size: int, seed: int, augmentation: str, indexed: bool = False
) -> DataLoader:
    """Batches in an order of their own in every epoch, randomly changed by one of `AUGMENTATIONS`; with `indexed` they
    tell which images they hold."""
    from torchvision.transforms import v2

    side = data.images.shape[-1]
    shift_mirror = v2.Compose([v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip()])
    randaugment = v2.RandAugment(num_ops=2, magnitude=9)

    def collate(indices: list[int]) -> tuple[Tensor, ...]:
        images = torch.stack([shift_mirror(data.images[index]) for index in indices])
        if augmentation == "randaugment":
            images = torch.cat([randaugment(part) for part in images.split(SHARE_A_DRAW)])
        batch = normalized(images), data.targets[indices]
        return IndexedSample(*batch, torch.tensor(indices)) if indexed else batch

    return DataLoader(
        range(len(data.targets)),
        batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )


def batches(data: Images, batch_size: int = 250) -> list[tuple[Tensor, Tensor]]:
    pieces = zip(data.images.split(batch_size), data.targets.split(batch_size), strict=True)
    return [(normalized(images), targets) for images, targets in pieces]
