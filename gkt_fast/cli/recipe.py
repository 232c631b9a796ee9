"""Builds the parts of a training run from the flags of `train`."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from .. import models
from ..config import GKTConfig
from ..data import Data, Indexed, IndexedSample
from ..distributed import is_distributed, share, world_size
from ..losses import NormalizedCrossEntropy
from ..methods import method_config
from ..network.discovery import find_stages
from ..training.loggers import Logger, TensorBoardLogger, WandbLogger
from .config_flags import CONFIG_FIELDS
from .initial_weights import parameter_groups
from .parser import did_you_mean
from .requirements import require

__all__ = [
    "build_config",
    "build_criterion",
    "build_loaders",
    "build_loggers",
    "build_model",
    "build_optimizer",
    "build_scheduler",
    "check_images",
    "check_requirements",
    "describe",
    "synchronized",
]


def check_requirements(args: argparse.Namespace) -> None:
    """Checks that what the flags need is installed.

    Raises:
        ImportError: something is missing; the message holds the command that installs it.
    """
    kind = args.data.partition(":")[0]
    require(f"--data {kind}", *{"digits": ["sklearn"]}.get(kind, ["torchvision"]))
    if args.model.startswith("timm:"):
        require(f"--model {args.model}", "timm")
    elif not args.model.startswith("cifar_resnet"):
        require(f"--model {args.model}", "torchvision")
    if args.mixup or args.cutmix:
        require("--mixup or --cutmix", "torchvision")
    for logger in args.log:
        require(f"--log {logger}", logger)


def build_config(args: argparse.Namespace, data: Data) -> GKTConfig:
    """The method's configuration, changed by the flags that were given."""
    given = {name: value for name, value in vars(args).items() if name in CONFIG_FIELDS}
    image_size = data.train[0][0].shape[-1] if args.method == "st++" else None
    return method_config(args.method, image_size, **given)


def build_criterion(args: argparse.Namespace, config: GKTConfig) -> nn.Module | None:
    """What the targets' term is, if not the fused cross entropy of raw logits."""
    if not args.normalize_ce:
        return None
    return NormalizedCrossEntropy(label_smoothing=config.label_smoothing)


def build_model(name: str, data: Data) -> nn.Module:
    """The network of a name, with as many classes and input channels as the data.

    Args:
        name: cifar_resnetN, a torchvision classifier, or timm:NAME.
        data: what it is trained on.

    Raises:
        ValueError: there is no network of that name, or it doesn't take images with these channels.
    """
    if name.startswith("cifar_resnet") and name.removeprefix("cifar_resnet").isdigit():
        depth = int(name.removeprefix("cifar_resnet"))
        return models.cifar_resnet(depth, data.num_classes, in_channels=data.in_channels)
    if name.startswith("timm:"):
        import timm

        if not timm.is_model(name[5:]):
            hint = did_you_mean(name[5:], timm.list_models())
            raise ValueError(f"model is {name!r}; timm has no network of that name{hint}")
        return timm.create_model(name[5:], num_classes=data.num_classes, in_chans=data.in_channels)
    import torchvision

    names = torchvision.models.list_models(torchvision.models)
    if name not in names:
        raise ValueError(
            f"model is {name!r}; it must be cifar_resnetN, one of torchvision's classifiers, or timm:NAME"
            f"{did_you_mean(name, [*names, 'cifar_resnet20', 'cifar_resnet56'])}"
        )
    if data.in_channels != 3:
        raise ValueError(
            f"model is {name!r}, which takes images of 3 channels; these have {data.in_channels}"
        )
    return torchvision.models.get_model(name, num_classes=data.num_classes)


@torch.no_grad()
def check_images(name: str, model: nn.Module, data: Data) -> None:
    """Runs a fresh network on one image, so that a size that it doesn't take shows before training.

    Raises:
        ValueError: the network can't run on it; or it has no residual blocks.
    """
    image = data.test[0][0]
    model.eval()
    try:
        model(image[None])
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        find_stages(model)  # a network without residual blocks is not to be tried at another size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        size = "x".join(map(str, image.shape[1:]))
        raise ValueError(
            f"model is {name!r}, which can't run on images of {size} ({reason}); --image-size sets another size, and "
            "models made for ImageNet want 224"
        ) from error
    model.train()


def describe(args: argparse.Namespace, data: Data, config: GKTConfig, model: nn.Module) -> str:
    """What is about to be trained, in a line."""
    size = "x".join(map(str, data.test[0][0].shape[1:]))
    subnets = config.streams - 1
    streams = f"{subnets or 'no'} subnet{'' if subnets == 1 else 's'}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"Data: {len(data.train)} training and {len(data.test)} test images of {size}, {data.num_classes} classes\n"
        f"Training: {args.model} with {parameters / 1e6:.2f} million parameters on {args.device}, method "
        f"{args.method}, {streams} in each step"
    )


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the network's parameters, which are moved to the device first."""
    model.to(args.device)
    parameters = parameter_groups(args, model)
    if args.opt == "adamw":
        return torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        parameters, args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=args.momentum > 0
    )


def build_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The learning-rate schedule, in epochs; None: the rate stays as it is."""
    if args.sched == "none":
        return None
    warmup_epochs = min(5, args.epochs // 4) if args.warmup_epochs is None else args.warmup_epochs
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.epochs - warmup_epochs, 1))
    if not warmup_epochs:
        return cosine
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup_epochs + 1), total_iters=warmup_epochs)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_epochs])


def synchronized(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The network, with SyncBatchNorm if there are several processes and the flags ask for it."""
    if not args.sync_bn or not is_distributed():
        return model
    if args.model.startswith("timm:"):  # torch's converter would lose the activations in timm's norm layers
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def build_loggers(args: argparse.Namespace, output: Path | None) -> list[Logger]:
    """The loggers beside `summary.csv`.

    Raises:
        ValueError: there are some, but no folder to write to.
    """
    if args.log and output is None:
        raise ValueError(
            f"log is {' '.join(args.log)} and output is not given; logs are written to the run's folder"
        )
    loggers: list[Logger] = []
    if "tensorboard" in args.log:
        loggers.append(TensorBoardLogger(output / "tensorboard"))
    if "wandb" in args.log:
        flags = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
        loggers.append(WandbLogger(output, flags, project=args.wandb_project, name=output.name))
    return loggers


def build_loaders(
    args: argparse.Namespace, data: Data, config: GKTConfig
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of the training images, of the test images, and of the training images without mixing.

    Raises:
        ValueError: images are to be mixed, and knowledge to be kept of each by itself.
    """
    remembered = config.knowledge == "dataset"
    if remembered and (args.mixup or args.cutmix):
        raise ValueError(
            f"mixup is {args.mixup:g} and cutmix {args.cutmix:g}; with --knowledge dataset they must be 0, since a "
            "mixed image has no past"
        )
    train = Indexed(data.train) if remembered else data.train
    options = {
        "num_workers": args.workers,
        "pin_memory": args.device.startswith("cuda"),
        "worker_init_fn": _ignore_interrupt,
    }
    size = min(args.batch_size, len(data.train) // world_size())  # type: ignore[arg-type]
    sampler = DistributedSampler(data.train, seed=args.seed, drop_last=True) if is_distributed() else None
    training = {**options, "shuffle": sampler is None, "sampler": sampler, "drop_last": True}
    calibration_loader = DataLoader(train, size, **training)
    train_loader = calibration_loader
    if args.mixup or args.cutmix or args.multi_scale:
        collate = BatchTransforms(args.mixup, args.cutmix, data.num_classes, args.multi_scale)
        train_loader = DataLoader(train, size, collate_fn=collate, **training)
    return train_loader, DataLoader(share(data.test), max(size, 256), **options), calibration_loader


class BatchTransforms:
    """Collates samples into a batch, and changes it as a whole.

    It is mixed by torchvision's MixUp or CutMix, one of them drawn for each batch; targets become class probabilities.
    It is resized to a size that is drawn for each batch.

    Args:
        mixup: alpha of MixUp; 0: none.
        cutmix: alpha of CutMix; 0: none.
        num_classes: number of classes.
        sizes: heights and widths to draw from; None: as the images are.
    """

    def __init__(
        self, mixup: float, cutmix: float, num_classes: int, sizes: Sequence[int] | None = None
    ) -> None:
        self.sizes = sizes
        self.mix = None
        if mixup or cutmix:
            from torchvision.transforms import v2

            kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
            choices = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
            self.mix = v2.RandomChoice(choices)

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
        images, targets, *indices = default_collate(samples)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        if self.sizes is not None:
            size = self.sizes[int(torch.randint(len(self.sizes), ()))]
            if images.shape[-2:] != (size, size):
                images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return IndexedSample(images, targets, *indices) if indices else (images, targets)


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the loader's workers too; they must last until the trainer has finished its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
