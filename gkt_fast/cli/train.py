"""`python -m gkt_fast train`: its flags. What they do is in `training_run` and `recipe`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..methods import METHODS
from .arguments import (
    add_device,
    parse_depths,
    parse_integer,
    parse_number,
    parse_probability,
    parse_sizes,
)
from .config_flags import add_config

__all__ = ["add_arguments"]

AMP_DTYPES = ("bf16", "fp16")
AUGMENTATIONS = ("none", "trivial", "rand")
SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}


def train(args: argparse.Namespace) -> None:
    """Trains a network as the flags say."""
    from .training_run import train

    train(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.usage = f"{parser.prog} [flags]"
    parser.set_defaults(run=train)
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="YAML",
        help="file of flags' names and values, over which flags given here win; default: none",
    )
    _add_data(parser.add_argument_group("Data"))
    _add_training(parser.add_argument_group("Network and training"))
    _add_machine(parser.add_argument_group("Machine"))
    _add_run(parser.add_argument_group("Run: what is written, evaluated and resumed"))
    group = parser.add_argument_group(
        "GKT (gkt_fast.GKTConfig); a flag that is not given is as in the method"
    )
    group.add_argument("--method", choices=[*METHODS], default="gkt", help="what the flags below start from")
    add_config(group)


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", default="digits", help="digits, imagefolder:PATH or cifar10:PATH")
    add("--train-images", type=parse_integer(1), help="digits: number of training images; default: 200")
    add(
        "--image-size",
        type=parse_integer(1),
        default=32,
        help="imagefolder: height and width of the images; models of ImageNet want 224",
    )
    add(
        "--train-crop",
        type=parse_integer(1),
        metavar="SIZE",
        help="height and width of the training images, where they differ; default: as --image-size",
    )
    add(
        "--multi-scale",
        type=parse_sizes,
        metavar="S,S,...",
        help="sizes of which every batch is resized to one, for the full network and its subnets; default: none",
    )
    add(
        "--augment", choices=AUGMENTATIONS, default="none", help="torchvision's TrivialAugment or RandAugment"
    )
    add(
        "--random-erasing",
        type=parse_probability,
        default=0.0,
        metavar="P",
        help="probability of torchvision's RandomErasing",
    )
    add(
        "--mixup",
        type=parse_number(0),
        default=0,
        metavar="ALPHA",
        help="mixes images and targets of a batch; 0 doesn't",
    )
    add(
        "--cutmix",
        type=parse_number(0),
        default=0,
        metavar="ALPHA",
        help="the same by patches of images; 0 doesn't",
    )
    add("-b", "--batch-size", type=parse_integer(1), default=128, help="images of a batch in each process")
    add("-j", "--workers", type=parse_integer(0), default=0, help="processes that load images; 0: this one")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", default="cifar_resnet20", help="cifar_resnetN, a torchvision classifier, or timm:NAME")
    add(
        "--initial-checkpoint",
        type=Path,
        metavar="PATH",
        help="start from these weights: a checkpoint of train, or a state_dict, also as .safetensors; a head for "
        "other classes starts anew; default: random weights",
    )
    add("--pretrained", **SWITCH, help="start from timm's weights (--model timm:NAME)")
    add(
        "--trunk-lr-factor",
        type=parse_number(0),
        default=1.0,
        help="times --lr is the learning rate of all but the head, which is what comes after the last block",
    )
    add("--epochs", type=parse_integer(0), default=20, help="epochs in all, those of a resumed run included")
    add("--opt", choices=["sgd", "adamw"], default="sgd", help="optimizer; sgd has Nesterov's momentum")
    add("--lr", type=parse_number(0), default=0.05, help="learning rate after the warm-up")
    add("--momentum", type=parse_number(0), default=0.9, help="of sgd")
    add("--weight-decay", type=parse_number(0), default=5e-4, help="of the optimizer, on all parameters")
    add(
        "--sched", choices=["cosine", "none"], default="cosine", help="how the learning rate falls, by epochs"
    )
    add(
        "--warmup-epochs",
        type=parse_integer(0),
        help="epochs in which the learning rate rises; default: a quarter of all, at most 5",
    )
    add("--accumulate", type=parse_integer(1), default=1, help="batches of an optimizer step")
    add(
        "--clip-grad-norm",
        type=parse_number(0),
        metavar="NORM",
        help="largest norm of all gradients together; default: no limit",
    )
    add(
        "--ema-decay",
        type=parse_number(0),
        metavar="DECAY",
        help="of an average of the weights, which is evaluated too; default: none",
    )
    add("--kd-warmup-epochs", type=parse_integer(0), default=0, help="epochs in which kd_weight grows from 0")
    add(
        "--normalize-ce",
        **SWITCH,
        help="cross entropy of logits standardised over classes, as the code of ST++",
    )
    add("--skip-nonfinite", **SWITCH, help="take steps with NaN or infinite losses or gradients back")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add_device(group)
    add("--amp", **SWITCH, help="mixed precision")
    add("--amp-dtype", choices=AMP_DTYPES, default="bf16", help="of mixed precision; fp16 scales the loss")
    add("--channels-last", **SWITCH, help="memory format in which convolutions are often faster")
    add("--sync-bn", **SWITCH, help="torchrun, GPU: BatchNorm statistics over the batches of all processes")
    add("--compile-blocks", **SWITCH, help="compile the residual blocks by torch.compile")
    add("--deterministic", **SWITCH, help="deterministic algorithms only")
    add(
        "--timeout",
        type=parse_number(1),
        default=600,
        metavar="SECONDS",
        help="torchrun: how long to wait for another process",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", type=Path, help="folder for runs; default: nothing is written")
    add("--experiment", help="name of the run's folder; default: MODEL-METHOD")
    add(
        "--resume",
        default="auto",
        help="auto (the run's own last.pt), a checkpoint, or an empty string: anew",
    )
    add(
        "--calibrate-full",
        **SWITCH,
        help="evaluate the full network with BatchNorm statistics re-estimated on training images",
    )
    add(
        "--track-depths",
        type=parse_depths,
        nargs="+",
        metavar="D-D-D",
        help="subnets to evaluate after every epoch, with BatchNorm statistics of their own; default: none",
    )
    add(
        "--evaluate-depths",
        type=parse_depths,
        nargs="+",
        metavar="D-D-D",
        help="subnets to evaluate at the end; default: none",
    )
    add("--log-interval", type=parse_integer(1), default=50, help="steps between two readings of the losses")
    add(
        "--log",
        "--loggers",  # torchrun takes --log, even behind the script's name, for an abbreviation of its own flags
        choices=["tensorboard", "wandb"],
        nargs="+",
        default=[],
        help="where to log to beside summary.csv; under torchrun --loggers",
    )
    add("--wandb-project", default="gkt_fast", metavar="NAME", help="wandb: the project that runs go to")
