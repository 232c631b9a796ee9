"""`GKTTrainer`: puts the parts of training together; a training step, evaluation, and `fit`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..config import GKTConfig
from ..deployment.evaluation import Evaluation, evaluate
from ..deployment.survival import survival_scaling
from ..distributed import parallelize
from ..execution import GroupKnowledgeMemory
from ..gkt import GKT, GKTOutput
from ..network import compilation
from ..network.inputs import rows_in
from ..network.look import modes_of, restore_modes
from ..subnets.subnet import Subnet
from .callbacks import Callback, Callbacks
from .loggers import Logger, Reports
from .loop import TrainingLoop
from .optimization import Optimization
from .placement import Placement
from .run_folder import RunFolder
from .schedules import LearningRateSchedule
from .state import TrainingState
from .validation import Validation, named_subnet
from .weight_average import WeightAverage

__all__ = ["GKTTrainer"]


class GKTTrainer:
    """Trains a model by Group Knowledge based Training.

    Where a process group of several processes exists (torchrun), every rank makes its own trainer of the same model
    and calls the same methods: the step runs in DistributedDataParallel, metrics and evaluations are over all ranks,
    and rank 0 alone prints and writes.

    `state` (a `TrainingState`) owns everything that training changes; this class makes the parts and lets them work
    together.

    Args:
        model: the network; moved to `device`.
        optimizer: over the model's parameters.
        config: the hyper-parameters; None: the defaults.
        scheduler: learning-rate schedule, stepped after every epoch, or every step with `scheduler_interval="step"`.
            `ReduceLROnPlateau` gets the validation loss, or with mode="max" the validation accuracy.
        scheduler_interval: "epoch" or "step".
        device: where to train; None: where the model is.
        amp: None for full precision, "bf16", or "fp16" (with dynamic loss scaling).
        channels_last: whether to use the channels_last memory format (faster convolutions).
        accumulate: batches whose gradients are averaged into one optimizer step, with the same subnets (see
            `Optimization`).
        clip_grad_norm: largest norm of all gradients together; None: no limit.
        ema_decay: decay of an exponential moving average of the weights (`ema_model`); None: no average. The
            configuration's `ema` is another average, that of knowledge.
        kd_schedule: factor on the configuration's `kd_weight` as a function of the step, counted from 0; for example
            `LinearWarmup`. None: 1.
        skip_nonfinite: whether a step with a NaN or infinite loss or gradient is taken back, counted and logged
            (`StepGuard`, which keeps a copy of what a step changes). False: `fit` stops with an error.
        compile_blocks: whether every residual block is compiled by torch.compile.
        deterministic: whether torch is told to use deterministic algorithms only, for the whole process.
        stages: see `GKT`.
        criterion: see `GKT`; moved to the device if it is a module. Evaluations report its value as their loss.
        memory: with knowledge="dataset", where groups keep what they know of every training sample. None: `fit` makes
            one of float16 on the device, for as many samples as the train_loader's `gkt_fast.data.Indexed` has.
        ddp_options: further arguments of DistributedDataParallel.

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
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        kd_schedule: Callable[[int], float] | None = None,
        skip_nonfinite: bool = False,
        compile_blocks: bool = False,
        deterministic: bool = False,
        stages: Sequence[str | Sequence[str]] | None = None,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
        memory: GroupKnowledgeMemory | None = None,
        ddp_options: Mapping[str, Any] | None = None,
    ) -> None:
        schedule = LearningRateSchedule(scheduler, scheduler_interval)
        if device is None:
            device = next((parameter.device for parameter in model.parameters()), "cpu")
        self._placement = Placement(device, amp, channels_last)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        if kd_schedule is not None and not callable(kd_schedule):
            raise TypeError(f"kd_schedule is {kd_schedule!r}; it must be a function of the step, or None")
        if deterministic:
            _use_deterministic_algorithms()
        self._placement.model(model)
        gkt = GKT(model, config, stages, criterion=criterion).to(self.device)
        gkt.memory = memory
        optimization = Optimization(
            model,
            optimizer,
            self.device,
            loss_scaling=amp == "fp16",
            accumulate=accumulate,
            clip_grad_norm=clip_grad_norm,
            skip_nonfinite=skip_nonfinite,
        )
        weight_average = None if ema_decay is None else WeightAverage(model, ema_decay)
        if compile_blocks:
            compilation.compile_blocks(model, gkt.stages)
        self._parallel_gkt = parallelize(gkt, self.device, ddp_options)
        self.gkt = gkt
        self.state = TrainingState(gkt, optimization, schedule, weight_average)
        self.kd_schedule = kd_schedule
        self._modes = modes_of(model) if model.training else []

    def step(
        self, images: Any, targets: Tensor, *, update: bool | None = None, indices: Tensor | None = None
    ) -> GKTOutput:
        """One training step: forward, backward, optimizer step (and scheduler step, if it goes by steps).

        A model in training mode stays as it is: what you put into evaluation mode within it, such as a frozen
        BatchNorm, stays there. One that is in evaluation mode as a whole is put into training mode, but for what was
        in evaluation mode in the step before.

        With `accumulate`, the optimizer's step comes with every so many calls; their subnets are the same.

        Args:
            images: (B, ...), or the model's inputs in another form that `GKT` takes; moved to the trainer's device.
            targets: class indices (B, *spatial) or probabilities (B, C, *spatial).
            update: whether the optimizer steps now; None: with every `accumulate`-th call. Under
                DistributedDataParallel, False leaves the gradients of this call to be synchronised by a later one.
            indices: (B,) int64, the samples' places in the data set, for knowledge="dataset".

        Returns:
            The same fields as `GKT`'s, detached and still on the device: reading them is what synchronises.
        """
        self._begin_training()
        images, targets = self._placement.batch(images, targets)
        step, optimization = self.state.step, self.state.optimization
        factor = None if self.kd_schedule is None else self.kd_schedule(step)
        optimization.begin_batch()
        with self._synchronized_unless(update is False):
            with self._placement.autocast():
                output = self._parallel_gkt(
                    images,
                    targets,
                    step=step,
                    loss_scale=optimization.loss_scale(),
                    kd_weight=None if factor is None else factor * self.config.kd_weight,
                    indices=indices,
                )
            last = optimization.is_last() if update is None else update
            optimization.backward(output.loss, rows_in(images) or 0)
        if last:
            self.finish_step()
        return replace(output, loss=output.loss.detach())

    def _begin_training(self) -> None:
        """Puts the network into training mode where it isn't, but for modules that were in evaluation mode within it
        (frozen BatchNorm): they stay as they are."""
        if not self.model.training:
            self.gkt.train()
            restore_modes(self._modes)
        self.gkt.training = True
        self._modes = modes_of(self.model)

    def finish_step(self) -> None:
        """The optimizer's step with the gradients at hand, and what follows it; for `step` calls with update=False."""
        self.state.end_step()

    def _synchronized_unless(self, later: bool) -> AbstractContextManager:
        if later and isinstance(self._parallel_gkt, DistributedDataParallel):
            return self._parallel_gkt.no_sync()
        return nullcontext()

    def evaluate(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        depths: Subnet | Sequence[int] | None = None,
        *,
        calibration_loader: Iterable[Any] | None = None,
        calibration_samples: int = 2000,
        ema: bool = False,
    ) -> Evaluation:
        """Accuracy of the full network, or of a subnet (see `gkt_fast.deployment.evaluation.evaluate`).

        A full network trained by stochastic depth runs with `survival_scaling`; a subnet is what such training runs.
        With `ema`, the averaged weights are evaluated.

        Raises:
            ValueError: as `evaluate`; or there are no averaged weights.
        """
        model = self.ema_model if ema else self.model
        if model is None:
            raise ValueError("ema is True, but the trainer was made without ema_decay")
        scaled = depths is None and not self.config.train_full and self.config.sampler == "stochastic_depth"
        scaling = survival_scaling(model, self.config.drop_rate, self.gkt.stages)
        with scaling if scaled else nullcontext():
            return evaluate(
                model,
                self._placement.loader(loader),
                depths,
                stages=self.gkt.stages,
                calibration_loader=(
                    None if calibration_loader is None else self._placement.loader(calibration_loader)
                ),
                calibration_samples=calibration_samples,
                ignore_index=self.config.ignore_index,
                criterion=self.gkt.criterion,
                autocast=self._placement.autocast(),
            )

    def fit(
        self,
        train_loader: Iterable[tuple[Tensor, Tensor]],
        *,
        epochs: int,
        val_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
        val_depths: Sequence[Subnet | Sequence[int]] = (),
        calibration_loader: Iterable[Any] | None = None,
        calibrate_full: bool = False,
        output_dir: str | Path | None = None,
        resume: bool | str | Path = True,
        log_interval: int = 50,
        loggers: Sequence[Logger] = (),
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Trains up to a number of epochs.

        With `output_dir`, every epoch writes `last.pt`, `best.pt` (best validation accuracy, of the averaged weights
        where there are any) and a row of `summary.csv`; `config.yaml` holds the hyper-parameters. Ctrl-C finishes the
        step, writes `last.pt` and raises KeyboardInterrupt; training goes on from there exactly as if it had not been
        interrupted.

        Args:
            train_loader: (inputs, targets) batches, or mappings with "labels" (see `gkt_fast.network.batch`), with
                their samples' indices for knowledge="dataset"; a `DistributedSampler` gets its epoch set.
            epochs: epochs in all, those of an earlier run that is resumed included.
            val_loader: (inputs, class indices) batches, or mappings, evaluated after every epoch; each rank's own
                share.
            val_depths: subnets that are evaluated on the val_loader after every epoch too, with BatchNorm statistics
                estimated on the calibration_loader; `val_accuracy_D-D-D` in the metrics.
            calibration_loader: training images as they are without mixup and the like; None: the train_loader.
            calibrate_full: whether the full network is evaluated with such statistics too, instead of its running ones.
            output_dir: folder of the run; None: nothing is written.
            resume: True: go on from `last.pt` in `output_dir` if there is one. A path: go on from that checkpoint.
                False: start anew.
            log_interval: steps between two readings of the metrics from the device.
            loggers: further receivers of the epochs' metrics.
            callbacks: called as the run goes (see `Callback`).
            progress: whether to print progress.

        Returns:
            One dict of metrics per epoch of this call, as written to `summary.csv`.

        Raises:
            ValueError: epochs, log_interval or val_depths is out of range, the train_loader is empty or lacks indices,
                or the scheduler waits for a validation loss and there is no val_loader.
            TypeError: a batch has another form.
            CheckpointError: the checkpoint to resume from can't be used, or one can't be written.
            DataLoadingError: a worker process of a loader died.
            NonFiniteLossError: the loss is NaN or infinite; names the step and the streams.
        """
        if epochs < 0:
            raise ValueError(f"epochs is {epochs}; it must be at least 0")
        if log_interval < 1:
            raise ValueError(f"log_interval is {log_interval}; it must be at least 1")
        state = self.state
        state.schedule.check_metrics(available=val_loader is not None)
        validation = Validation(
            self.evaluate,
            val_loader,
            [named_subnet("val_depths", depths, self.gkt.stages) for depths in val_depths],
            train_loader if calibration_loader is None else calibration_loader,
            averaged=self.ema_model is not None,
            calibrate_full=calibrate_full,
        )
        folder = RunFolder(output_dir)
        state.begin(train_loader, folder.checkpoint(resume))
        folder.open(self.config)
        loop = TrainingLoop(
            state,
            self.step,
            self.finish_step,
            epochs=epochs,
            validation=validation,
            folder=folder,
            reports=Reports(
                [*loggers, *folder.summary(state.epoch)], state.batches.length(), epochs, progress
            ),
            callbacks=Callbacks(callbacks, self),
            log_interval=log_interval,
        )
        return loop.run()

    def state_dict(self) -> dict[str, Any]:
        """The contents of a checkpoint (see `TrainingState.state_dict`). Every rank must call it.

        Raises:
            RuntimeError: gradients of some batches wait for the others of their step (`accumulate`).
        """
        return self.state.state_dict()

    def load_checkpoint(self, path: str | Path) -> None:
        """Restores a checkpoint written by `fit` (see `TrainingState.load`).

        Raises:
            CheckpointError: it can't be read, or doesn't fit; nothing was changed.
        """
        self.state.load(path)

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.gkt.model

    @property
    def ema_model(self) -> nn.Module | None:
        """The network with averaged weights; None without `ema_decay`."""
        average = self.state.weight_average
        return None if average is None else average.model

    @property
    def config(self) -> GKTConfig:
        """The hyper-parameters."""
        return self.gkt.config

    @property
    def device(self) -> torch.device:
        """Where the network is trained."""
        return self._placement.device

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        return self.state.optimization.optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where amp is "fp16"; does nothing otherwise."""
        return self.state.optimization.scaler

    @property
    def scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler; may be replaced between two calls of `fit`."""
        return self.state.schedule.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: LRScheduler | None) -> None:
        self.state.schedule.scheduler = scheduler

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.state.epoch

    @property
    def best_accuracy(self) -> float:
        """Highest validation accuracy of an epoch so far, 0 to 1; -inf before the first."""
        return self.state.best_accuracy

    # Further names by which callbacks and loops of one's own read what the parts own.
    optimization = property(attrgetter("state.optimization"))
    batches = property(attrgetter("state.batches"))
    metrics = property(attrgetter("state.metrics"))
    skip_nonfinite = property(attrgetter("state.optimization.skip_nonfinite"))
    scheduler_interval = property(attrgetter("state.schedule.interval"))
    amp = property(attrgetter("_placement.amp"))
    channels_last = property(attrgetter("_placement.channels_last"))


def _use_deterministic_algorithms() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's own condition
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
