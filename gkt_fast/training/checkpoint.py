"""Checkpoints: written atomically, read without executing code, complete enough to go on exactly."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..network.state_dicts import describe_misfit

__all__ = [
    "CheckpointError",
    "check_model_state",
    "load_checkpoint",
    "remove_temporary_files",
    "save_checkpoint",
]

FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint can't be read, or doesn't fit; nothing was changed."""


def save_checkpoint(path: str | Path, state: dict[str, Any], copy_to: str | Path | None = None) -> None:
    """Writes `state` to a temporary file in the same folder, then renames it: a reader never sees half a file.

    Args:
        path: where to.
        state: tensors and plain Python values.
        copy_to: a second name for the same checkpoint, made without writing it twice where the file system can.

    Raises:
        CheckpointError: it can't be written, for example on a full disk; what was at `path` is still there.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if copy_to is not None:
            _link(temporary, Path(copy_to))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):
            raise  # of the state; torch reports a failed write as a RuntimeError, after the OSError
        reason = error if isinstance(error, OSError) else error.__context__
        raise CheckpointError(f"{path} can't be written ({reason}); an earlier checkpoint is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporary_files(folder: Path) -> None:
    """Removes what a process that was killed while it wrote a checkpoint left behind."""
    for path in folder.glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    link = _temporary(target)
    link.unlink(missing_ok=True)
    try:
        try:
            os.link(source, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, link)
        os.replace(link, target)
    finally:
        link.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, with `weights_only=True`: loading never executes code.

    Raises:
        CheckpointError: there is no file, it is cut off or damaged, or it is not a checkpoint of this package.
    """
    try:
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
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        if isinstance(state, dict) and found is None:
            names = ", ".join(map(str, [*state][:6]))
            raise CheckpointError(
                f"{path} is not a gkt_fast checkpoint: other code wrote it (it holds {names}). "
                "Those of the Stimulative Training code can't be loaded, since its networks have layers of their own"
            )
        raise CheckpointError(f"{path} is not a gkt_fast checkpoint of format {FORMAT} (found {found!r})")
    return state


def check_model_state(model: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """Checks that a model's state fits, before anything is loaded.

    Raises:
        CheckpointError: names or shapes differ; the message lists the first of them.
    """
    misfit = describe_misfit(model, state)
    if misfit:
        raise CheckpointError(f"{path} is of another model than {type(model).__name__}: {misfit}")
