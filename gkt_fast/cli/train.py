"""`python -m gkt_fast train`."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from .. import models
from ..config import BATCH_NORM_POLICIES, EXECUTIONS, GKTConfig
from ..data import Data, load_data
from ..methods import METHODS, method_config
from ..sampling import SAMPLERS
from ..subnet import Subnet
from ..trainer import AMP_DTYPES, GKTTrainer
from .arguments import (
    parse_depths,
    parse_device,
    parse_integer,
    parse_min_depth,
    parse_number,
    parse_resolution,
    parse_subnets,
)

__all__ = ["add_arguments", "train", "with_config_file"]

FIELDS = {field.name: field for field in dataclasses.fields(GKTConfig)}


def train(args: argparse.Namespace) -> None:
    """Trains and evaluates a network as the flags say."""
    torch.manual_seed(getattr(args, "seed", GKTConfig.seed))
    data = load_data(args.data, args.image_size, args.train_images)
    model = build_model(args.model, data)
    optimizer = _optimizer(args, model)
    trainer = GKTTrainer(
        model,
        optimizer,
        _config(args, data),
        scheduler=_scheduler(args, optimizer),
        device=args.device,
        amp=args.amp_dtype if args.amp else None,
        channels_last=args.channels_last,
    )
    subnets = [_evaluated_subnet(depths, trainer) for depths in args.evaluate_depths or ()]
    train_loader, val_loader = _loaders(args, data)
    output = None if args.output is None else args.output / (args.experiment or f"{args.model}-{args.method}")
    resume: bool | Path = True if args.resume == "auto" else False if args.resume == "" else Path(args.resume)
    trainer.fit(
        train_loader,
        epochs=args.epochs,
        val_loader=val_loader,
        output_dir=output,
        resume=resume,
        log_interval=args.log_interval,
    )
    result = trainer.evaluate(val_loader)
    print(f"Test: accuracy {100 * result.accuracy:.2f} % loss {result.loss:.4f} ({result.samples} images)")
    for subnet in subnets:
        result = trainer.evaluate(val_loader, subnet, calibration_loader=train_loader)
        print(f"Test of depths {subnet}: accuracy {100 * result.accuracy:.2f} %")
    if output is not None:
        print(f"Written to {output}")


def _config(args: argparse.Namespace, data: Data) -> GKTConfig:
    """The method's configuration, with the flags that were given."""
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    image_size = data.train[0][0].shape[-1] if args.method == "st++" else None
    return method_config(args.method, image_size, **given)


def build_model(name: str, data: Data) -> nn.Module:
    """A network for the data by name: cifar_resnetN, a torchvision classifier, or timm:NAME.

    Raises:
        ValueError: there is no such network, or it takes other images.
    """
    if name.startswith("cifar_resnet") and name.removeprefix("cifar_resnet").isdigit():
        depth = int(name.removeprefix("cifar_resnet"))
        return models.cifar_resnet(depth, data.num_classes, in_channels=data.in_channels)
    if name.startswith("timm:"):
        import timm

        if not timm.is_model(name[5:]):
            raise ValueError(f"model is {name!r}; timm has no network of that name")
        return timm.create_model(name[5:], num_classes=data.num_classes, in_chans=data.in_channels)
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise ValueError(
            f"model is {name!r}; it must be cifar_resnetN, one of torchvision's classifiers, or timm:NAME"
        )
    if data.in_channels != 3:
        raise ValueError(
            f"model is {name!r}, which takes images of 3 channels; these have {data.in_channels}"
        )
    return torchvision.models.get_model(name, num_classes=data.num_classes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=train)
    add = parser.add_argument
    add("-c", "--config", type=Path, metavar="YAML", help="file with flags' names (underscores) and values")
    add("--data", default="digits", help="digits, imagefolder:PATH or cifar10:PATH")
    add("--train-images", type=parse_integer(1), help="digits: number of training images")
    add("--image-size", type=parse_integer(1), default=32, help="imagefolder: height and width")
    add("--model", default="cifar_resnet20", help="cifar_resnetN, a torchvision classifier, or timm:NAME")
    add("-b", "--batch-size", type=parse_integer(1), default=128)
    add("-j", "--workers", type=parse_integer(0), default=0)
    add("--epochs", type=parse_integer(0), default=20)
    add("--opt", choices=["sgd", "adamw"], default="sgd")
    add("--lr", type=parse_number(0), default=0.1)
    add("--momentum", type=parse_number(0), default=0.9)
    add("--weight-decay", type=parse_number(0), default=5e-4)
    add("--sched", choices=["cosine", "none"], default="cosine")
    add("--warmup-epochs", type=parse_integer(0), default=0)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add(
        "--device",
        type=parse_device,
        default=default_device,
        help="default: cuda if there is a GPU, else cpu",
    )
    add("--amp", action=argparse.BooleanOptionalAction, default=False)
    add("--amp-dtype", choices=[*AMP_DTYPES], default="bf16")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=False)
    add("--output", type=Path, help="folder for runs; nothing is written without it")
    add("--experiment", help="name of the run's folder")
    add("--resume", default="auto", help="auto, a checkpoint, or an empty string to start anew")
    add("--log-interval", type=parse_integer(1), default=50)
    add(
        "--evaluate-depths",
        type=parse_depths,
        nargs="+",
        metavar="D-D-D",
        help="subnets to evaluate at the end",
    )
    add(
        "--method",
        choices=[*METHODS],
        default="gkt",
        help="what the flags below start from (gkt_fast.methods)",
    )
    _add_config(parser.add_argument_group("GKT (see gkt_fast.GKTConfig); without a flag as in the method"))


def _add_config(group: argparse._ArgumentGroup) -> None:
    """One flag for every field of GKTConfig, of the same name; a flag that is not given leaves no value."""
    choices = {"sampler": [*SAMPLERS], "batch_norm": BATCH_NORM_POLICIES, "execution": EXECUTIONS}
    kinds = {"int": int, "float": float, "str": str}
    special = {
        "min_depth": parse_min_depth,
        "subnets": parse_subnets,
        "subnet_resolution": parse_resolution,
    }
    for name, field in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        else:
            kind = special.get(name) or kinds[field.type.partition(" ")[0]]  # "float | None" is float
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, choices=choices.get(name))


def with_config_file(arguments: list[str]) -> list[str]:
    """Puts the flags of a `--config` file in front of those of the command line, which win."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("-c", "--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    if path is None or arguments[:1] != ["train"]:
        return arguments
    with open(path) as file:
        values = yaml.safe_load(file) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be a mapping of flags to values")
    flags: list[str] = []
    for name, value in values.items():
        flag = str(name).replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif flag == "evaluate-depths" and isinstance(value, list):
            flags += [f"--{flag}", *map(_flag_value, value)]
        elif value is not None:
            flags.append(f"--{flag}={_flag_value(value)}")
    return ["train", *flags, *arguments[1:]]


def _flag_value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return ",".join("-".join(map(str, depths)) for depths in value)
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _evaluated_subnet(depths: tuple[int, ...], trainer: GKTTrainer) -> Subnet:
    """Before training, so that a slip doesn't show up only after it."""
    try:
        return Subnet.ordered(depths, trainer.gkt.stages)
    except ValueError as error:
        raise ValueError(f"evaluate_depths: {error}") from error


def _optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    model.to(args.device)
    if args.opt == "adamw":
        return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=args.momentum > 0
    )


def _scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if args.sched == "none":
        return None
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.epochs - args.warmup_epochs, 1))
    if not args.warmup_epochs:
        return cosine
    warmup = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1 / (args.warmup_epochs + 1), total_iters=args.warmup_epochs
    )
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[args.warmup_epochs])


def _loaders(args: argparse.Namespace, data: Data) -> tuple[DataLoader, DataLoader]:
    options = {
        "num_workers": args.workers,
        "pin_memory": args.device.startswith("cuda"),
        "worker_init_fn": _ignore_interrupt,
    }
    size = min(args.batch_size, len(data.train))  # type: ignore[arg-type]
    train_loader = DataLoader(data.train, size, shuffle=True, drop_last=True, **options)
    return train_loader, DataLoader(data.test, max(size, 256), **options)


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the loader's workers too; they must last until the trainer has finished its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
