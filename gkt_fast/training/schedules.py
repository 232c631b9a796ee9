"""Factors that change over a training run: of the learning rate and of the distillation."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["LearningRateSchedule", "LinearWarmup", "check_step"]

logger = logging.getLogger("gkt_fast")


class LearningRateSchedule:
    """A scheduler of torch, if there is one, and when it steps.

    A schedule is a function of the step and of the scheduler's arguments. A resumed run whose scheduler has other
    arguments than the checkpoint's (more epochs, say) goes on with the schedule of its own arguments, from the step of
    the checkpoint on; that is logged. `ReduceLROnPlateau`, which goes by what it has seen, is restored as it was; it
    watches the validation loss, or with mode="max" the validation accuracy.

    Args:
        scheduler: of the learning rate; None: the rate stays as it is.
        interval: "epoch" or "step": what the scheduler counts.

    Raises:
        ValueError: interval is neither, or it is "step" for a `ReduceLROnPlateau`.
        TypeError: the scheduler's `step` can't be called without arguments.
    """

    def __init__(self, scheduler: LRScheduler | None = None, interval: str = "epoch") -> None:
        if interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {interval!r}; it must be 'epoch' or 'step'")
        self.interval = interval
        self.scheduler = scheduler

    @property
    def scheduler(self) -> Any:
        """The scheduler; may be replaced between two runs."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: LRScheduler | ReduceLROnPlateau | None) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            if self.interval == "step":
                raise ValueError(
                    "scheduler_interval is 'step', but ReduceLROnPlateau waits for a validation, which comes after "
                    "every epoch; it must be 'epoch'"
                )
        elif scheduler is not None:
            check_step("scheduler", scheduler)
        self._scheduler = scheduler
        self._fresh = None if scheduler is None else _Fresh(scheduler)

    def check_metrics(self, available: bool) -> None:
        """Checks that there will be metrics of a validation, where the scheduler needs them.

        Raises:
            ValueError: it does, and there won't.
        """
        if isinstance(self.scheduler, ReduceLROnPlateau) and not available:
            raise ValueError(
                "scheduler is ReduceLROnPlateau, which watches the validation; pass a val_loader"
            )

    def end_step(self) -> None:
        """After an optimizer step."""
        if self.scheduler is not None and self.interval == "step":
            self.scheduler.step()

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """After an epoch with these metrics."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metrics["val_loss" if self.scheduler.mode == "min" else "val_accuracy"])
        elif self.scheduler is not None and self.interval == "epoch":
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any] | None:
        """The scheduler's state; None: there is no scheduler."""
        return None if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state_dict`, after the optimizer's state was loaded."""
        if self.scheduler is None or state is None:
            return
        steps = state.get("last_epoch")
        if isinstance(self.scheduler, ReduceLROnPlateau) or not isinstance(steps, int):
            self.scheduler.load_state_dict(state)
            return
        rates = [group["lr"] for group in self.scheduler.optimizer.param_groups]
        groups = [dict(group) for group in self.scheduler.optimizer.param_groups]
        self._fresh.replay(steps)
        differences = _differences(state, self.scheduler.state_dict())
        if differences:
            now = [group["lr"] for group in self.scheduler.optimizer.param_groups]
            logger.info(
                "the learning-rate schedule differs from the checkpoint's (%s); it goes on as given now, at step %d: "
                "learning rate %s instead of %s",
                ", ".join(differences[:4]),
                steps,
                _shown(now),
                _shown(rates),
            )
            return
        for group, saved in zip(self.scheduler.optimizer.param_groups, groups, strict=True):
            group.update(saved)
        self.scheduler.load_state_dict(state)


class _Fresh:
    """A scheduler as it was made, to be run again from its beginning."""

    KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "max_momentum", "base_momentum")
    """What schedulers change in an optimizer's parameter groups."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = scheduler
        self._state = copy.deepcopy(scheduler.state_dict())
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
        self._groups = [
            {key: copy.deepcopy(group[key]) for key in self.KEYS if key in group} for group in groups
        ]

    def replay(self, steps: int) -> None:
        """Puts scheduler and learning rates where they are after so many steps."""
        for group, fresh in zip(self._scheduler.optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(fresh))
        self._scheduler.load_state_dict(copy.deepcopy(self._state))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps without the optimizer's
            for _ in range(steps - self._scheduler.last_epoch):
                self._scheduler.step()


def _differences(saved: Any, own: Any, name: str = "") -> list[str]:
    """Where two states differ: "T_max 2 -> 5"."""
    if isinstance(saved, dict) and isinstance(own, dict):
        keys = dict.fromkeys([*saved, *own])
        return [
            found
            for key in keys
            if key not in ("_step_count", "_is_initial", "_get_lr_called_within_step")
            for found in _differences(saved.get(key), own.get(key), str(key))
        ]
    if isinstance(saved, (list, tuple)) and isinstance(own, (list, tuple)) and len(saved) == len(own):
        pairs = zip(saved, own, strict=True)
        return list(dict.fromkeys(found for a, b in pairs for found in _differences(a, b, name)))
    if isinstance(saved, (int, float)) and isinstance(own, (int, float)):
        return [] if math.isclose(saved, own, rel_tol=1e-9) else [f"{name} {saved:.6g} -> {own:.6g}"]
    if isinstance(saved, torch.Tensor) or isinstance(own, torch.Tensor):
        same = isinstance(saved, torch.Tensor) and isinstance(own, torch.Tensor) and torch.equal(saved, own)
        return [] if same else [name]
    return [] if saved == own else [f"{name} {saved!r} -> {own!r}"]


def _shown(rates: list[Any]) -> str:
    return ", ".join(f"{float(rate):.4g}" for rate in dict.fromkeys(rates))


def check_step(argument: str, stepper: Any) -> None:
    """Checks that `step()` of an optimizer or scheduler can be called without arguments.

    Args:
        argument: how the error calls it.
        stepper: the optimizer or scheduler.

    Raises:
        TypeError: it can't.
    """
    # Of the class: schedulers put a function of their own in place of their optimizer's method.
    _, *parameters = inspect.signature(type(stepper).step).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in _VARIADIC
    ]
    if needed:
        raise TypeError(
            f"{argument} is {type(stepper).__name__}, whose step() needs {', '.join(needed)}; GKTTrainer calls step() "
            "without arguments. Choose another, or train with GKT in a loop of your own"
        )


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class LinearWarmup:
    """Grows linearly to 1 over the first steps: step s, counted from 0, gets min((s + 1) / steps, 1).

    For `GKTTrainer`'s `kd_schedule`: soft labels of an untrained network teach nothing.

    Args:
        steps: length of the warm-up; 0: none.

    Raises:
        ValueError: steps is negative.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must be at least 0")

    def __call__(self, step: int) -> float:
        return min((step + 1) / self.steps, 1.0) if self.steps else 1.0
