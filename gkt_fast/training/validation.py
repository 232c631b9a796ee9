"""What is evaluated after every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..deployment.evaluation import Evaluation
from ..subnets.subnet import Stage, Subnet

__all__ = ["Validation", "named_subnet"]


@dataclass(frozen=True)
class Validation:
    """Evaluates the network, its averaged weights and some of its subnets.

    Args:
        evaluate: `GKTTrainer.evaluate`.
        loader: (images, class indices) batches; None: nothing is evaluated.
        subnets: those to evaluate.
        calibration_loader: images for the subnets' BatchNorm statistics.
        averaged: whether there are averaged weights to evaluate.
        calibrate_full: whether the full network is evaluated with such statistics too.

    Raises:
        ValueError: there are subnets and no loader.
    """

    evaluate: Callable[..., Evaluation]
    loader: Iterable[tuple[Tensor, Tensor]] | None
    subnets: Sequence[Subnet]
    calibration_loader: Iterable[Any]
    averaged: bool
    calibrate_full: bool = False

    def __post_init__(self) -> None:
        if self.subnets and self.loader is None:
            raise ValueError(
                "val_depths is given and val_loader is None; subnets are evaluated on the val_loader"
            )

    def metrics(self) -> dict[str, float]:
        """The metrics of the epoch that has just been trained; their names begin with `val_`."""
        if self.loader is None:
            return {}
        options = {"calibration_loader": self.calibration_loader} if self.calibrate_full else {}
        full = self.evaluate(self.loader, **options)
        metrics = {"val_accuracy": full.accuracy, "val_loss": full.loss}
        if self.averaged:
            averaged = self.evaluate(self.loader, ema=True, **options)
            metrics |= {"val_accuracy_ema": averaged.accuracy, "val_loss_ema": averaged.loss}
        for subnet in self.subnets:
            evaluation = self.evaluate(self.loader, subnet, calibration_loader=self.calibration_loader)
            metrics[f"val_accuracy_{subnet}"] = evaluation.accuracy
        return metrics


def named_subnet(argument: str, depths: Subnet | Sequence[int], stages: Sequence[Stage]) -> Subnet:
    """The subnet of these depths.

    Raises:
        ValueError: they don't fit the stages; the message begins with the name of the argument that they came from.
    """
    try:
        return Subnet.of(depths, stages)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
