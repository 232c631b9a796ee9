"""What each subnet of a trained network costs and how well it does, and which of them to deploy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..network.batch import take_apart
from ..network.discovery import Stages, as_stages
from ..network.inputs import first_rows, map_tensors, model_inputs
from ..network.profile import count_flops, one_sample
from ..subnets.subnet import Subnet
from .elastic import ElasticNetwork, share_weights
from .evaluation import evaluate
from .extraction import check_extracted, extract_subnet
from .latency import RUNTIMES, Latency, measure_latencies
from .onnx_graph import check_inputs
from .subnet_choice import choose_subnets

__all__ = [
    "SubnetResult",
    "best_subnet",
    "evaluate_subnets",
    "pareto_front",
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
        latencies: measured times; empty where they weren't asked for.
    """

    subnet: Subnet
    parameters: int
    flops: int
    accuracy: float
    loss: float
    mean_iou: float | None = None
    latencies: tuple[Latency, ...] = ()

    def milliseconds(self, runtime: str = "torch", batch_size: int = 1) -> float:
        """Median time of a batch.

        Raises:
            ValueError: it wasn't measured.
        """
        for latency in self.latencies:
            if (latency.runtime, latency.batch_size) == (runtime, batch_size):
                return latency.median_ms
        measured = ", ".join(f"{entry.runtime} at batch {entry.batch_size}" for entry in self.latencies)
        raise ValueError(
            f"{self.subnet} was not timed in {runtime} at batch {batch_size}; measured: {measured or 'nothing'} "
            "(evaluate_subnets(..., latency=True, latency_batch=...))"
        )

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks kept in each stage."""
        return self.subnet.depths


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
    latency: bool | Sequence[str] = False,
    latency_batch: int = 64,
    progress: bool = False,
) -> list[SubnetResult]:
    """Cuts out each subnet, estimates its BatchNorm statistics and evaluates it. The model is left as it was.

    An elastic network is evaluated at its own depths, with its own statistics.

    Args:
        model: the trained network, or an `ElasticNetwork`.
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
        latency: whether each is timed too on its device (`measure_latencies`), at batch 1 and at `latency_batch`, in
            torch and in onnxruntime where it is installed; or the runtimes to time it in, of "torch", "onnxruntime".
            Exporting to onnxruntime takes seconds for each subnet.
        latency_batch: the other batch size.
        progress: whether to show a progress bar, on a terminal.

    Returns:
        One result for each subnet, in their order.

    Raises:
        ValueError, TypeError: subnets don't fit the model, there is none of them, or the loader gave no row.
    """
    if isinstance(latency_batch, bool) or not isinstance(latency_batch, int) or latency_batch < 1:
        raise ValueError(f"latency_batch is {latency_batch!r}; it must be an integer of at least 1")
    if isinstance(model, ElasticNetwork):
        if calibration_loader is not None or stages is not None:
            raise ValueError("calibration_loader and stages are the elastic network's own; leave them out")
        chosen = list(model.subnets) if subnets is None else [model.subnet(depths) for depths in subnets]
    else:
        stages = as_stages(model, stages)
        if subnets is None:
            chosen = choose_subnets(stages, min_depth, max_subnets, seed)
        else:
            chosen = [Subnet.of(depths, stages) for depths in subnets]
    if not chosen:
        raise ValueError("subnets is empty; it must hold at least one subnet")
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("loader gave no row to evaluate")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    elastic = isinstance(model, ElasticNetwork)
    rows = first_rows(model_inputs(model.at(chosen[0]) if elastic else model, take_apart(first).inputs), 2)
    rows = map_tensors(lambda tensor: tensor.to(device), rows)
    example = one_sample(rows)
    if latency:
        check_inputs(rows)
    results = []
    for subnet in tqdm(chosen, desc="subnets", disable=None if progress else True):
        network = model.at(subnet) if elastic else extract_subnet(model, subnet, stages)
        if not elastic:
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
    if not latency:
        return results
    if isinstance(model, ElasticNetwork):
        networks = [model.at(subnet) for subnet in chosen]
    else:
        networks = share_weights(model, stages, chosen)
    runtimes = RUNTIMES if latency is True else latency
    latencies = measure_latencies(networks, first_rows(rows, 1), (1, latency_batch), runtimes)
    return [replace(result, latencies=times) for result, times in zip(results, latencies, strict=True)]


def pareto_front(
    results: Iterable[SubnetResult], cost: Callable[[SubnetResult], float] | None = None
) -> list[SubnetResult]:
    """The results that no other beats: each is more accurate than all that cost as much or less. Cheapest first.

    Args:
        results: of `evaluate_subnets`.
        cost: what a subnet costs, for example `SubnetResult.milliseconds`; None: its FLOPs.
    """
    cost = _flops if cost is None else cost
    front: list[SubnetResult] = []
    for result in sorted(results, key=lambda result: _cheapest(result, cost)):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front


def best_subnet(
    results: Iterable[SubnetResult],
    *,
    budget_flops: float | None = None,
    budget_ms: float | None = None,
    min_accuracy: float | None = None,
    runtime: str = "torch",
    batch_size: int = 1,
) -> SubnetResult:
    """The subnet to deploy.

    With a budget, the most accurate one that keeps to it (and reaches `min_accuracy`, if that is given too). With
    `min_accuracy` alone, the cheapest one that reaches it. With neither, the most accurate one. Among equals, the
    cheaper one: what takes fewer FLOPs, or less time where `budget_ms` is given.

    Args:
        results: of `evaluate_subnets`.
        budget_flops: most floating point operations of one sample's forward pass.
        budget_ms: most milliseconds for a batch, as measured (`evaluate_subnets(..., latency=True)`).
        min_accuracy: least accuracy, 0 to 1.
        runtime: in which `budget_ms` counts, "torch" or "onnxruntime".
        batch_size: for which it counts.

    Raises:
        ValueError: results is empty, an argument is out of its range, times weren't measured, or no subnet qualifies;
            the message says what the nearest ones reach.
    """
    results = list(results)
    if not results:
        raise ValueError("results is empty; it must hold at least one result of evaluate_subnets")
    if budget_flops is not None and not budget_flops > 0:
        raise ValueError(f"budget_flops is {budget_flops}; it must be greater than 0")
    if budget_ms is not None and not budget_ms > 0:
        raise ValueError(f"budget_ms is {budget_ms}; it must be greater than 0")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise ValueError(f"min_accuracy is {min_accuracy}; it must be between 0 and 1")

    def milliseconds(result: SubnetResult) -> float:
        return result.milliseconds(runtime, batch_size)

    cost = _flops if budget_ms is None else milliseconds
    affordable = results
    for name, budget, of, unit in (
        ("budget_flops", budget_flops, _flops, ""),
        ("budget_ms", budget_ms, milliseconds, " ms"),
    ):
        if budget is None:
            continue
        within = [result for result in affordable if of(result) <= budget]
        if not within:
            least = min(affordable, key=lambda result: _cheapest(result, of))
            raise ValueError(
                f"{name} is {budget:.4g}; the cheapest subnet, {least.subnet}, takes {of(least):.4g}{unit}"
            )
        affordable = within
    good = [r for r in affordable if min_accuracy is None or r.accuracy >= min_accuracy]
    if not good:
        best = min(affordable, key=lambda result: _most_accurate(result, cost))
        limits = [f"{budget_flops:.4g} FLOPs"] if budget_flops is not None else []
        limits += [f"{budget_ms:.4g} ms"] if budget_ms is not None else []
        within = f" with at most {' and '.join(limits)}" if limits else ""
        raise ValueError(
            f"min_accuracy is {min_accuracy:.4g}; the most accurate subnet{within}, {best.subnet}, "
            f"reaches {best.accuracy:.4g}"
        )
    only_accuracy = min_accuracy is not None and budget_flops is None and budget_ms is None
    return min(good, key=lambda result: (_cheapest if only_accuracy else _most_accurate)(result, cost))


def _flops(result: SubnetResult) -> float:
    return result.flops


def _cheapest(result: SubnetResult, cost: Callable[[SubnetResult], float]) -> tuple[float, float, int]:
    return cost(result), -result.accuracy, result.parameters


def _most_accurate(result: SubnetResult, cost: Callable[[SubnetResult], float]) -> tuple[float, float, int]:
    return -result.accuracy, cost(result), result.parameters
