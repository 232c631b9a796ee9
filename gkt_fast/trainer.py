"""`GKTTrainer`: one short training loop with progress, metrics, checkpoints and exact resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .checkpoint import (
    CheckpointError,
    check_model_state,
    get_random_state,
    load_checkpoint,
    save_checkpoint,
    set_random_state,
)
from .config import GKTConfig
from .evaluation import Evaluation, evaluate
from .gkt import GKT, GKTOutput
from .loggers import CsvLogger, Logger, Progress
from .metrics import EpochMetrics
from .subnet import Subnet
from .survival import survival_scaling

__all__ = ["GKTTrainer", "NonFiniteLossError"]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite. The checkpoints on disk are from before."""


class GKTTrainer:
    """Trains a model by Group Knowledge based Training.

    Args:
        model: the network; moved to `device`.
        optimizer: over the model's parameters.
        config: the hyper-parameters; None: the defaults.
        scheduler: learning-rate schedule, stepped after every epoch, or every step with `scheduler_interval="step"`.
        scheduler_interval: "epoch" or "step".
        device: where to train; None: where the model is.
        amp: None for full precision, "bf16", or "fp16" (with dynamic loss scaling).
        channels_last: whether to use the channels_last memory format (faster convolutions).
        stages: see `GKT`.

    Raises:
        ValueError, TypeError: an argument is out of its range or doesn't fit; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: GKTConfig | None = None,
        *,
        scheduler: LRScheduler | None = None,
        scheduler_interval: str = "epoch",
        device: torch.device | str | None = None,
        amp: str | None = None,
        channels_last: bool = False,
        stages: Sequence[str | Sequence[str]] | None = None,
    ) -> None:
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {scheduler_interval!r}; it must be 'epoch' or 'step'")
        if amp is not None and amp not in AMP_DTYPES:
            raise ValueError(f"amp is {amp!r}; it must be None, {' or '.join(map(repr, AMP_DTYPES))}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        if device is None:
            device = next((parameter.device for parameter in model.parameters()), "cpu")
        self.device = torch.device(device)
        model.to(self.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.gkt = GKT(model, config, stages)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.amp = amp
        self.channels_last = channels_last
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.epoch = 0
        self.best_accuracy = -math.inf
        self._batches_done = 0
        self._epoch_random_state: dict[str, Any] | None = None
        self._loader_generator: torch.Generator | None = None
        self._metrics = EpochMetrics(self.config, self.device)
        self._interrupted = False

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.gkt.model

    @property
    def config(self) -> GKTConfig:
        """The hyper-parameters."""
        return self.gkt.config

    def step(self, images: Tensor, targets: Tensor) -> GKTOutput:
        """One training step: forward, backward, optimizer step (and scheduler step, if it goes by steps).

        Args:
            images: (B, ...), moved to the trainer's device.
            targets: class indices (B, *spatial) or probabilities (B, C, *spatial).

        Returns:
            The same fields as `GKT`'s, detached and still on the device: reading them is what synchronises.
        """
        self.gkt.train()
        images, targets = self._to_device(images), targets.to(self.device, non_blocking=True)
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.amp == "fp16" else None
        with self._autocast():
            output = self.gkt(images, targets, loss_scale=scale)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None and self.scheduler_interval == "step":
            self.scheduler.step()
        return replace(output, loss=output.loss.detach())

    def evaluate(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        depths: Subnet | Sequence[int] | None = None,
        *,
        calibration_loader: Iterable[Any] | None = None,
        calibration_samples: int = 2000,
    ) -> Evaluation:
        """Accuracy of the full network, or of a subnet (see `gkt_fast.evaluation.evaluate`).

        A full network trained by stochastic depth runs with `survival_scaling`; a subnet is what such training runs.
        """
        scaled = depths is None and not self.config.train_full and self.config.sampler == "stochastic_depth"
        scaling = survival_scaling(self.model, self.config.drop_rate, self.gkt.stages)
        with scaling if scaled else nullcontext():
            return evaluate(
                self.model,
                self._on_device(loader),
                depths,
                stages=self.gkt.stages,
                calibration_loader=(
                    None if calibration_loader is None else self._on_device(calibration_loader)
                ),
                calibration_samples=calibration_samples,
                ignore_index=self.config.ignore_index,
                autocast=self._autocast(),
            )

    def fit(
        self,
        train_loader: Iterable[tuple[Tensor, Tensor]],
        *,
        epochs: int,
        val_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
        output_dir: str | Path | None = None,
        resume: bool | str | Path = True,
        log_interval: int = 50,
        loggers: Sequence[Logger] = (),
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Trains up to a number of epochs.

        With `output_dir`, every epoch writes `last.pt`, `best.pt` (best validation accuracy) and a row of
        `summary.csv`; `config.yaml` holds the hyper-parameters. Ctrl-C finishes the step, writes `last.pt` and raises
        KeyboardInterrupt; training goes on from there exactly as if it had not been interrupted.

        Args:
            train_loader: (images, targets) batches; a `DistributedSampler` gets its epoch set.
            epochs: epochs in all, those of an earlier run that is resumed included.
            val_loader: (images, class indices) batches, evaluated after every epoch.
            output_dir: folder of the run; None: nothing is written.
            resume: True: go on from `last.pt` in `output_dir` if there is one. A path: go on from that checkpoint.
                False: start anew.
            log_interval: steps between two readings of the metrics from the device.
            loggers: further receivers of the epochs' metrics.
            progress: whether to print progress.

        Returns:
            One dict of metrics per epoch of this call, as written to `summary.csv`.

        Raises:
            ValueError: epochs or log_interval is out of range, or the train_loader is empty.
            CheckpointError: the checkpoint to resume from can't be used.
            NonFiniteLossError: the loss is NaN or infinite; names the step.
        """
        if epochs < 0:
            raise ValueError(f"epochs is {epochs}; it must be at least 0")
        if log_interval < 1:
            raise ValueError(f"log_interval is {log_interval}; it must be at least 1")
        folder = None if output_dir is None else Path(output_dir)
        self._loader_generator = getattr(train_loader, "generator", None)
        self._prepare(folder, resume)
        steps = len(train_loader) if hasattr(train_loader, "__len__") else None  # type: ignore[arg-type]
        bar = Progress(steps, epochs, log_interval, progress)
        receivers = [*loggers, *([CsvLogger(folder / "summary.csv", self.epoch)] if folder else [])]
        history = []
        try:
            with self._deferred_interrupt():
                while self.epoch < epochs:
                    metrics = self._train_epoch(train_loader, bar, log_interval, folder)
                    if val_loader is not None:
                        evaluation = self.evaluate(val_loader)
                        metrics |= {"val_accuracy": evaluation.accuracy, "val_loss": evaluation.loss}
                    self._end_epoch(metrics, folder)
                    bar.end_epoch(metrics)
                    for receiver in receivers:
                        receiver.log_epoch(metrics)
                    history.append(metrics)
        finally:
            bar.close()
            for receiver in receivers:
                receiver.close()
        return history

    def _train_epoch(
        self, loader: Iterable[tuple[Tensor, Tensor]], bar: Progress, log_interval: int, folder: Path | None
    ) -> dict[str, float]:
        batches = self._batches(loader)
        metrics = self._metrics
        started, first = time.perf_counter(), self._batches_done
        samples = 0
        bar.begin_epoch(self.epoch, first)
        for images, targets in batches:
            step = self.gkt.next_step
            metrics.update(self.step(images, targets), step)
            samples += len(images)
            self._batches_done += 1
            read = self._batches_done % log_interval == 0
            if read:
                self._check_finite(metrics)
            bar.update(self._batches_done, metrics.means().items() if read else None)
            if self._interrupted:
                self._check_finite(metrics)
                self._save(folder)
                raise KeyboardInterrupt
        if self._batches_done == 0:
            raise ValueError("train_loader gave no batch")
        self._check_finite(metrics)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - started
        return {
            "epoch": self.epoch,
            "step": self.gkt.next_step,
            **metrics.means(),
            "lr": learning_rate,
            "seconds": seconds,
            "images_per_second": samples / seconds,
        }

    def _batches(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch's batches: all of them, or after a resume those that were not trained on yet."""
        sampler = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        if self._batches_done == 0:
            self._epoch_random_state = self._random_state()
            return iter(loader)
        now = self._random_state()
        self._set_random_state(self._epoch_random_state)
        batches = iter(loader)
        for _ in range(self._batches_done):
            next(batches)
        self._set_random_state(now)
        return batches

    def _random_state(self) -> dict[str, Any]:
        generator = self._loader_generator
        return {**get_random_state(), "loader": None if generator is None else generator.get_state()}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state)
        if self._loader_generator is not None and state["loader"] is not None:
            self._loader_generator.set_state(state["loader"])

    def _end_epoch(self, metrics: dict[str, float], folder: Path | None) -> None:
        if self.scheduler is not None and self.scheduler_interval == "epoch":
            self.scheduler.step()
        self.epoch += 1
        self._batches_done = 0
        self._metrics = EpochMetrics(self.config, self.device)
        best = metrics.get("val_accuracy", -math.inf) > self.best_accuracy
        self.best_accuracy = max(self.best_accuracy, metrics.get("val_accuracy", -math.inf))
        self._save(folder, best)

    def _check_finite(self, metrics: EpochMetrics) -> None:
        step = metrics.first_non_finite_step()
        if step is not None:
            raise NonFiniteLossError(
                f"the loss is not finite at step {step} (epoch {self.epoch + 1}); "
                "checkpoints written before are untouched"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on exactly: tensors and plain Python values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gkt": self.gkt.get_extra_state(),
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "batches_done": self._batches_done,
            "best_accuracy": self.best_accuracy,
            "metrics": self._metrics.state_dict(),
            "random_state": self._random_state(),
            "epoch_random_state": self._epoch_random_state,
        }

    def load_checkpoint(self, path: str | Path) -> None:
        """Restores a checkpoint written by `fit`.

        Raises:
            CheckpointError: it can't be read, or is of another model, optimizer, schedule or number of groups;
                nothing was changed.
        """
        state = load_checkpoint(path)
        check_model_state(self.model, state["model"], path)
        groups = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        own_groups = [len(group["params"]) for group in self.optimizer.param_groups]
        if groups != own_groups:
            raise CheckpointError(
                f"{path} has optimizer parameter groups of sizes {groups}; here they are {own_groups}"
            )
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise CheckpointError(
                f"{path} was written {'without' if state['scheduler'] is None else 'with'} a scheduler; "
                f"this trainer has {'none' if self.scheduler is None else 'one'}"
            )
        for name in ("groups", "train_full"):
            written = state["config"].get(name, getattr(GKTConfig, name))
            if written != getattr(self.config, name):
                raise CheckpointError(
                    f"{path} was written with {name}={written}, not {getattr(self.config, name)}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.gkt.set_extra_state(state["gkt"])
        self.epoch = state["epoch"]
        self.best_accuracy = state["best_accuracy"]
        self._batches_done = state["batches_done"]
        self._epoch_random_state = state["epoch_random_state"]
        self._metrics.load_state_dict(state["metrics"])
        self._set_random_state(state["random_state"])

    def _prepare(self, folder: Path | None, resume: bool | str | Path) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if isinstance(resume, (str, Path)):
            self.load_checkpoint(resume)
        elif resume and folder is not None and (folder / "last.pt").exists():
            self.load_checkpoint(folder / "last.pt")
        if folder is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(self.config.to_dict(), sort_keys=False))

    def _save(self, folder: Path | None, best: bool = False) -> None:
        if folder is not None:
            save_checkpoint(
                folder / "last.pt", self.state_dict(), copy_to=folder / "best.pt" if best else None
            )

    def _autocast(self) -> AbstractContextManager:
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp])

    def _to_device(self, images: Tensor) -> Tensor:
        memory_format = (
            torch.channels_last if self.channels_last and images.ndim == 4 else torch.preserve_format
        )
        return images.to(self.device, non_blocking=True, memory_format=memory_format)

    def _on_device(self, loader: Iterable[Any]) -> Iterator[Any]:
        for batch in loader:
            if isinstance(batch, (tuple, list)):
                yield (self._to_device(batch[0]), *batch[1:])
            else:
                yield self._to_device(batch)

    @contextmanager
    def _deferred_interrupt(self) -> Iterator[None]:
        """Ctrl-C lets the step finish; a second one interrupts at once."""
        self._interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def interrupt(signum: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
        if self._interrupted:
            raise KeyboardInterrupt
