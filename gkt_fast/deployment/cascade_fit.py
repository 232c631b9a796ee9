"""Chooses a cascade's depths and thresholds on validation data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.calls import logits_of
from ..subnets.subnet import Subnet
from .cascade import Cascade, check_confidence, confidence_of, nested_order
from .elastic import ElasticNetwork

__all__ = ["fit_cascade"]

TINY = 1e-12
"""Rounding that doesn't count in a comparison."""

MAX_EARLY_EXITS = 3
"""Of the combinations of depths that are tried, beside all of them together."""


def fit_cascade(
    elastic: ElasticNetwork,
    val_loader: Iterable[tuple[Tensor, Tensor]],
    max_drop: float | None = None,
    max_cost: float | None = None,
    *,
    order: Sequence[Subnet | Sequence[int]] | None = None,
    confidence: str = "probability",
    temperature_scaling: bool = False,
) -> Cascade:
    """The cascade that costs least for an accuracy, or is most accurate for a cost, on validation data.

    The last depth is always in it; which of the smaller ones are, is chosen with the thresholds. They are chosen on
    these very data: with few of them, expect a little less on others. The result's `evaluation` is measured on them.

    Args:
        elastic: the network, in evaluation mode.
        val_loader: (images, class indices (B,)) batches; gone through twice.
        max_drop: how many percentage points of accuracy below the last depth it may be; cheapest such cascade. The
            default, 0.5, where max_cost isn't given either.
        max_cost: largest mean FLOPs of a row, as a share of those of the last depth alone; most accurate such cascade.
        order: depths to choose from, smallest first, each within the next; None: all of the network's.
        confidence: "probability", "margin" or "entropy" (`confidence_of`).
        temperature_scaling: whether each depth's logits are divided by the temperature that minimises its cross
            entropy on the data first (Guo et al., ICML 2017). It makes the confidences probabilities to rely on.

    Raises:
        ValueError: an argument is out of its range, both max_drop and max_cost are given, the order isn't nested, the
            loader gave no row, or max_cost is below what the smallest depth takes; the message names the least.
        TypeError: val_loader is an iterator, which can be gone through once only.
    """
    if max_drop is not None and max_cost is not None:
        raise ValueError("max_drop and max_cost are both given; give one of them")
    max_drop = 0.5 if max_drop is None and max_cost is None else max_drop
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise ValueError(f"max_drop is {max_drop}; it must be between 0 and 100, in percentage points")
    if max_cost is not None and not 0 < max_cost < math.inf:
        raise ValueError(
            f"max_cost is {max_cost}; it must be greater than 0: a share of the last depth's cost"
        )
    check_confidence(confidence)
    if isinstance(val_loader, Iterator):
        raise TypeError(
            "val_loader is an iterator, and is gone through twice; give a DataLoader or a list of batches"
        )
    subnets = nested_order(elastic, order)
    logits, targets, example = _collect(elastic, subnets, val_loader)
    temperatures = [_temperature(z, targets) if temperature_scaling else 1.0 for z in logits]
    sure = torch.stack([confidence_of(z / t, confidence) for z, t in zip(logits, temperatures, strict=True)])
    correct = torch.stack([z.argmax(1) == targets for z in logits]).double()
    full_cost = sum(Cascade(elastic, subnets[-1:]).flops(example))
    best: tuple[tuple[float, float], list[int], list[float]] | None = None
    least = math.inf
    for chosen in _combinations(len(subnets)):
        untried = Cascade(elastic, [subnets[i] for i in chosen], [1.0] * (len(chosen) - 1))
        costs = torch.tensor(untried.flops(example), dtype=torch.float64) / full_cost
        exits = _Exits(sure[chosen], correct[chosen], costs)
        least = min(least, float(costs[0]))
        if max_cost is None:
            found = exits.cheapest(float(correct[-1].mean()) - max_drop / 100)
        else:
            found = exits.most_accurate(max_cost)
        if found is not None:
            thresholds, accuracy, cost = found
            score = (cost, -accuracy) if max_cost is None else (-accuracy, cost)
            if best is None or score < best[0]:
                best = score, chosen, thresholds
    if best is None:
        raise ValueError(f"max_cost is {max_cost}; the least is {least:.3g}, the cost of depths {subnets[0]}")
    _, chosen, thresholds = best
    cascade = Cascade(
        elastic,
        [subnets[i] for i in chosen],
        thresholds,
        confidence=confidence,
        temperatures=[temperatures[i] for i in chosen],
    )
    cascade.evaluation = cascade.evaluate(val_loader)
    return cascade


@torch.no_grad()
def _collect(
    elastic: ElasticNetwork, subnets: Sequence[Subnet], loader: Iterable[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every depth's logits (N, C) on the CPU, the targets, and some images."""
    if elastic.training:
        raise RuntimeError(
            "the network is in training mode, in which rows depend on each other; call .eval()"
        )
    device = next((p.device for p in elastic.parameters()), torch.device("cpu"))
    logits: list[list[Tensor]] = [[] for _ in subnets]
    targets, example = [], None
    for images, classes in loader:
        images = images.to(device)
        example = images[:4] if example is None else example
        for collected, subnet in zip(logits, subnets, strict=True):
            scores = logits_of(elastic(images, depths=subnet))
            if scores.dim() != 2:
                raise ValueError(
                    f"the network returns logits of shape {tuple(scores.shape)}; a cascade needs (B, C)"
                )
            collected.append(scores.float().cpu())
        targets.append(classes.cpu())
    if example is None:
        raise ValueError("val_loader gave no row")
    return [torch.cat(z) for z in logits], torch.cat(targets), example


def _temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature between 0.05 and 20 that minimises the cross entropy, by golden section on its logarithm."""
    low, high = math.log(0.05), math.log(20.0)
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), targets))

    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def _combinations(depths: int) -> list[list[int]]:
    """Which depths a cascade may be made of; the last is always one of them."""
    early = range(depths - 1)
    sizes = {*range(min(MAX_EARLY_EXITS, depths - 1) + 1), depths - 1}
    return [[*some, depths - 1] for size in sorted(sizes) for some in itertools.combinations(early, size)]


@dataclass
class _Exits:
    """Rows of validation data and what every exit makes of them.

    Args:
        sure: (K, N), how sure each exit is.
        correct: (K, N) float64, 1 where it is right.
        costs: (K,) float64, what each exit adds.
    """

    sure: Tensor
    correct: Tensor
    costs: Tensor

    def cheapest(self, least_accuracy: float) -> tuple[list[float], float, float] | None:
        """Thresholds, accuracy and cost; None where no way of leaving is accurate enough."""
        return self._best(
            lambda accuracy, cost: (cost, -accuracy), lambda accuracy, _: accuracy >= least_accuracy - 1e-12
        )

    def most_accurate(self, most_cost: float) -> tuple[list[float], float, float] | None:
        """Thresholds, accuracy and cost; None where the first exit alone costs more."""
        return self._best(lambda accuracy, cost: (-accuracy, cost), lambda _, cost: cost <= most_cost + TINY)

    def _best(self, score, allowed) -> tuple[list[float], float, float] | None:
        best = None
        for weight in (0.0, *torch.logspace(-3, 1, 17).tolist(), math.inf):
            thresholds = self._weighed(weight)
            for candidate in self._neighbours(thresholds):
                accuracy, cost = self.outcome(candidate)
                if allowed(accuracy, cost) and (best is None or score(accuracy, cost) < score(*best[1:])):
                    best = list(candidate), accuracy, cost
        return best

    def outcome(self, thresholds: Sequence[float]) -> tuple[float, float]:
        """Accuracy and mean cost."""
        correct, cost = self._after(thresholds, 0)
        return float(correct.mean()), float(cost.mean())

    def _after(self, thresholds: Sequence[float], exit: int) -> tuple[Tensor, Tensor]:
        """(N,) each: whether a row that reaches the exit ends right, and what it costs from there on."""
        correct, cost = self.correct[-1], self.costs[-1].expand_as(self.correct[-1])
        for i in range(len(self.costs) - 2, exit - 1, -1):
            leaves = self.sure[i] >= thresholds[i]
            correct = torch.where(leaves, self.correct[i], correct)
            cost = self.costs[i] + torch.where(leaves, 0.0, cost)
        return correct, cost

    def _weighed(self, weight: float, rounds: int = 4) -> list[float]:
        """Thresholds that make accuracy less weight times cost as large as can be, one threshold after another."""
        exits = len(self.costs) - 1
        thresholds = [0.0 if weight == math.inf else 1.0] * exits
        if weight in (0.0, math.inf):
            return thresholds
        for _ in range(rounds):
            before = list(thresholds)
            for i in range(exits):
                gains = self._gains(thresholds, i, weight)
                thresholds[i] = gains[0][int(gains[1].argmax())].item()
            if thresholds == before:
                break
        return thresholds

    def _gains(self, thresholds: Sequence[float], i: int, weight: float) -> tuple[Tensor, Tensor]:
        """Candidates for a threshold, and what leaving at it gains over never leaving there."""
        reaching = torch.ones_like(self.sure[0], dtype=torch.bool)
        for j in range(i):
            reaching &= self.sure[j] < thresholds[j]
        correct, cost = self._after(thresholds, i + 1)
        gain = (self.correct[i] - correct + weight * cost)[reaching]
        values, order = self.sure[i][reaching].sort(descending=True)
        total = torch.cat([torch.zeros(1, dtype=gain.dtype), gain[order].cumsum(0)])
        candidates = torch.cat([torch.ones(1), values])
        # Rows that are equally sure leave together: of equal candidates the last one counts.
        last = torch.cat([candidates[1:] != candidates[:-1], torch.ones(1, dtype=torch.bool)])
        return candidates[last], total[last]

    def _neighbours(self, thresholds: list[float], count: int = 41) -> Iterator[list[float]]:
        """The thresholds themselves, and those with one of them at some quantile instead."""
        yield thresholds
        quantiles = torch.linspace(0, 1, count)
        for i in range(len(thresholds)):
            for value in self.sure[i].float().quantile(quantiles, interpolation="higher").tolist():
                yield [*thresholds[:i], min(max(value, 0.0), 1.0), *thresholds[i + 1 :]]
