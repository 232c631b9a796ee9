"""A run that `train` has finished: its checkpoint, network and images, for the commands that go on from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import GKTConfig
from ..data import Data, load_data
from ..gkt import GKT
from ..training.checkpoint import CheckpointError, check_model_state, load_checkpoint
from .arguments import chosen_device
from .parser import Parser
from .recipe import build_model
from .run_flags import add_run_arguments

__all__ = ["TrainedRun", "open_run"]


@dataclass(frozen=True)
class TrainedRun:
    """What `train` left behind.

    Args:
        checkpoint: the file.
        flags: those of `train` that say which network and which images.
        state: the checkpoint's content.
        data: the images.
        model: the network with its trained weights, on the device, in evaluation mode.
        train_loader: training images, shuffled the same way each time.
        test_loader: test images.
    """

    checkpoint: Path
    flags: argparse.Namespace
    state: dict[str, Any]
    data: Data
    model: nn.Module
    train_loader: DataLoader
    test_loader: DataLoader

    def example(self) -> Tensor:
        """An image, as a batch of one."""
        return next(iter(self.test_loader))[0][:1]

    def announce(self, work: str) -> None:
        """Says what begins, which can take minutes."""
        print(
            f"{work} of {self.flags.model}, {self.checkpoint}, on {len(self.data.test)} test images",  # type: ignore[arg-type]
            flush=True,
        )

    def trained_depth(self) -> int | Sequence[int]:
        """The smallest depths that were trained: those of the configuration, or as solved for its budget."""
        gkt = GKT(self.model, GKTConfig.from_dict(self.state["config"]).replace(fuse_blocks=False))
        gkt.set_extra_state(self.state["gkt"])
        gkt.layers(self.example())
        return gkt.sampling_config().min_depth


def open_run(args: argparse.Namespace) -> TrainedRun:
    """Loads what the flags name.

    Raises:
        CheckpointError: the checkpoint can't be read, is of another network, or holds no averaged weights.
    """
    checkpoint = _find_checkpoint(args.checkpoint)
    flags = _run_arguments(checkpoint.parent, args)
    state = load_checkpoint(checkpoint)
    weights = _averaged_weights(state, checkpoint) if args.ema else state["model"]
    data = load_data(
        flags.data,
        flags.image_size,
        flags.train_images,
        train_crop=flags.train_crop,
        augment=flags.augment,
        random_erasing=flags.random_erasing,
    )
    model = build_model(flags.model, data)
    check_model_state(model, weights, checkpoint)
    model.load_state_dict(weights)
    model.to(chosen_device(args)).eval()
    return TrainedRun(checkpoint, flags, state, data, model, *_loaders(flags, data))


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


def _loaders(run: argparse.Namespace, data: Data) -> tuple[DataLoader, DataLoader]:
    size = min(run.batch_size, len(data.train))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    train_loader = DataLoader(data.train, size, shuffle=True, num_workers=run.workers, generator=generator)
    return train_loader, DataLoader(data.test, max(size, 256), num_workers=run.workers)
