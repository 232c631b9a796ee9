"""Takes the batches of a loader apart: what the model is called with, and the targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["INDEX_KEY", "TARGET_KEYS", "Batch", "IndexedSample", "inputs_of", "take_apart"]

TARGET_KEYS = ("labels", "label", "targets", "target")
"""Under which of its keys a batch that is a mapping may hold its targets."""

INDEX_KEY = "sample_index"
"""Under which of its keys a batch that is a mapping may hold its samples' places in the data set."""


class IndexedSample(NamedTuple):
    """A sample, or a batch of them, that tells its place in the data set.

    Args:
        inputs: what the model takes.
        targets: what the loss takes.
        indices: an integer; of a batch (B,) int64.
    """

    inputs: Any
    targets: Any
    indices: Any


@dataclass(frozen=True)
class Batch:
    """A batch.

    Args:
        inputs: what `GKT` takes: a tensor, a tuple or list of positional arguments, or a mapping (see `model_inputs`).
        targets: what the loss takes.
        indices: (B,) int64, the samples' places in the data set; None: not known.
    """

    inputs: Any
    targets: Any
    indices: Tensor | None = None


def take_apart(batch: Any) -> Batch:
    """A batch with targets: a pair (inputs, targets), an `IndexedSample`, or a mapping with its targets under one of
    `TARGET_KEYS`, and indices, if any, under `INDEX_KEY`.

    Raises:
        TypeError: it is neither.
        ValueError: the mapping has no targets, several, or nothing else.
    """
    if isinstance(batch, Mapping):
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) != 1:
            raise ValueError(
                f"a batch of the loader is a mapping with the keys {_listed(batch)}; one of them, and one alone, must "
                f"be {' or '.join(map(repr, TARGET_KEYS))}"
            )
        return Batch(_without_targets(batch), batch[keys[0]], batch.get(INDEX_KEY))
    if isinstance(batch, IndexedSample):
        return Batch(*batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return Batch(*batch)
    raise TypeError(
        f"a batch of the loader is {_described(batch)}; it must be a pair (inputs, targets) or a mapping with "
        "'labels'. Several inputs of the model are ((a, b), targets); with the samples' places in the data set a batch "
        "is a gkt_fast.data.IndexedSample"
    )


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch with or without targets: its first entry, a mapping without its targets, or itself.

    Raises:
        ValueError: a tuple without entries, or a mapping without anything but targets.
    """
    if isinstance(batch, Mapping):
        return _without_targets(batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError(
                "a batch of the loader is an empty tuple; its first entry must be the model's input"
            )
        return batch[0]
    return batch


def _without_targets(batch: Mapping[Any, Any]) -> dict[Any, Any]:
    inputs = {key: value for key, value in batch.items() if key not in (*TARGET_KEYS, INDEX_KEY)}
    if not inputs:
        raise ValueError(
            f"a batch of the loader holds {_listed(batch)} alone; the model's inputs are missing"
        )
    return inputs


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


def _described(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return (
            f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(entry).__name__ for entry in batch)})"
        )
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} alone"
    return f"of the class {type(batch).__name__}"
