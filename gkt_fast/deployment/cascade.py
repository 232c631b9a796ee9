"""A cascade: rows that a smaller depth is sure of are done, the others go on to a larger one."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..subnets.subnet import Subnet
from .continuation import Continuation, Run
from .elastic import ElasticNetwork

__all__ = ["CONFIDENCES", "Cascade", "CascadeEvaluation", "CascadeResult", "confidence_of"]

CONFIDENCES = ("probability", "margin", "entropy")
"""How sure a depth is of a row: 0 to 1, see `confidence_of`."""


@dataclass(frozen=True)
class CascadeResult:
    """What a cascade makes of a batch.

    Args:
        logits: (B, C), each row's of the depth at which it left, divided by that exit's temperature.
        exits: (B,) int64, the number of that depth in the cascade's `order`.
        confidence: (B,) float32, how sure that depth was.
    """

    logits: Tensor
    exits: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class CascadeEvaluation:
    """Result over a loader.

    Args:
        accuracy: share of rows whose largest logit is the target's, 0 to 1.
        shares: for every exit the share of rows that leave there.
        mean_flops: floating point operations of a row's way, on average.
        milliseconds: measured time for a row, on average, in the loader's batches.
        samples: number of rows.
    """

    accuracy: float
    shares: tuple[float, ...]
    mean_flops: float
    milliseconds: float
    samples: int


class Cascade(nn.Module):
    """Runs an elastic network's depths in turn; rows leave where a depth is sure of them.

    What a depth shares with the one before it (the states of `gkt_fast.subnets.plan`) isn't computed again: a network
    of one long stage, such as a ViT, goes on from the activation at the exit. Rows that have left aren't computed.

    For inference: gradients are off, and the network must be in evaluation mode. The first call looks at the network
    and checks that going on gives what each depth gives alone. Calls from several threads at once are safe.

    Args:
        elastic: the network; shared, not copied.
        order: depths of it, smallest first, each within the next; None: all of them.
        thresholds: for every depth but the last how sure it must be of a row that leaves, 0 to 1.
        confidence: "probability", "margin" or "entropy" (`confidence_of`).
        temperatures: for every depth what its logits are divided by (Guo et al., ICML 2017); None: 1.

    Raises:
        ValueError: a depth isn't among the network's, the order isn't nested, a threshold is outside of [0, 1], or
            a number of values doesn't fit the order.
    """

    def __init__(
        self,
        elastic: ElasticNetwork,
        order: Sequence[Subnet | Sequence[int]] | None = None,
        thresholds: Sequence[float] = (),
        *,
        confidence: str = "probability",
        temperatures: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(elastic, ElasticNetwork):
            raise TypeError(
                f"elastic is {type(elastic).__name__}; it must be an ElasticNetwork (make_elastic)"
            )
        self.elastic = elastic
        self.order = nested_order(elastic, order)
        self.thresholds = tuple(map(float, thresholds))
        if len(self.thresholds) != len(self.order) - 1:
            raise ValueError(
                f"thresholds has {len(self.thresholds)} entries; it must have one for every depth of the order but the "
                f"last: {len(self.order) - 1}"
            )
        for value in self.thresholds:
            if not 0 <= value <= 1:
                raise ValueError(f"thresholds has the entry {value}; it must be between 0 and 1")
        check_confidence(confidence)
        self.confidence = confidence
        self.temperatures = (
            (1.0,) * len(self.order) if temperatures is None else tuple(map(float, temperatures))
        )
        if len(self.temperatures) != len(self.order):
            raise ValueError(
                f"temperatures has {len(self.temperatures)} entries; it must have one for every depth of the order: "
                f"{len(self.order)}"
            )
        for value in self.temperatures:
            if not 0 < value < math.inf:
                raise ValueError(f"temperatures has the entry {value}; it must be greater than 0")
        self.evaluation: CascadeEvaluation | None = None
        self._prepared: tuple[int, Continuation] | None = None

    @torch.no_grad()
    def forward(self, *inputs: Any) -> CascadeResult:
        """Classifies a batch.

        Args:
            inputs: of the network, batch first; it must return logits (B, C), bare or as `logits_of` finds them.

        Raises:
            RuntimeError: the network is in training mode.
            ValueError: its logits aren't (B, C), or it can't go on from a smaller depth; the message says why.
        """
        if self.elastic.training:
            raise RuntimeError(
                "the network is in training mode, in which rows depend on each other; call .eval()"
            )
        continuation = self._continuation(inputs)
        run = Run(inputs)
        rows = torch.arange(run.rows, device=next(v.device for v in inputs if isinstance(v, Tensor)))
        logits = exits = confidence = torch.empty(0)
        last = len(self.order) - 1
        for step, temperature in enumerate(self.temperatures):
            scores = continuation.advance(run) / temperature
            if scores.dim() != 2:
                raise ValueError(
                    f"the network returns logits of shape {tuple(scores.shape)}; a cascade needs (B, C)"
                )
            sure = confidence_of(scores, self.confidence)
            if step == 0:
                logits, confidence = scores, sure
                exits = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
                rows = rows.to(scores.device)
            else:
                logits[rows], confidence[rows], exits[rows] = scores, sure, step
            if step == last:
                break
            going = (sure < self.thresholds[step]).nonzero().flatten()
            if not len(going):
                break
            if len(going) < len(sure):
                run.keep_rows(going)
                rows = rows[going]
        return CascadeResult(logits, exits, confidence)

    def flops(self, *inputs: Any) -> tuple[int, ...]:
        """Floating point operations of one row that each depth of the order adds to those before it.

        Args:
            inputs: an example of the network's input.
        """
        return tuple(self._continuation(inputs).flops())

    def _continuation(self, inputs: tuple[Any, ...]) -> Continuation:
        prepared = self._prepared
        if prepared is None or prepared[0] != self.elastic.generation:
            prepared = self.elastic.generation, Continuation(self.elastic, self.order, inputs)
            self._prepared = prepared
        return prepared[1]

    @torch.no_grad()
    def evaluate(self, loader: Iterable[tuple[Tensor, Tensor]]) -> CascadeEvaluation:
        """Accuracy, how many rows leave where, mean cost and measured time.

        Args:
            loader: (images, class indices (B,)) batches. The time is that of batches as it gives them.

        Raises:
            ValueError: the loader gave no row.
        """
        device = next((p.device for p in self.elastic.parameters()), torch.device("cpu"))
        counts = torch.zeros(len(self.order), dtype=torch.int64)
        correct, seconds, steps = 0, 0.0, ()
        for images, targets in loader:
            images = images.to(device)
            if not steps:
                steps = self.flops(images)
                self(images)  # a first call is slower
            _synchronize(device)
            start = time.perf_counter()
            result = self(images)
            _synchronize(device)
            seconds += time.perf_counter() - start
            counts += result.exits.cpu().bincount(minlength=len(self.order))
            correct += int((result.logits.argmax(1).cpu() == targets.cpu()).sum())
        samples = int(counts.sum())
        if not samples:
            raise ValueError("loader gave no row to evaluate")
        reaching = counts.flip(0).cumsum(0).flip(0) / samples
        return CascadeEvaluation(
            correct / samples,
            tuple((counts / samples).tolist()),
            sum(float(share) * cost for share, cost in zip(reaching, steps, strict=True)),
            1e3 * seconds / samples,
            samples,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a file's metadata."""
        return {
            "order": [[list(row) for row in subnet.keep] for subnet in self.order],
            "thresholds": list(self.thresholds),
            "confidence": self.confidence,
            "temperatures": list(self.temperatures),
        }

    @classmethod
    def from_dict(cls, elastic: ElasticNetwork, settings: Mapping[str, Any]) -> Cascade:
        """The cascade that `to_dict` described."""
        order = [Subnet(tuple(map(tuple, keep))) for keep in settings["order"]]
        return cls(
            elastic,
            order,
            settings["thresholds"],
            confidence=settings["confidence"],
            temperatures=settings["temperatures"],
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}  # a copy looks at its own network


def nested_order(
    elastic: ElasticNetwork, order: Sequence[Subnet | Sequence[int]] | None
) -> tuple[Subnet, ...]:
    """The depths of a cascade; None: all of the network's.

    Raises:
        ValueError: one isn't among the network's, there is none, or one isn't within the next.
    """
    subnets = elastic.subnets if order is None else tuple(map(elastic.subnet, order))
    if not subnets:
        raise ValueError("order is empty; it must hold at least one depth")
    for small, large in itertools.pairwise(subnets):
        if small == large or not small.is_within(large):
            raise ValueError(
                f"order is {', '.join(map(str, subnets))}; it must be nested, smallest first, but {small} isn't a part "
                f"of {large}"
            )
    return subnets


def check_confidence(confidence: str) -> None:
    """Raises ValueError where it is none of `CONFIDENCES`."""
    if confidence not in CONFIDENCES:
        raise ValueError(
            f"confidence is {confidence!r}; it must be one of {', '.join(map(repr, CONFIDENCES))}"
        )


def confidence_of(logits: Tensor, kind: str) -> Tensor:
    """How sure logits (B, C) are of their class: (B,) float32 or float64, 0 to 1.

    "probability": the largest; "margin": the largest less the second; "entropy": 1 less the entropy in units of log C.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = logits.softmax(1)
    if logits.shape[1] == 1:
        return torch.ones_like(probabilities[:, 0])
    if kind == "probability":
        return probabilities.amax(1)
    if kind == "margin":
        first, second = probabilities.topk(2, 1).values.unbind(1)
        return first - second
    return (1 - torch.special.entr(probabilities).sum(1) / math.log(logits.shape[1])).clamp(0, 1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
