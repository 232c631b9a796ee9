"""Semantic segmentation: plain training and GKT on synthetic shapes, in about a minute on two CPU cores.

    python examples/segmentation.py

Circles, squares and triangles of any colour on cluttered ground, under noise; the outlines don't count, as in Pascal
VOC. Prints the mean intersection over union (IoU) of the full network and of its subnets, and draws predictions
beside the ground truth. `--model fcn_resnet50` and `deeplabv3_resnet50` train torchvision's networks the same way.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from gkt_fast import GKTConfig, GKTTrainer, extract_subnet, pictures, recalibrate_batch_norm
from gkt_fast.models import cifar_resnet

CLASSES = ("ground", "circle", "square", "triangle")
IGNORED = 255
METHODS = {"plain": GKTConfig(groups=0), "GKT": GKTConfig(groups=3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["small", "fcn_resnet50", "deeplabv3_resnet50"], default="small")
    parser.add_argument("--train-images", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("segmentation"))
    args = parser.parse_args()
    if args.train_images < args.batch_size:
        parser.error(
            f"--train-images is {args.train_images}; it must be at least --batch-size ({args.batch_size})"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    train_set = make_shapes(args.train_images, args.image_size, seed=args.seed)
    test_set = make_shapes(args.test_images, args.image_size, seed=args.seed + 1)
    trainers = {}
    for method, config in METHODS.items():
        trainers[method], seconds = train(config, train_set, args)
        print(f"{method}: {seconds:.0f} seconds of training")
    columns = compare(trainers, train_set, test_set, args)
    draw(columns, trainers, train_set, test_set, args)
    print(f"Written to {args.output}: segmentation.png")


def make_shapes(count: int, size: int, seed: int) -> TensorDataset:
    """Images (count, 3, size, size) with one to three shapes each, and their targets (count, size, size)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images, targets = torch.empty(count, 3, size, size), torch.zeros(count, size, size, dtype=torch.int64)
    for image, target in zip(images, targets, strict=True):
        coarse = 0.5 * torch.randn(1, 3, 5, 5, generator=generator)
        image.copy_(F.interpolate(coarse, size=(size, size), mode="bicubic")[0])
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            kind = int(torch.randint(1, len(CLASSES), (), generator=generator))
            radius, angle = uniform(0.14, 0.26) * size, uniform(0.0, 2 * torch.pi)
            y, x = rows - uniform(0.15, 0.85) * size, columns - uniform(0.15, 0.85) * size
            depth = inside(CLASSES[kind], x, y, radius, angle)
            colour = 1.5 * torch.randn(3, 1, generator=generator)
            image[:, depth > 0] = colour
            target[depth > 0] = kind
            target[depth.abs() < 0.7] = IGNORED
        image += 0.3 * torch.randn(image.shape, generator=generator)
    return TensorDataset(images, targets)


def inside(kind: str, x: Tensor, y: Tensor, radius: float, angle: float) -> Tensor:
    """How far each point lies inside the shape, in pixels; negative outside."""
    if kind == "circle":
        return radius - (x**2 + y**2).sqrt()
    sides = 4 if kind == "square" else 3
    turns = angle + 2 * torch.pi * torch.arange(sides) / sides
    distances = torch.stack([x * turn.cos() + y * turn.sin() for turn in turns])
    return radius * (0.9 if kind == "square" else 0.65) - distances.amax(0)


class SmallSegmenter(nn.Module):
    """A CIFAR ResNet with a convolution for a head, its output at a quarter of the resolution; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = cifar_resnet(20)
        self.backbone.fc = nn.Identity()
        self.head = nn.Conv2d(64, len(CLASSES), 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        network = self.backbone
        x = F.relu(network.bn1(network.conv1(images)))
        x = self.head(network.layer3(network.layer2(network.layer1(x))))
        return {"out": F.interpolate(x, size=images.shape[-2:], mode="bilinear", align_corners=False)}


def build_model(name: str) -> nn.Module:
    """A network that returns a dict with logits (B, C, H, W) as "out"."""
    if name == "small":
        return SmallSegmenter()
    import torchvision

    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=len(CLASSES))


def train(config: GKTConfig, train_set: TensorDataset, args: argparse.Namespace) -> tuple[GKTTrainer, float]:
    """Trains one network; returns its trainer and the seconds it took."""
    torch.manual_seed(args.seed)
    model = build_model(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=1e-2)
    loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=max(2, args.epochs * len(loader))
    )
    trainer = GKTTrainer(
        model,
        optimizer,
        config.replace(ignore_index=IGNORED, seed=args.seed),
        scheduler=scheduler,
        scheduler_interval="step",
        channels_last=True,
    )
    started = time.perf_counter()
    for _ in tqdm(range(args.epochs), desc="GKT" if config.groups else "plain", disable=None):
        for images, targets in loader:
            trainer.step(images, targets)
    return trainer, time.perf_counter() - started


def compare(
    trainers: dict[str, GKTTrainer],
    train_set: TensorDataset,
    test_set: TensorDataset,
    args: argparse.Namespace,
) -> list[tuple[int, ...]]:
    """Prints the mean IoU of the full network and two subnets; returns their depths."""
    stages = trainers["GKT"].gkt.stages
    full = tuple(stage.depth for stage in stages)
    shown = [full, tuple(max(1, round(2 * depth / 3)) for depth in full), (1,) * len(full)]
    test, calibration = DataLoader(test_set, args.batch_size), DataLoader(train_set, args.batch_size)
    print(
        f"\nMean IoU in %, {len(test_set)} test images, {len(train_set)} training images, {args.epochs} epochs\n"
    )
    print(f"{'depths':12}" + "".join(method.rjust(10) for method in trainers))
    for depths in shown:
        results = [
            trainer.evaluate(test, depths, calibration_loader=calibration) for trainer in trainers.values()
        ]
        cells = "".join(f"{100 * result.mean_iou:10.2f}" for result in results)
        print(f"{'-'.join(map(str, depths)):12}{cells}")
    return shown


def draw(
    shown: list[tuple[int, ...]],
    trainers: dict[str, GKTTrainer],
    train_set: TensorDataset,
    test_set: TensorDataset,
    args: argparse.Namespace,
) -> None:
    """Writes a picture: some test images, their ground truth, and what the largest and smallest networks see."""
    from matplotlib.colors import ListedColormap

    images, targets = (values[:4] for values in test_set.tensors)
    panels: dict[str, Tensor] = {"image": images, "ground truth": targets}
    for depths in (shown[0], shown[-1]):
        for method, trainer in trainers.items():
            network = extract_subnet(trainer.model, depths).eval()
            recalibrate_batch_norm(network, DataLoader(train_set, args.batch_size))
            with torch.no_grad():
                panels[f"{method} {'-'.join(map(str, depths))}"] = network(images)["out"].argmax(1)
    colours = ListedColormap(["#30343f", "#ffb000", "#26a69a", "#dc267f"])
    colours.set_over("white")
    with pictures.picture(
        args.output / "segmentation.png", (1.3 * len(panels), 1.35 * len(images) + 0.2), dpi=100
    ) as figure:
        for column, (title, values) in enumerate(panels.items()):
            for row, value in enumerate(values):
                axes = figure.add_subplot(len(values), len(panels), row * len(panels) + column + 1)
                axes.set_axis_off()
                if value.dim() == 3:
                    axes.imshow(((value.movedim(0, -1) + 3) / 6).clamp(0, 1))
                else:
                    axes.imshow(value, cmap=colours, vmin=0, vmax=len(CLASSES) - 1, interpolation="nearest")
                if row == 0:
                    axes.set_title(title, fontsize=8)


if __name__ == "__main__":
    main()
