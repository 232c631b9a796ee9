"""`python -m gkt_fast train`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..config import BATCH_NORM_POLICIES, EXECUTIONS, current_policy
from ..data import load_data
from ..distributed import is_distributed, rank, torchrun_process_group
from ..methods import METHODS
from ..subnets.sampling import SAMPLERS
from ..training.placement import AMP_DTYPES
from ..training.schedules import LinearWarmup
from ..training.trainer import GKTTrainer
from ..training.validation import named_subnet
from .arguments import (
    parse_depths,
    parse_device,
    parse_integer,
    parse_min_depth,
    parse_number,
    parse_resolution,
    parse_subnets,
)
from .config_file import write_arguments
from .recipe import (
    CONFIG_FIELDS,
    build_config,
    build_loaders,
    build_loggers,
    build_model,
    build_optimizer,
    build_scheduler,
    synchronized,
)

__all__ = ["add_arguments", "train"]


def train(args: argparse.Namespace) -> None:
    """Trains and evaluates a network as the flags say, as one of several processes under torchrun."""
    with torchrun_process_group(args.device, args.timeout) as device:
        _train(argparse.Namespace(**vars(args) | {"device": str(device)}), args)


def _train(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Trains in this process.

    Args:
        args: the flags, with this process's own device.
        given: the flags as they were given, for `args.yaml`.
    """
    torch.manual_seed(args.seed)
    data = load_data(args.data, args.image_size, args.train_images)
    model = synchronized(args, build_model(args.model, data))
    optimizer = build_optimizer(args, model)
    train_loader, val_loader, calibration_loader = build_loaders(args, data)
    steps_per_epoch = -(-len(train_loader) // args.accumulate)
    trainer = GKTTrainer(
        model,
        optimizer,
        build_config(args, data),
        scheduler=build_scheduler(args, optimizer),
        device=args.device,
        amp=args.amp_dtype if args.amp else None,
        channels_last=args.channels_last,
        accumulate=args.accumulate,
        clip_grad_norm=args.clip_grad_norm,
        ema_decay=args.ema_decay,
        kd_schedule=LinearWarmup(args.kd_warmup_epochs * steps_per_epoch) if args.kd_warmup_epochs else None,
        skip_nonfinite=args.skip_nonfinite,
        compile_blocks=args.compile_blocks,
        deterministic=args.deterministic,
    )
    # Before training, so that a slip doesn't show up only after it.
    subnets = [
        named_subnet("evaluate_depths", depths, trainer.gkt.stages) for depths in args.evaluate_depths or ()
    ]
    if is_distributed():
        torch.manual_seed(args.seed + rank())  # the ranks' noise differs
    output = None if args.output is None else args.output / (args.experiment or f"{args.model}-{args.method}")
    loggers = build_loggers(args, output)
    if output is not None and rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_arguments(given, trainer.config, output / "args.yaml")
    resume: bool | Path = True if args.resume == "auto" else False if args.resume == "" else Path(args.resume)
    trainer.fit(
        train_loader,
        epochs=args.epochs,
        val_loader=val_loader,
        val_depths=args.track_depths or (),
        calibration_loader=calibration_loader,
        output_dir=output,
        resume=resume,
        log_interval=args.log_interval,
        loggers=loggers,
    )
    result = trainer.evaluate(val_loader)
    _print(f"Test: accuracy {100 * result.accuracy:.2f} % loss {result.loss:.4f} ({result.samples} images)")
    if trainer.ema_model is not None:
        result = trainer.evaluate(val_loader, ema=True)
        _print(f"Test of averaged weights: accuracy {100 * result.accuracy:.2f} % loss {result.loss:.4f}")
    for subnet in subnets:
        result = trainer.evaluate(val_loader, subnet, calibration_loader=calibration_loader)
        _print(f"Test of depths {subnet}: accuracy {100 * result.accuracy:.2f} %")
    if output is not None:
        _print(f"Written to {output}")


def _print(line: str) -> None:
    if rank() == 0:
        print(line)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.set_defaults(run=train)
    add = parser.add_argument
    add(
        "-c", "--config", type=Path, metavar="YAML", help="file of flags' names, with underscores, and values"
    )
    add("--data", default="digits", help="digits, imagefolder:PATH or cifar10:PATH")
    add("--train-images", type=parse_integer(1), help="digits: number of training images")
    add("--image-size", type=parse_integer(1), default=32, help="imagefolder: height and width")
    add("--model", default="cifar_resnet20", help="cifar_resnetN, a torchvision classifier, or timm:NAME")
    add("-b", "--batch-size", type=parse_integer(1), default=128, help="images per process")
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
    add(
        "--sync-bn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torchrun, GPU: BatchNorm statistics over the batches of all processes",
    )
    add("--timeout", type=parse_number(1), default=600, help="torchrun: seconds to wait for another process")
    add("--accumulate", type=parse_integer(1), default=1, help="batches of an optimizer step")
    add("--clip-grad-norm", type=parse_number(0), help="largest norm of all gradients together")
    add("--ema-decay", type=parse_number(0), help="of an average of the weights, which is evaluated too")
    add(
        "--mixup",
        type=parse_number(0),
        default=0,
        metavar="ALPHA",
        help="mixes images and targets of a batch",
    )
    add("--cutmix", type=parse_number(0), default=0, metavar="ALPHA", help="the same by patches of images")
    add("--kd-warmup-epochs", type=parse_integer(0), default=0, help="epochs in which kd_weight grows from 0")
    flag = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--skip-nonfinite", **flag, help="take steps with NaN or infinite losses or gradients back")
    add("--compile-blocks", **flag, help="compile the residual blocks by torch.compile")
    add("--deterministic", **flag, help="deterministic algorithms only")
    add("--output", type=Path, help="folder for runs; without it nothing is written")
    add("--experiment", help="name of the run's folder")
    add("--resume", default="auto", help="auto, a checkpoint, or an empty string to start anew")
    add("--log-interval", type=parse_integer(1), default=50)
    add(
        "--log",
        "--loggers",  # torchrun takes --log, even behind the script's name, for an abbreviation of its own flags
        choices=["tensorboard", "wandb"],
        nargs="+",
        default=[],
        help="beside summary.csv; under torchrun --loggers",
    )
    add("--wandb-project", default="gkt_fast")
    add(
        "--track-depths",
        type=parse_depths,
        nargs="+",
        metavar="D-D-D",
        help="subnets to evaluate after every epoch, with BatchNorm statistics of their own",
    )
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
    """Adds a flag of the same name for every field of GKTConfig. Without the flag the namespace has no such entry."""
    choices = {"sampler": [*SAMPLERS], "batch_norm": BATCH_NORM_POLICIES, "execution": EXECUTIONS}
    kinds = {"int": int, "float": float, "str": str}
    special = {
        "batch_norm": current_policy,
        "min_depth": parse_min_depth,
        "subnets": parse_subnets,
        "subnet_resolution": parse_resolution,
    }
    for name, field in CONFIG_FIELDS.items():
        flag = "--" + name.replace("_", "-")
        default = field.default if name == "seed" else argparse.SUPPRESS
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            kind = special.get(name) or kinds[field.type.partition(" ")[0]]  # "float | None" is float
            group.add_argument(flag, type=kind, default=default, choices=choices.get(name))
