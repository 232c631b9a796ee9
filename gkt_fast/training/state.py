"""The state of a training run: where it stands, and everything that a checkpoint must hold of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GKTConfig
from ..distributed import agree
from ..execution import GroupKnowledgeMemory
from ..gkt import GKT, GKTOutput
from .batches import EpochBatches
from .checkpoint import CheckpointError, check_model_state, load_checkpoint
from .indexed import samples_of
from .metrics import EpochMetrics
from .optimization import Optimization
from .schedules import LearningRateSchedule
from .weight_average import WeightAverage

__all__ = ["TrainingState"]


class TrainingState:
    """What changes while a network is trained: the loop moves it on, checkpoints hold it, callbacks see it.

    Each kind of state has one owner among the attributes, and this class alone knows them all. What follows a step, a
    batch and an epoch stands in `end_step`, `end_batch` and `end_epoch`; what is saved, in `state_dict`. A new part of
    training that has state of its own becomes an attribute here and gets its lines in those methods.

    Attributes:
        gkt: owns the network, what was learnt of it, the counter of steps, and what groups know of every training
            sample (`GKT.memory`), if that outlives a step.
        optimization: owns the optimizer, its loss scaling, the gradients that wait for an optimizer step, and the
            number of steps that were taken back.
        schedule: owns the learning-rate scheduler.
        weight_average: owns the averaged weights; None: there are none.
        batches: owns the place in the data: epochs finished, batches done, random states.
        metrics: means over the current epoch.
        best_accuracy: highest validation accuracy of an epoch so far, 0 to 1; -inf before the first.
    """

    def __init__(
        self,
        gkt: GKT,
        optimization: Optimization,
        schedule: LearningRateSchedule,
        weight_average: WeightAverage | None = None,
    ) -> None:
        self.gkt = gkt
        self.optimization = optimization
        self.schedule = schedule
        self.weight_average = weight_average
        self.batches = EpochBatches()
        self.metrics = self._new_metrics()
        self.best_accuracy = -math.inf

    @property
    def step(self) -> int:
        """The optimizer step, counted from 0, that the next batch belongs to."""
        return self.gkt.next_step - (1 if self.optimization.batches else 0)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.batches.epoch

    @property
    def device(self) -> torch.device:
        """Where the network is trained."""
        return self.optimization.device

    def begin(self, loader: Iterable[tuple[Tensor, Tensor]], checkpoint: Path | None = None) -> None:
        """Begins a run on the loader's batches, or goes on from a checkpoint. Every rank must call it.

        Raises:
            CheckpointError: as `load`.
            RuntimeError: the ranks stand at different steps.
            ValueError: knowledge is to be kept by sample, and the loader's samples have no indices, or are of another
                number than before.
        """
        self.batches.attach(loader)
        if self.gkt.config.knowledge == "dataset":
            self._make_memory(loader)
        if checkpoint is not None:
            self.load(checkpoint)
        agree("the step that training resumes at", self.gkt.next_step)
        self.batches.begin()

    def _make_memory(self, loader: Iterable[Any]) -> None:
        samples, memory = samples_of(loader), self.gkt.memory
        if memory is None and samples is None:
            raise ValueError(
                "train_loader's samples have no indices, which knowledge='dataset' needs; its data set must be "
                "gkt_fast.data.Indexed(dataset), or a Subset of it. If it gives batches of IndexedSample in another "
                "way, give GKTTrainer a memory of as many samples. Iterable data sets need knowledge='batch'"
            )
        if memory is None:
            self.gkt.memory = GroupKnowledgeMemory(samples, None, self.gkt.config.groups, device=self.device)
        elif samples not in (None, memory.samples):
            raise ValueError(
                f"train_loader's data set has {samples} samples, and the memory of group knowledge was made for "
                f"{memory.samples}; they must be the same ones"
            )

    def end_step(self) -> None:
        """Makes the optimizer's step with the gradients at hand, and moves on what goes by steps."""
        self.optimization.step()
        if self.weight_average is not None:
            self.weight_average.update()
        self.schedule.end_step()

    def end_batch(self, output: GKTOutput) -> None:
        """Counts a batch that was just trained on, and adds its numbers to the metrics without reading them."""
        self.metrics.update(output, self.gkt.next_step - 1)
        self.batches.end_batch()

    def end_epoch(self, metrics: dict[str, float]) -> bool:
        """Moves on what goes by epochs.

        Args:
            metrics: of the epoch, those on the validation set included.

        Returns:
            Whether the epoch's validation accuracy, of the averaged weights where there are any, is the best so far.
        """
        self.schedule.end_epoch(metrics)
        self.batches.end_epoch()
        self.metrics = self._new_metrics()
        accuracy = metrics.get("val_accuracy_ema", metrics.get("val_accuracy", -math.inf))
        best = accuracy > self.best_accuracy
        self.best_accuracy = max(self.best_accuracy, accuracy)
        return best

    def _new_metrics(self) -> EpochMetrics:
        return EpochMetrics(self.gkt.config, self.device, self.optimization.skip_nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on exactly: tensors and plain Python values. Every rank must call it.

        Raises:
            RuntimeError: gradients of some batches wait for the others of their step (`accumulate`).
        """
        if self.optimization.batches:
            raise RuntimeError(
                f"{self.optimization.batches} of {self.optimization.accumulate} batches of a step are done; "
                "the state can be taken between steps"
            )
        return {
            "model": self.gkt.model.state_dict(),
            "optimizer": self.optimization.optimizer_state(),
            "optimizer_class": type(self.optimization.optimizer).__name__,
            "scheduler": self.schedule.state_dict(),
            "scaler": self.optimization.scaler.state_dict(),
            "ema": None if self.weight_average is None else self.weight_average.state_dict(),
            "gkt": self.gkt.get_extra_state(),
            "memory": None if self.gkt.memory is None else self.gkt.memory.state_dict(),
            "config": self.gkt.config.to_dict(),
            "best_accuracy": self.best_accuracy,
            "skipped_steps": self.optimization.skipped,
            "metrics": self.metrics.state_dict(),
            **self.batches.state_dict(),
        }

    def load(self, path: str | Path) -> None:
        """Restores a checkpoint, which may have been written by another number of ranks.

        Raises:
            CheckpointError: the file can't be read, or it is of another model, optimizer, schedule, number of groups
                or of training samples whose knowledge is kept, or only one of the two has averaged weights or such
                knowledge; nothing was changed.
        """
        saved = load_checkpoint(path)
        check_model_state(self.gkt.model, saved["model"], path)
        self._check_fit(saved, path)
        self.gkt.model.load_state_dict(saved["model"])
        self.optimization.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["scheduler"])
        self.optimization.scaler.load_state_dict(saved["scaler"])
        if self.weight_average is not None:
            self.weight_average.load_state_dict(saved["ema"])
        self.gkt.set_extra_state(saved["gkt"])
        if self.gkt.memory is not None:
            self.gkt.memory.load_state_dict(saved["memory"])
        elif saved.get("memory") is not None:
            self.gkt.memory = GroupKnowledgeMemory.from_state_dict(saved["memory"], self.device)
        self.best_accuracy = saved["best_accuracy"]
        self.optimization.skipped.copy_(saved["skipped_steps"])
        self.optimization.forget_batches()
        self.metrics.load_state_dict(saved["metrics"])
        self.batches.load_state_dict(saved)

    def _check_fit(self, saved: dict[str, Any], path: str | Path) -> None:
        """Checks, before anything is loaded, that a checkpoint is of a run like this one, apart from the model.

        Raises:
            CheckpointError: the optimizers are of other classes or their parameter groups differ in size, one run has
                a scheduler or averaged weights and the other has none, or the numbers of distillation terms differ.
        """
        own = type(self.optimization.optimizer).__name__
        other = saved.get("optimizer_class") or _optimizer_by_options(saved["optimizer"], own)
        if other != own:
            raise CheckpointError(
                f"{path} was written with the optimizer {other}; this trainer has {own}, which can't take its state"
            )
        sizes = [len(group["params"]) for group in saved["optimizer"]["param_groups"]]
        own_sizes = [len(group["params"]) for group in self.optimization.optimizer.param_groups]
        if sizes != own_sizes:
            raise CheckpointError(
                f"{path} has optimizer parameter groups of sizes {sizes}; here they are {own_sizes}"
            )
        for key, what, here in (
            ("scheduler", "a scheduler", self.schedule.scheduler is not None),
            ("ema", "averaged weights", self.weight_average is not None),
            ("memory", "a memory of group knowledge", self.gkt.config.knowledge == "dataset"),
        ):
            if (saved.get(key) is not None) != here:
                there, own = ("without", "with") if here else ("with", "without")
                raise CheckpointError(f"{path} was written {there} {what}; this trainer is {own}")
        config = self.gkt.config
        for name in ("groups", "train_full", "chain"):  # by these the metrics in the checkpoint are laid out
            before = saved["config"].get(name, getattr(GKTConfig, name))  # one of 0.1 lacks the newest
            if before != getattr(config, name):
                raise CheckpointError(f"{path} was written with {name}={before}, not {getattr(config, name)}")
        misfit = None if self.gkt.memory is None else self.gkt.memory.misfit(saved["memory"])
        if misfit is not None:
            raise CheckpointError(f"{path} holds {misfit}")


def _optimizer_by_options(saved: dict[str, Any], own: str) -> str:
    """The class of the optimizer that wrote a checkpoint of 0.1, which doesn't name it, as its options tell it."""
    options = {name for group in saved["param_groups"] for name in group}
    kinds = {"SGD": {"momentum", "dampening", "nesterov"}, "Adam or AdamW": {"betas", "eps", "amsgrad"}}
    found = next((name for name, needed in kinds.items() if needed <= options), own)
    return own if own in found.split(" or ") else found
