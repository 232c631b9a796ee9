"""Accuracy of a network, or of one of its subnets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import average_batch_norm, reduce_sum, unsynchronized_batch_norm, world_size
from ..network.batch import take_apart
from ..network.calls import logits_of
from ..network.discovery import Stages
from ..network.inputs import call_model, map_tensors, model_inputs
from ..network.look import look
from ..subnets.subnet import Subnet
from .calibration import recalibrate_batch_norm
from .elastic import ElasticNetwork
from .extraction import active_subnet

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Result over a loader.

    Args:
        accuracy: share of rows whose largest logit is the target's, 0 to 1; of targets that are labels (B, C), the
            share of labels that are right, where a positive logit says yes.
        loss: mean cross entropy, or mean of the criterion.
        samples: number of rows: images, or positions of a dense prediction; of all ranks.
        mean_iou: of dense predictions, the mean over the classes that occur of intersection over union, 0 to 1;
            None where targets are one per image.
    """

    accuracy: float
    loss: float
    samples: int
    mean_iou: float | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    depths: Subnet | Sequence[int] | None = None,
    *,
    stages: Stages | None = None,
    calibration_loader: Iterable[Any] | None = None,
    calibration_samples: int = 2000,
    ignore_index: int = -100,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
    autocast: AbstractContextManager | None = None,
) -> Evaluation:
    """Accuracy and loss in evaluation mode.

    The model is left as it was, down to the modes of its modules and what their forwards store (but not what hooks
    store elsewhere), and so are the random number generators.

    In a distributed run every rank calls this with its own share of the samples (`gkt_fast.distributed.share`), and
    every rank gets the result over all of them; BatchNorm statistics are estimated on the batches of all ranks.

    Args:
        model: the network; an `ElasticNetwork` runs at the depths, with its own statistics.
        loader: (inputs, class indices) batches, or mappings with "labels" (see `gkt_fast.network.batch`); class
            indices (B,), or (B, *spatial) of dense predictions. With a criterion also labels (B, C) floating point
            between 0 and 1 in place of class indices.
        depths: evaluate this subnet; None: the full network.
        stages: the model's stages; None: found automatically.
        calibration_loader: training batches on which BatchNorm's statistics are estimated for this evaluation alone
            (`recalibrate_batch_norm`); None: the model's own statistics.
        calibration_samples: how many of its samples to use, over all ranks.
        ignore_index: rows with this target don't count.
        criterion: (logits, targets) -> mean over the batch, instead of cross entropy.
        autocast: context to run the model in.

    Raises:
        ValueError: the loader gave no row, or the depths or the targets' shape don't fit.
        TypeError: a batch has another form, or targets are no class indices and there is no criterion.
    """
    if isinstance(model, ElasticNetwork):
        if calibration_loader is not None or stages is not None:
            raise ValueError("calibration_loader and stages are the elastic network's own; leave them out")
        model, depths = model.at(depths), None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    overlap: Tensor | None = None
    with look(model, training=None, hooks=False, compiled=True):
        correct, loss, samples = torch.zeros(3, dtype=torch.float64, device=device)
        if calibration_loader is not None:
            samples_here = -(-calibration_samples // world_size())
            with unsynchronized_batch_norm(model):
                recalibrate_batch_norm(model, calibration_loader, samples_here, depths, stages)
            average_batch_norm(model)
        model.eval()
        with nullcontext() if depths is None else active_subnet(model, depths, stages):
            for whole in loader:
                batch = take_apart(map_tensors(lambda tensor: tensor.to(device), whole))
                targets = batch.targets
                with autocast or nullcontext():
                    logits = logits_of(call_model(model, model_inputs(model, batch.inputs))).float()
                labels = criterion is not None and isinstance(targets, Tensor) and targets.is_floating_point()
                if not labels:
                    _check_class_indices(targets, logits)
                if criterion is not None:
                    loss += criterion(logits, targets) * len(targets)
                if labels:
                    right = (logits > 0) == (targets > 0.5)
                    samples += len(targets)
                    correct += right.flatten(1).double().mean(1).sum()
                    continue
                rows, predicted = targets != ignore_index, logits.argmax(1)
                samples += rows.sum()
                correct += ((predicted == targets) & rows).sum()
                if targets.dim() > 1:
                    counts = _count_overlap(predicted, targets, rows, logits.shape[1])
                    overlap = counts if overlap is None else overlap + counts
                if criterion is None:
                    loss += F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    sums = torch.stack([correct, loss, samples])
    # A rank without a batch doesn't know how many classes there are, but takes part in every reduction.
    here = torch.tensor([0, 0] if overlap is None else [overlap.shape[1], 1], dtype=sums.dtype, device=device)
    hits, total, count, classes, dense_ranks = reduce_sum(torch.cat([sums, here])).tolist()
    if count == 0:
        raise ValueError("loader gave no row to evaluate")
    mean_iou = None
    if dense_ranks:
        nothing = torch.zeros(3, round(classes / dense_ranks), dtype=torch.int64, device=device)
        mean_iou = _mean_iou(reduce_sum(nothing if overlap is None else overlap))
    return Evaluation(hits / count, total / count, int(count), mean_iou)


def _check_class_indices(targets: Any, logits: Tensor) -> None:
    """Checks the targets of an evaluation.

    Raises:
        TypeError, ValueError: they are probabilities, or of another shape.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}; it must be a tensor of class indices")
    shape = tuple(logits.shape[:1] + logits.shape[2:])
    if targets.is_floating_point():
        hint = "; of class probabilities, targets.argmax(1) are the indices" if targets.dim() > 1 else ""
        raise TypeError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}; accuracy is counted over class indices, "
            f"int64 of shape {shape}{hint}"
        )
    if targets.shape != shape:
        squeezed = targets.dim() == len(shape) + 1 and targets.shape[1] == 1
        hint = "; use targets.squeeze(1)" if squeezed else ""
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; class indices must have shape {shape} for logits of shape "
            f"{tuple(logits.shape)}{hint}"
        )


def _count_overlap(predicted: Tensor, targets: Tensor, rows: Tensor, classes: int) -> Tensor:
    """(3, C): how often each class is target and predicted, target, predicted; `rows` says what counts."""
    counts = torch.zeros(3, classes, dtype=torch.int64, device=targets.device)
    inside = targets.clamp(0, classes - 1).flatten()
    counts[0].index_add_(0, inside, ((predicted == targets) & rows).flatten().long())
    counts[1].index_add_(0, inside, rows.flatten().long())
    counts[2].index_add_(0, predicted.flatten(), rows.flatten().long())
    return counts


def _mean_iou(overlap: Tensor) -> float:
    intersection, targets, predicted = overlap
    union = targets + predicted - intersection
    return float((intersection / union)[union > 0].mean())
