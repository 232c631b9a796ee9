"""`python -m gkt_fast subnets`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import GKTConfig
from ..data import Data, load_data
from ..deployment.calibration import recalibrate_batch_norm
from ..deployment.export import check_writable, export_onnx
from ..deployment.extraction import extract_subnet
from ..deployment.subnet_table import (
    SubnetResult,
    best_subnet,
    evaluate_subnets,
    pareto_front,
    plot_subnets,
    write_subnets_csv,
)
from ..gkt import GKT
from ..training.checkpoint import CheckpointError, check_model_state, load_checkpoint
from . import train
from .arguments import parse_device, parse_integer, parse_min_depth, parse_number
from .recipe import build_model

__all__ = ["add_arguments", "print_subnets"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.set_defaults(run=print_subnets)
    add = parser.add_argument
    add("checkpoint", type=Path, help="written by train; of a folder its best.pt, or else last.pt")
    _add_run_arguments(
        parser.add_argument_group("Flags of train; by default as in args.yaml beside the checkpoint")
    )
    add("--ema", action="store_true", help="take the averaged weights (train --ema-decay)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add(
        "--device",
        type=parse_device,
        default=default_device,
        help="default: cuda if there is a GPU, else cpu",
    )
    add("--min-depth", type=parse_min_depth, help="smallest depth of a stage, or D-D-D; default: as trained")
    add(
        "--max-subnets",
        type=parse_integer(1),
        default=64,
        help="how many to evaluate (gkt_fast.choose_subnets)",
    )
    add(
        "--calibration-samples",
        type=parse_integer(1),
        default=2000,
        help="training images that give each subnet its BatchNorm statistics",
    )
    add("--output", type=Path, help="folder for subnets.csv and subnets.png; default: the checkpoint's")
    add(
        "--budget-flops",
        type=parse_number(0),
        help="the best subnet takes at most so many FLOPs for a sample",
    )
    add("--min-accuracy", type=parse_number(0), help="the best subnet is at least so accurate, 0 to 1")
    add("--export-onnx", type=Path, metavar="PATH", help="write the best subnet as ONNX")


def _add_run_arguments(parser: Any, defaults: bool = False) -> None:
    """Adds the flags of `train` that say which network and which images.

    Args:
        parser: an argument parser, or a group of one.
        defaults: whether flags that are not given take the defaults of `train`; otherwise they are left out.
    """
    of_train = argparse.ArgumentParser()
    train.add_arguments(of_train)

    def add(*flags: str, **options: Any) -> None:
        name = flags[-1].removeprefix("--").replace("-", "_")
        parser.add_argument(
            *flags, default=of_train.get_default(name) if defaults else argparse.SUPPRESS, **options
        )

    add("--model")
    add("--data")
    add("--train-images", type=parse_integer(1))
    add("--image-size", type=parse_integer(1))
    add("-b", "--batch-size", type=parse_integer(1))
    add("-j", "--workers", type=parse_integer(0))


def print_subnets(args: argparse.Namespace) -> None:
    """Evaluates the subnets of a trained network; prints, writes and draws the table, and exports the best."""
    if args.min_accuracy is not None and args.min_accuracy > 1:
        raise ValueError(f"min_accuracy is {args.min_accuracy}; it must be between 0 and 1")
    checkpoint = _find_checkpoint(args.checkpoint)
    run = _run_arguments(checkpoint.parent, args)
    state = load_checkpoint(checkpoint)
    weights = _averaged_weights(state, checkpoint) if args.ema else state["model"]
    data = load_data(run.data, run.image_size, run.train_images)
    model = build_model(run.model, data)
    check_model_state(model, weights, checkpoint)
    model.load_state_dict(weights)
    model.to(args.device).eval()
    output = checkpoint.parent if args.output is None else args.output
    output.mkdir(parents=True, exist_ok=True)
    if args.export_onnx is not None:
        check_writable(args.export_onnx)
    train_loader, test_loader = _loaders(run, data)
    example = next(iter(test_loader))[0][:1]
    results = evaluate_subnets(
        model,
        test_loader,
        min_depth=_trained_depth(model, state, example) if args.min_depth is None else args.min_depth,
        max_subnets=args.max_subnets,
        calibration_loader=train_loader,
        calibration_samples=args.calibration_samples,
        progress=True,
    )
    print(f"{run.model}, {checkpoint}, {len(data.test)} images")  # type: ignore[arg-type]
    _print_table(results)
    write_subnets_csv(results, output / "subnets.csv")
    plot_subnets(
        results, output / "subnets.png", title=f"{run.model}: accuracy of subnets against their cost"
    )
    print(f"Written to {output}: subnets.csv, subnets.png")
    best = best_subnet(results, budget_flops=args.budget_flops, min_accuracy=args.min_accuracy)
    print(f"Best: depths {best.subnet}, accuracy {100 * best.accuracy:.2f} %, {best.flops / 1e6:.2f} MFLOPs")
    if args.export_onnx is not None:
        network = extract_subnet(model, best.subnet)
        recalibrate_batch_norm(network, train_loader, args.calibration_samples)
        export_onnx(network, args.export_onnx, inputs=example)
        print(f"Written to {args.export_onnx}")


def _find_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        return path
    best = path / "best.pt"
    return best if best.exists() else path / "last.pt"


def _run_arguments(folder: Path, args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the run: those given here, else those in its args.yaml, else the defaults of `train`."""
    path = folder / "args.yaml"
    parser = argparse.ArgumentParser(prog=f"gkt-fast: {path}", usage=argparse.SUPPRESS)
    _add_run_arguments(parser, defaults=True)
    names = vars(parser.parse_args([]))
    values = yaml.safe_load(path.read_text()) or {} if path.exists() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be a mapping of flags to values")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    run = parser.parse_args(
        [f"--{name.replace('_', '-')}={values[name]}" for name in names if values.get(name) is not None]
    )
    given = {name: value for name, value in vars(args).items() if name in names}
    return argparse.Namespace(**(vars(run) | given))


def _averaged_weights(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The averaged weights under the network's own names, without the prefix of torch's `AveragedModel`."""
    if state["ema"] is None:
        raise CheckpointError(f"{checkpoint} holds no averaged weights; train writes them with --ema-decay")
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in state["ema"].items() if key.startswith(prefix)}


def _trained_depth(model: nn.Module, state: dict[str, Any], images: Tensor) -> int | Sequence[int]:
    """The smallest depths that were trained: those of the configuration, or as solved for its budget."""
    gkt = GKT(model, GKTConfig.from_dict(state["config"]).replace(fuse_blocks=False))
    gkt.set_extra_state(state["gkt"])
    gkt.layers(images)
    return gkt.sampling_config().min_depth


def _loaders(run: argparse.Namespace, data: Data) -> tuple[DataLoader, DataLoader]:
    size = min(run.batch_size, len(data.train))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    train_loader = DataLoader(data.train, size, shuffle=True, num_workers=run.workers, generator=generator)
    return train_loader, DataLoader(data.test, max(size, 256), num_workers=run.workers)


def _print_table(results: Sequence[SubnetResult]) -> None:
    front = pareto_front(results)
    width = max(len("depths"), *(len(str(result.subnet)) for result in results))
    print(f"{'depths':{width}}{'parameters':>14}{'MFLOPs':>12}{'accuracy':>12}{'loss':>10}")
    for r in sorted(results, key=lambda result: -result.flops):
        print(
            f"{r.subnet!s:{width}}{r.parameters:14,}{r.flops / 1e6:12.2f}{100 * r.accuracy:10.2f} %{r.loss:10.4f}"
            f"{'  *' if r in front else ''}"
        )
    print("* no subnet is as accurate at the same cost or less")
