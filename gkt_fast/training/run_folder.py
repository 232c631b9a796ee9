"""The folder of a training run: its checkpoints and its configuration."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..config import GKTConfig
from ..distributed import rank
from .checkpoint import remove_temporary_files, save_checkpoint
from .loggers import CsvLogger
from .nonfinite import check_network
from .state import TrainingState

__all__ = ["RunFolder"]


class RunFolder:
    """Holds `last.pt`, `best.pt`, `summary.csv` and `config.yaml`. Rank 0 alone writes.

    Args:
        path: the folder; None: nothing is written.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)

    def checkpoint(self, resume: bool | str | Path) -> Path | None:
        """Where to go on from. Nothing is written yet: a run that is refused leaves the folder as it was.

        Args:
            resume: as of `GKTTrainer.fit`.

        Returns:
            The checkpoint to go on from; None: there is none, or training starts anew.
        """
        if isinstance(resume, (str, Path)):
            return Path(resume)
        if not resume or self.path is None:
            return None
        last = self.path / "last.pt"
        return last if last.exists() else None

    def open(self, config: GKTConfig) -> None:
        """Makes the folder, removes what a run that was killed left half written, and writes the hyper-parameters."""
        if self.path is not None and rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_temporary_files(self.path)
            (self.path / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))

    def summary(self, first_epoch: int) -> list[CsvLogger]:
        """The logger that writes `summary.csv`, if anything is written.

        Args:
            first_epoch: first epoch that it will log.
        """
        return [] if self.path is None else [CsvLogger(self.path / "summary.csv", first_epoch)]

    def save(self, state: TrainingState, best: bool) -> Path | None:
        """Writes `last.pt`, and `best.pt` too if this state is the best. Every rank must call it.

        Returns:
            Where `last.pt` is; None: nothing is written.

        Raises:
            NonFiniteLossError: the network holds NaN or infinity; the earlier checkpoints stay.
            CheckpointError: the file can't be written; the earlier checkpoints stay.
        """
        if self.path is None:
            return None
        check_network(state)
        saved, last = state.state_dict(), self.path / "last.pt"
        if rank() == 0:
            save_checkpoint(last, saved, copy_to=self.path / "best.pt" if best else None)
        return last
