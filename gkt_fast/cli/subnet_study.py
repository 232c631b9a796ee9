"""The subnets of a trained network: what `subnets` does."""

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
from ..deployment.evaluation import Evaluation, evaluate
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
from .arguments import chosen_device
from .parser import Parser
from .recipe import build_model
from .requirements import require
from .run_flags import add_run_arguments

__all__ = ["print_subnets"]


def print_subnets(args: argparse.Namespace) -> None:
    """Evaluates the subnets of a trained network; prints, writes and draws the table, and exports the best."""
    if args.min_accuracy is not None and args.min_accuracy > 1:
        raise ValueError(f"min_accuracy is {args.min_accuracy}; it must be between 0 and 1")
    require("subnets, which draws a picture,", "matplotlib")
    if args.export_onnx is not None:
        require("--export-onnx", "onnx", "onnxscript", "onnxruntime")
    checkpoint = _find_checkpoint(args.checkpoint)
    run = _run_arguments(checkpoint.parent, args)
    state = load_checkpoint(checkpoint)
    weights = _averaged_weights(state, checkpoint) if args.ema else state["model"]
    data = load_data(
        run.data,
        run.image_size,
        run.train_images,
        train_crop=run.train_crop,
        augment=run.augment,
        random_erasing=run.random_erasing,
    )
    model = build_model(run.model, data)
    check_model_state(model, weights, checkpoint)
    model.load_state_dict(weights)
    model.to(chosen_device(args)).eval()
    output = checkpoint.parent if args.output is None else args.output
    output.mkdir(parents=True, exist_ok=True)
    if args.export_onnx is not None:
        check_writable(args.export_onnx)
    train_loader, test_loader = _loaders(run, data)
    example = next(iter(test_loader))[0][:1]
    as_trained = evaluate(model, test_loader)
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
    _print_table(results, as_trained)
    write_subnets_csv(results, output / "subnets.csv")
    best = None
    try:
        best = best_subnet(results, budget_flops=args.budget_flops, min_accuracy=args.min_accuracy)
    finally:  # also where none qualifies: the picture shows why
        title = f"{run.model}: accuracy of subnets against their cost"
        plot_subnets(results, output / "subnets.png", title, best=best)
        print(f"Written to {output}: subnets.csv, subnets.png")
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
    parser = Parser(prog=f"gkt-fast: {path}")
    add_run_arguments(parser, defaults=True)
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
    """The state of `AveragedModel`, as that of the network itself."""
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


def _print_table(results: Sequence[SubnetResult], as_trained: Evaluation) -> None:
    front = pareto_front(results)
    width = max(len("depths"), *(len(str(result.subnet)) for result in results))
    print(f"{'depths':{width}}{'parameters':>14}{'MFLOPs':>12}{'accuracy':>12}{'loss':>10}")
    for r in sorted(results, key=lambda result: -result.flops):
        print(
            f"{r.subnet!s:{width}}{r.parameters:14,}{r.flops / 1e6:12.2f}{100 * r.accuracy:10.2f} %{r.loss:10.4f}"
            f"{'  *' if r in front else ''}"
        )
    print("* no subnet is as accurate at the same cost or less")
    full = next((str(result.subnet) for result in results if result.subnet.is_full), "not in the table")
    print(
        f"The full network ({full}) as it was trained: {100 * as_trained.accuracy:.2f} %, loss {as_trained.loss:.4f}. "
        "In the table BatchNorm's statistics are re-estimated for every network, the full one too, to compare alike"
    )
