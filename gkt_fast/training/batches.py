"""The batches of an epoch, and where in it training stands: what an exact resume needs to know of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..distributed import gather, rank, world_size
from .random_state import get_random_state, set_random_state

__all__ = ["DataLoadingError", "EpochBatches", "dead_workers_named"]


class DataLoadingError(RuntimeError):
    """A process that loads data died. Training goes on from the last checkpoint."""


@contextmanager
def dead_workers_named(batches: EpochBatches) -> Iterator[None]:
    """Inside, the death of one of the DataLoader's worker processes raises a `DataLoadingError` that says where.

    torch hears of the death by a signal, so its own error may come out of any statement, not only out of the loader.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataLoadingError(
            f"{str(error).splitlines()[0].rstrip(' .')}, at batch {batches.done + 1} of epoch {batches.epoch + 1}; "
            "training can go on from the last checkpoint"
        ) from error


class EpochBatches:
    """Hands out the batches of one epoch after another; can stop in the middle of an epoch and go on exactly.

    Attributes:
        epoch: epochs finished.
        done: batches of the current epoch that were trained on (`end_batch` counts them).
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.done = 0
        self._loader: Iterable[tuple[Tensor, Tensor]] = ()
        self._generator: torch.Generator | None = None
        self._samples_per_batch: int | None = None
        self._epoch_random_state: dict[str, Any] | None = None

    def attach(self, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Sets the loader. It must be set before a checkpoint is loaded, since its generator is part of the state."""
        self._loader = loader
        self._generator = getattr(loader, "generator", None)

    def begin(self) -> None:
        """Call it once a checkpoint, if any, was loaded.

        If the epoch was begun with batches of another size or on another number of ranks, the place in it is converted
        to batches of this loader.
        """
        size = getattr(self._loader, "batch_size", None)
        now = None if size is None else size * world_size()
        if self._samples_per_batch and now:
            self.done = self.done * self._samples_per_batch // now
        self._samples_per_batch = now

    def length(self) -> int | None:
        """Batches in an epoch; None: the loader has no length."""
        try:
            return len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return None

    def rest(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch that are left: all of them, or after a resume those not yet trained on."""
        sampler = getattr(self._loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        if self.done == 0:
            self._epoch_random_state = self._random_state()
            return iter(self._loader)
        now = self._random_state()
        self._set_random_state(self._epoch_random_state)
        batches = iter(self._loader)
        for _ in range(self.done):
            next(batches)
        self._set_random_state(now)
        return batches

    def end_batch(self) -> None:
        """One more batch was trained on."""
        self.done += 1

    def end_epoch(self) -> None:
        """The next epoch begins with its first batch."""
        self.epoch += 1
        self.done = 0

    def _random_state(self) -> dict[str, Any]:
        generator = self._generator
        return {**get_random_state(), "loader": None if generator is None else generator.get_state()}

    def _set_random_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        set_random_state(state)
        if self._generator is not None and state["loader"] is not None:
            self._generator.set_state(state["loader"])

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch and the random states of all ranks. Every rank must call it."""
        states = gather((self._random_state(), self._epoch_random_state))
        return {
            "epoch": self.epoch,
            "batches_done": self.done,
            "samples_per_batch": self._samples_per_batch,
            "random_states": [state for state, _ in states],
            "epoch_random_states": [state for _, state in states],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; a rank that the checkpoint doesn't know keeps its own random state."""
        self.epoch = state["epoch"]
        self.done = state["batches_done"]
        self._samples_per_batch = state["samples_per_batch"]
        if rank() < len(state["random_states"]):
            self._epoch_random_state = state["epoch_random_states"][rank()]
            self._set_random_state(state["random_states"][rank()])
        else:
            self._epoch_random_state = self._random_state()
