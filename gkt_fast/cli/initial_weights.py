"""Where training starts: weights of an earlier training, and a lower learning rate for what has learnt already."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data
from ..network.discovery import find_stages
from ..network.interception import find_sites
from ..training.checkpoint import CheckpointError

__all__ = ["load_initial_weights", "parameter_groups"]


def load_initial_weights(args: argparse.Namespace, data: Data, model: nn.Module) -> list[str]:
    """Gives a freshly built network the weights that the flags name. Returns what starts anew, by parameter.

    Raises:
        ValueError: both flags are given, or --pretrained with a network that isn't timm's.
        CheckpointError: the file can't be read, or is of another network.
    """
    if args.pretrained and args.initial_checkpoint is not None:
        raise ValueError("pretrained and initial_checkpoint are both given; give one of them")
    if args.pretrained:
        if not args.model.startswith("timm:"):
            raise ValueError(f"pretrained is given with model {args.model!r}; it takes timm:NAME")
        import timm

        name = args.model.removeprefix("timm:")
        loaded = timm.create_model(
            name, pretrained=True, num_classes=data.num_classes, in_chans=data.in_channels
        )
        model.load_state_dict(loaded.state_dict())
        return []
    if args.initial_checkpoint is None:
        return []
    state = _weights(args.initial_checkpoint)
    own = model.state_dict()
    head = _head_paths(model)
    missing = [key for key in own if key not in state]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    anew = [key for key in (*missing, *shapes) if _is_in(key, head)]
    unknown = [key for key in state if key not in own and not _is_in(key, head)]
    wrong = [*(key for key in (*missing, *shapes) if key not in anew), *unknown]
    if wrong:
        raise CheckpointError(
            f"{args.initial_checkpoint} is of another network than {args.model}: {len(wrong)} tensors are missing, of "
            f"another shape or not the network's ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})"
        )
    model.load_state_dict({key: state[key] for key in own if key not in anew}, strict=False)
    return anew


def parameter_groups(args: argparse.Namespace, model: nn.Module) -> list[dict[str, Any]] | list[nn.Parameter]:
    """The network's parameters; in two groups where the trunk has a learning rate of its own."""
    if args.trunk_lr_factor == 1:
        return list(model.parameters())
    paths = _head_paths(model)
    head = [p for name, p in model.named_parameters() if _is_in(name, paths)]
    trunk = [p for name, p in model.named_parameters() if not _is_in(name, paths)]
    groups = [{"params": trunk, "lr": args.lr * args.trunk_lr_factor}, {"params": head, "lr": args.lr}]
    return [group for group in groups if group["params"]]


def _head_paths(model: nn.Module) -> list[str]:
    sites = find_sites(model, find_stages(model))
    last = max(i for i, site in enumerate(sites) if site.is_block)
    return [site.path for site in sites[last + 1 :]]


def _is_in(key: str, paths: Sequence[str]) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of `train`, or of a file that holds a state_dict; loading runs no code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}") from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        KeyError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} can't be read; it may be cut off or damaged ({reason})") from error
    for name in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict of a network")
    return state
