"""The loop over epochs and batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..distributed import any_rank, is_distributed, world_size
from ..gkt import GKTOutput
from ..network.batch import take_apart
from ..network.inputs import rows_in
from .batches import dead_workers_named
from .callbacks import Callbacks
from .interruption import Interruption, deferred_interrupt
from .loggers import Reports
from .nonfinite import LossCheck
from .run_folder import RunFolder
from .state import TrainingState
from .validation import Validation

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Moves a `TrainingState` on, batch by batch and epoch by epoch, and tells those who want to know.

    Args:
        state: where training stands; `begin` was called.
        step: trains on a batch, as `GKTTrainer.step` does.
        finish_step: completes a step with fewer batches than planned, as `GKTTrainer.finish_step` does.
        epochs: epochs in all, those that are finished included.
        validation: evaluates after every epoch.
        folder: where checkpoints are written.
        reports: get the metrics.
        callbacks: are called as the run goes.
        log_interval: steps between two readings of the metrics from the device.
    """

    def __init__(
        self,
        state: TrainingState,
        step: Callable[..., GKTOutput],
        finish_step: Callable[[], None],
        *,
        epochs: int,
        validation: Validation,
        folder: RunFolder,
        reports: Reports,
        callbacks: Callbacks,
        log_interval: int,
    ) -> None:
        self._state = state
        self._step = step
        self._finish_step = finish_step
        self._epochs = epochs
        self._validation = validation
        self._folder = folder
        self._reports = reports
        self._callbacks = callbacks
        self._log_interval = log_interval
        self._batches_per_epoch = state.batches.length()
        self._losses = LossCheck(state)
        self._interruption = Interruption()

    def run(self) -> list[dict[str, float]]:
        """Trains; returns the metrics of every epoch."""
        state, history = self._state, []
        try:
            self._callbacks.tell("on_fit_start")
            with deferred_interrupt() as self._interruption, dead_workers_named(state.batches):
                while state.epoch < self._epochs:
                    metrics = self._train_epoch() | self._validation.metrics()
                    self._callbacks.tell("on_epoch_end", metrics)
                    self._save(best=state.end_epoch(metrics))
                    self._reports.end_epoch(metrics)
                    history.append(metrics)
                    if is_distributed() and self._stops(True):
                        raise KeyboardInterrupt
        finally:
            self._reports.close()
            self._callbacks.tell("on_fit_end")
        return history

    def _train_epoch(self) -> dict[str, float]:
        """Trains on the epoch's batches, or on those that are left of it; returns the metrics of training."""
        state = self._state
        started = time.perf_counter()
        self._reports.begin_epoch(state.epoch, state.batches.done)
        self._callbacks.tell("on_epoch_start")
        samples = self._train_batches()
        if state.batches.done == 0:
            raise ValueError("train_loader gave no batch")
        if state.optimization.batches:
            self._complete_last_step()
        self._losses.read()
        learning_rate = state.optimization.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - started
        metrics: dict[str, Any] = {
            "epoch": state.epoch,
            "step": state.step,
            **state.metrics.means(),
            "lr": learning_rate,
            "seconds": seconds,
            "images_per_second": samples * world_size() / seconds,
        }
        if state.optimization.skip_nonfinite:
            metrics["skipped_steps"] = self._losses.skipped
        return metrics

    def _train_batches(self) -> int:
        """Trains on each batch; returns the number of samples."""
        state, batches, optimization = self._state, self._state.batches, self._state.optimization
        samples = 0
        for whole in batches.rest():
            batch = take_apart(whole)
            given = {} if batch.indices is None else {"indices": batch.indices}
            output = self._step(batch.inputs, batch.targets, **given, **self._update_option())
            state.end_batch(output)
            self._callbacks.tell("on_step_end", output)
            samples += rows_in(batch.inputs) or 0
            between_steps = not optimization.batches
            read = between_steps and batches.done // optimization.accumulate % self._log_interval == 0
            if read:
                self._losses.read()
            self._reports.update(batches.done, state.metrics.means().items() if read else None)
            if between_steps and self._stops(read):
                self._losses.read()
                self._save(best=False)
                raise KeyboardInterrupt
        return samples

    def _update_option(self) -> dict[str, bool]:
        """Tells `step` to complete the optimizer step with the epoch's last batch."""
        optimization = self._state.optimization
        if optimization.accumulate == 1 or self._batches_per_epoch is None:
            return {}
        last = self._state.batches.done + 1 == self._batches_per_epoch
        return {"update": last or optimization.is_last()}

    def _complete_last_step(self) -> None:
        """Completes the last step of an epoch whose number of batches was not known in advance."""
        if is_distributed() and self._batches_per_epoch is not None:
            raise RuntimeError(
                f"train_loader gave {self._state.batches.done} batches, where its length is "
                f"{self._batches_per_epoch}: gradients that wait for a later batch are not synchronised between ranks"
            )
        self._finish_step()

    def _stops(self, read: bool) -> bool:
        """Whether to stop after this step.

        Ranks hear of an interruption at different times, so they ask each other, but only when they read their metrics.
        """
        requested = self._interruption.requested
        return read and any_rank(requested, self._state.device) if is_distributed() else requested

    def _save(self, best: bool) -> None:
        path = self._folder.save(self._state, best)
        if path is not None:
            self._callbacks.tell("on_checkpoint", path)
