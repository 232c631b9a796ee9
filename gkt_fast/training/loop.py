"""The loop over epochs: `GKTTrainer.fit`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from ..distributed import agree, any_rank, is_distributed, rank, world_size
from ..subnets.subnet import Subnet
from .batches import dead_workers_named
from .callbacks import Callback
from .checkpoint import remove_temporary_files, save_checkpoint
from .interruption import Interruption, deferred_interrupt
from .loggers import CsvLogger, Logger, Progress
from .metrics import EpochMetrics
from .nonfinite import NonFiniteLossError, non_finite_entries

if TYPE_CHECKING:
    from .trainer import GKTTrainer

__all__ = ["Fitting"]

logger = logging.getLogger("gkt_fast")


class Fitting:
    """One call of `GKTTrainer.fit`, which describes the arguments."""

    def __init__(
        self,
        trainer: GKTTrainer,
        train_loader: Iterable[tuple[Tensor, Tensor]],
        *,
        epochs: int,
        val_loader: Iterable[tuple[Tensor, Tensor]] | None,
        val_depths: Sequence[Subnet | Sequence[int]],
        calibration_loader: Iterable[Any],
        output_dir: str | Path | None,
        resume: bool | str | Path,
        log_interval: int,
        loggers: Sequence[Logger],
        callbacks: Sequence[Callback],
        progress: bool,
    ) -> None:
        if epochs < 0:
            raise ValueError(f"epochs is {epochs}; it must be at least 0")
        if log_interval < 1:
            raise ValueError(f"log_interval is {log_interval}; it must be at least 1")
        if val_depths and val_loader is None:
            raise ValueError(
                "val_depths is given and val_loader is None; subnets are evaluated on the val_loader"
            )
        self.trainer = trainer
        self.calibration_loader = calibration_loader
        self.epochs = epochs
        self.val_loader = val_loader
        self.val_subnets = [self._subnet(depths) for depths in val_depths]
        self.folder = None if output_dir is None else Path(output_dir)
        self.log_interval = log_interval
        self.callbacks = callbacks
        self.interruption = Interruption()
        trainer.batches.attach(train_loader)
        self._prepare(resume)
        trainer.batches.begin()
        self.steps = trainer.batches.length()
        self.bar = Progress(self.steps, epochs, log_interval, progress and rank() == 0)
        self.loggers = [*loggers]
        if self.folder is not None:
            self.loggers.append(CsvLogger(self.folder / "summary.csv", trainer.epoch))
        if rank():
            self.loggers = []
        self._skipped = int(trainer.optimization.skipped)

    def _subnet(self, depths: Subnet | Sequence[int]) -> Subnet:
        try:
            return depths if isinstance(depths, Subnet) else Subnet.ordered(depths, self.trainer.gkt.stages)
        except ValueError as error:
            raise ValueError(f"val_depths: {error}") from error

    def _prepare(self, resume: bool | str | Path) -> None:
        folder = self.folder
        if folder is not None and rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporary_files(folder)
        if isinstance(resume, (str, Path)):
            self.trainer.load_checkpoint(resume)
        elif resume and folder is not None and (folder / "last.pt").exists():
            self.trainer.load_checkpoint(folder / "last.pt")
        agree("the step that training resumes at", self.trainer.gkt.next_step)
        if folder is not None and rank() == 0:
            config = self.trainer.config.to_dict()
            (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def run(self) -> list[dict[str, float]]:
        """Trains; returns the metrics of every epoch."""
        history = []
        try:
            self._tell("on_fit_start")
            with deferred_interrupt() as self.interruption, dead_workers_named(self.trainer.batches):
                while self.trainer.epoch < self.epochs:
                    metrics = self._train_epoch() | self._validate()
                    self._tell("on_epoch_end", metrics)
                    self._end_epoch(metrics)
                    self.bar.end_epoch(metrics)
                    for receiver in self.loggers:
                        receiver.log_epoch(metrics)
                    history.append(metrics)
                    if is_distributed() and self._stops(True):
                        raise KeyboardInterrupt
        finally:
            self.bar.close()
            for receiver in self.loggers:
                receiver.close()
            self._tell("on_fit_end")
        return history

    def _tell(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.trainer, *values)

    def _train_epoch(self) -> dict[str, float]:
        trainer, batches, optimization = self.trainer, self.trainer.batches, self.trainer.optimization
        started, first = time.perf_counter(), batches.done
        samples = 0
        self.bar.begin_epoch(batches.epoch, first)
        self._tell("on_epoch_start")
        for images, targets in batches.rest():
            step = trainer.gkt.next_step - (1 if optimization.batches else 0)
            output = trainer.step(images, targets, **self._update_option())
            trainer.metrics.update(output, step)
            self._tell("on_step_end", output)
            samples += len(images)
            batches.done += 1
            read = (
                not optimization.batches and batches.done // optimization.accumulate % self.log_interval == 0
            )
            if read:
                self._check_finite()
            self.bar.update(batches.done, trainer.metrics.means().items() if read else None)
            if not optimization.batches and self._stops(read):
                self._check_finite()
                self._save()
                raise KeyboardInterrupt
        if batches.done == 0:
            raise ValueError("train_loader gave no batch")
        if optimization.batches:
            self._finish_last_step()
        self._check_finite()
        learning_rate = trainer.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - started
        metrics = {
            "epoch": batches.epoch,
            "step": trainer.gkt.next_step,
            **trainer.metrics.means(),
            "lr": learning_rate,
            "seconds": seconds,
            "images_per_second": samples * world_size() / seconds,
        }
        if trainer.skip_nonfinite:
            metrics["skipped_steps"] = self._skipped
        return metrics

    def _update_option(self) -> dict[str, bool]:
        """Tells `step` where an epoch ends before the step is complete."""
        optimization = self.trainer.optimization
        if optimization.accumulate == 1 or self.steps is None:
            return {}
        return {"update": optimization.is_last() or self.trainer.batches.done + 1 == self.steps}

    def _finish_last_step(self) -> None:
        """Of an epoch whose length was not known before."""
        if is_distributed() and self.steps is not None:
            raise RuntimeError(
                f"train_loader gave {self.trainer.batches.done} batches, where its length is {self.steps}: gradients "
                "that wait for a later batch are not synchronised between ranks"
            )
        self.trainer.finish_step()

    def _stops(self, read: bool) -> bool:
        """Whether to stop after this step. Ranks hear of an interruption at different times; they ask each other when
        they read their metrics."""
        requested = self.interruption.requested
        return read and any_rank(requested, self.trainer.device) if is_distributed() else requested

    def _validate(self) -> dict[str, float]:
        if self.val_loader is None:
            return {}
        full = self.trainer.evaluate(self.val_loader)
        metrics = {"val_accuracy": full.accuracy, "val_loss": full.loss}
        if self.trainer.ema_model is not None:
            averaged = self.trainer.evaluate(self.val_loader, ema=True)
            metrics |= {"val_accuracy_ema": averaged.accuracy, "val_loss_ema": averaged.loss}
        for subnet in self.val_subnets:
            evaluation = self.trainer.evaluate(
                self.val_loader, subnet, calibration_loader=self.calibration_loader
            )
            metrics[f"val_accuracy_{subnet}"] = evaluation.accuracy
        return metrics

    def _end_epoch(self, metrics: dict[str, float]) -> None:
        trainer = self.trainer
        if trainer.scheduler is not None and trainer.scheduler_interval == "epoch":
            trainer.scheduler.step()
        trainer.batches.end_epoch()
        trainer.metrics = EpochMetrics(trainer.config, trainer.device, trainer.skip_nonfinite)
        accuracy = metrics.get("val_accuracy_ema", metrics.get("val_accuracy", -math.inf))
        best = accuracy > trainer.best_accuracy
        trainer.best_accuracy = max(trainer.best_accuracy, accuracy)
        self._save(best)

    def _check_finite(self) -> None:
        """Reads whether a loss so far was NaN or infinite.

        Raises:
            NonFiniteLossError: one was, and such steps are not skipped.
        """
        trainer = self.trainer
        found = trainer.metrics.first_non_finite()
        where = "" if found is None else self._describe(*found)
        if not trainer.skip_nonfinite:
            if found is not None:
                raise NonFiniteLossError(
                    f"the loss is not finite at {where}; checkpoints written before are untouched"
                )
            return
        skipped = int(trainer.optimization.skipped)
        if skipped > self._skipped:
            logger.warning(
                "%d steps skipped so far for NaN or infinite losses or gradients%s",
                skipped,
                f"; the first loss of this epoch at {where}" if where else "",
            )
        self._skipped = skipped

    def _describe(self, step: int, streams: Sequence[int]) -> str:
        """The step and the streams whose term is not finite."""
        config, subnets = self.trainer.config, self.trainer.gkt.sample(step)
        names = []
        for stream in streams:
            if not config.train_full:
                names.append(f"the subnet {subnets[0]}")
            elif stream == 0:
                names.append("the full network")
            else:
                loop, group = divmod(stream - 1, config.groups)
                names.append(f"loop {loop + 1} group {group + 1} ({subnets[stream - 1]})")
        return f"step {step} (epoch {self.trainer.epoch + 1}) in {', '.join(names) or 'their sum'}"

    def _save(self, best: bool = False) -> None:
        if self.folder is None:
            return
        broken = non_finite_entries(self.trainer.model)
        if any_rank(bool(broken), self.trainer.device):
            raise NonFiniteLossError(
                f"the network is not finite after step {self.trainer.gkt.next_step - 1} "
                f"({len(broken)} tensors, {', '.join(broken[:3])}); checkpoints written before are untouched"
            )
        state = self.trainer.state_dict()
        path = self.folder / "last.pt"
        if rank() == 0:
            save_checkpoint(path, state, copy_to=self.folder / "best.pt" if best else None)
        self._tell("on_checkpoint", path)
