"""What each subnet of a trained network costs and how well it does, and which of them to deploy."""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..config import GKTConfig
from ..network.batch import take_apart
from ..network.discovery import Stages, as_stages
from ..network.inputs import first_rows, map_tensors, model_inputs
from ..network.profile import count_flops, one_sample
from ..subnets.sampling import minimum_depths
from ..subnets.subnet import Stage, Subnet
from .evaluation import evaluate
from .extraction import check_extracted, extract_subnet

__all__ = [
    "SubnetResult",
    "best_subnet",
    "choose_subnets",
    "evaluate_subnets",
    "pareto_front",
    "plot_subnets",
    "write_subnets_csv",
]


@dataclass(frozen=True)
class SubnetResult:
    """A row of the table.

    Args:
        subnet: which blocks are kept.
        parameters: number of parameters.
        flops: floating point operations of one sample's forward pass (a multiply-add is two), by torch's counter.
        accuracy: top-1 accuracy, 0 to 1; of dense predictions, over all positions.
        loss: mean cross entropy.
        mean_iou: see `Evaluation`.
    """

    subnet: Subnet
    parameters: int
    flops: int
    accuracy: float
    loss: float
    mean_iou: float | None = None

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks kept in each stage."""
        return self.subnet.depths


def choose_subnets(
    stages: Sequence[Stage], min_depth: int | Sequence[int] = 1, max_subnets: int = 64, seed: int = 0
) -> list[Subnet]:
    """Subnets that show what a network can do: all ordered ones if they are no more than `max_subnets`.

    Otherwise: the full network; a nested chain from it to the smallest subnet, each with one block less than the one
    before, taken from the stage that has kept the largest share of its blocks (every n-th link, where the chain alone
    is longer than `max_subnets`); and for the rest ordered subnets drawn at random, all alike.

    Args:
        stages: the network's stages.
        min_depth: smallest depth of a stage, as in `GKTConfig`; subnets below what was trained do badly.
        max_subnets: how many at most.
        seed: of the random ones.

    Returns:
        Distinct subnets, those with more blocks first.

    Raises:
        ValueError: max_subnets is not positive, or min_depth doesn't fit the stages.
    """
    if max_subnets < 1:
        raise ValueError(f"max_subnets is {max_subnets}; it must be at least 1")
    min_depth = min_depth if isinstance(min_depth, int) else tuple(min_depth)
    least = minimum_depths(stages, GKTConfig(min_depth=min_depth))
    choices = [range(m, stage.depth + 1) for m, stage in zip(least, stages, strict=True)]
    total = math.prod(map(len, choices))
    if total <= max_subnets:
        chosen = set(itertools.product(*choices))
    else:
        chain = _chain(choices)
        step = (len(chain) - 1) / max(max_subnets - 1, 1)
        chosen = set(chain if step <= 1 else [chain[round(i * step)] for i in range(max_subnets)])
        for index in random.Random(seed).sample(range(total), max_subnets):
            if len(chosen) == max_subnets:
                break
            chosen.add(_decode(index, choices))
    ordered = sorted(chosen, key=lambda depths: (sum(depths), depths), reverse=True)
    return [Subnet.ordered(depths, stages) for depths in ordered]


def _chain(choices: Sequence[range]) -> list[tuple[int, ...]]:
    """From the deepest to the shallowest depths, one block less at a time; of equal stages the last gives first."""
    depths = [choice[-1] for choice in choices]
    chain = [tuple(depths)]
    while True:
        shares = [
            (depth / choice[-1] if depth > choice[0] else -1.0, i)
            for i, (depth, choice) in enumerate(zip(depths, choices, strict=True))
        ]
        share, stage = max(shares)
        if share < 0:
            return chain
        depths[stage] -= 1
        chain.append(tuple(depths))


def _decode(index: int, choices: Sequence[range]) -> tuple[int, ...]:
    """The index-th combination of the choices."""
    depths = []
    for choice in choices:
        index, position = divmod(index, len(choice))
        depths.append(choice[position])
    return tuple(depths)


def evaluate_subnets(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    subnets: Iterable[Subnet | Sequence[int]] | None = None,
    *,
    stages: Stages | None = None,
    min_depth: int | Sequence[int] = 1,
    max_subnets: int = 64,
    seed: int = 0,
    calibration_loader: Iterable[Any] | None = None,
    calibration_samples: int = 2000,
    ignore_index: int = -100,
    autocast: AbstractContextManager | None = None,
    progress: bool = False,
) -> list[SubnetResult]:
    """Cuts out each subnet, estimates its BatchNorm statistics and evaluates it. The model is left as it was.

    Args:
        model: the trained network.
        loader: (images, class indices) batches, as of `evaluate`; gone through once for every subnet.
        subnets: depths or `Subnet`s; None: `choose_subnets`, by the next three arguments.
        stages: the model's stages, or their module paths; None: found automatically.
        min_depth: smallest depth of a stage.
        max_subnets: how many subnets at most.
        seed: of subnets drawn at random.
        calibration_loader: training batches on which BatchNorm's statistics are estimated anew for every subnet,
            the full network included (`recalibrate_batch_norm`); None: all keep the model's.
        calibration_samples: how many of its samples to use.
        ignore_index: rows with this target don't count.
        autocast: context to run the model in.
        progress: whether to show a progress bar, on a terminal.

    Returns:
        One result for each subnet, in their order.

    Raises:
        ValueError, TypeError: subnets don't fit the model, there is none of them, or the loader gave no row.
    """
    stages = as_stages(model, stages)
    if subnets is None:
        chosen = choose_subnets(stages, min_depth, max_subnets, seed)
    else:
        chosen = [Subnet.of(depths, stages) for depths in subnets]
    if not chosen:
        raise ValueError("subnets is empty; it must hold at least one subnet")
    rows = next((first_rows(model_inputs(model, take_apart(batch).inputs), 2) for batch in loader), None)
    if rows is None:
        raise ValueError("loader gave no row to evaluate")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    rows = map_tensors(lambda tensor: tensor.to(device), rows)
    example = one_sample(rows)
    results = []
    for subnet in tqdm(chosen, desc="subnets", disable=None if progress else True):
        network = extract_subnet(model, subnet, stages)
        with autocast or nullcontext():
            check_extracted(network, model, subnet, stages, rows)
        result = evaluate(
            network,
            loader,
            calibration_loader=calibration_loader,
            calibration_samples=calibration_samples,
            ignore_index=ignore_index,
            autocast=autocast,
        )
        parameters = sum(parameter.numel() for parameter in network.parameters())
        flops = count_flops(network, example)
        results.append(SubnetResult(subnet, parameters, flops, result.accuracy, result.loss, result.mean_iou))
    return results


def pareto_front(results: Iterable[SubnetResult]) -> list[SubnetResult]:
    """The results that no other beats: each is more accurate than all that cost as much or less. Cheapest first."""
    front: list[SubnetResult] = []
    for result in sorted(results, key=_cheapest):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front


def best_subnet(
    results: Iterable[SubnetResult],
    *,
    budget_flops: float | None = None,
    min_accuracy: float | None = None,
) -> SubnetResult:
    """The subnet to deploy.

    With a budget, the most accurate one that keeps to it (and reaches `min_accuracy`, if that is given too). With
    `min_accuracy` alone, the cheapest one that reaches it. With neither, the most accurate one. Of equals the cheaper.

    Args:
        results: of `evaluate_subnets`.
        budget_flops: most floating point operations of one sample's forward pass.
        min_accuracy: least accuracy, 0 to 1.

    Raises:
        ValueError: results is empty, an argument is out of its range, or no subnet qualifies; the message says what
            the nearest ones reach.
    """
    results = list(results)
    if not results:
        raise ValueError("results is empty; it must hold at least one result of evaluate_subnets")
    if budget_flops is not None and not budget_flops > 0:
        raise ValueError(f"budget_flops is {budget_flops}; it must be greater than 0")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise ValueError(f"min_accuracy is {min_accuracy}; it must be between 0 and 1")
    affordable = [r for r in results if budget_flops is None or r.flops <= budget_flops]
    if not affordable:
        least = min(results, key=_cheapest)
        raise ValueError(
            f"budget_flops is {budget_flops:.4g}; the cheapest subnet, {least.subnet}, takes {least.flops:.4g}"
        )
    good = [r for r in affordable if min_accuracy is None or r.accuracy >= min_accuracy]
    if not good:
        best = min(affordable, key=_most_accurate)
        within = "" if budget_flops is None else f" with at most {budget_flops:.4g} FLOPs"
        raise ValueError(
            f"min_accuracy is {min_accuracy:.4g}; the most accurate subnet{within}, {best.subnet}, "
            f"reaches {best.accuracy:.4g}"
        )
    only_accuracy = min_accuracy is not None and budget_flops is None
    return min(good, key=_cheapest if only_accuracy else _most_accurate)


def _cheapest(result: SubnetResult) -> tuple[float, float, int]:
    return result.flops, -result.accuracy, result.parameters


def _most_accurate(result: SubnetResult) -> tuple[float, float, int]:
    return -result.accuracy, result.flops, result.parameters


def write_subnets_csv(results: Sequence[SubnetResult], path: str | Path) -> None:
    """Writes the table; `pareto` is 1 for the results on the Pareto front, `mean_iou` empty where there is none."""
    front = pareto_front(results)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["depths", "parameters", "flops", "accuracy", "loss", "mean_iou", "pareto"])
        for r in results:
            iou = "" if r.mean_iou is None else r.mean_iou
            writer.writerow([r.subnet, r.parameters, r.flops, r.accuracy, r.loss, iou, int(r in front)])


def plot_subnets(
    results: Sequence[SubnetResult], path: str | Path, title: str = "", best: SubnetResult | None = None
) -> None:
    """Draws accuracy against FLOPs: all results, a line through the Pareto front, the full network. Needs matplotlib.

    Args:
        results: of `evaluate_subnets`.
        path: picture to write; its ending says the format.
        title: above the picture.
        best: the result that was chosen, to be marked.
    """
    from matplotlib.figure import Figure

    front = pareto_front(results)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [r.flops / 1e6 for r in results], [100 * r.accuracy for r in results], "o", alpha=0.5, label="subnets"
    )
    costs, accuracies = [r.flops / 1e6 for r in front], [100 * r.accuracy for r in front]
    axes.step(costs, accuracies, where="post", marker="o", color="tab:orange", label="Pareto front")
    for result, cost, accuracy in zip(front, costs, accuracies, strict=True):
        axes.annotate(
            str(result.subnet), (cost, accuracy), xytext=(4, -10), textcoords="offset points", fontsize=7
        )
    marked = [("full network", "s", r) for r in results if r.subnet.is_full]
    marked += [] if best is None else [("chosen", "*", best)]
    for label, marker, r in marked:
        axes.plot(
            r.flops / 1e6,
            100 * r.accuracy,
            marker,
            markersize=13,
            markerfacecolor="none",
            color="black",
            label=f"{label} ({r.subnet})",
        )
    axes.set_xlabel("forward cost (MFLOPs per sample)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
