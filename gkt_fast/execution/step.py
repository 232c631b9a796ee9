"""What every execution mode takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..network.network import Network
from ..subnets.streams import Streams

__all__ = ["Execution", "Forward", "Mode", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Args:
        loss: scalar; its backward delivers the gradients of the whole step.
        terms: (S,), detached: the full network's term of the targets, then each subnet's distillation term.
        logits: (B, C, *spatial) of the full network, detached.
        learnt: knowledge="dataset": what each group that was visited knows now of the batch's rows, or of the first
            ones if subnets saw no others, (rows, C), detached.
    """

    loss: Tensor
    terms: Tensor
    logits: Tensor
    learnt: Mapping[int, Tensor] = field(default_factory=dict)


Execution = Callable[[Network, tuple[Any, ...], Tensor, Streams, "float | Tensor | None"], StepResult]
"""Runs a step: (network, inputs of the model, targets, streams, loss scale) -> result."""


Forward = Callable[[Network, tuple[Any, ...], Streams], list[Tensor]]
"""The logits of all streams, in their order: (network, inputs of the model, streams) -> logits."""


def _nothing_against(network: Network, streams: Streams) -> None:
    return None


@dataclass(frozen=True)
class Mode:
    """A way of running steps.

    Args:
        run: runs a step.
        refusal: what the mode refuses a network and its streams with, before it runs anything; None: nothing is known
            to speak against it.
        shares_states: whether streams read each other's activations, and with them the random numbers drawn there.
        forward: the forward alone, to be held against streams that run by themselves (verification.py); None: it runs
            them so.
    """

    run: Execution
    refusal: Callable[[Network, Streams], Exception | None] = _nothing_against
    shares_states: bool = True
    forward: Forward | None = None

    def __call__(
        self,
        network: Network,
        inputs: tuple[Any, ...],
        targets: Tensor,
        streams: Streams,
        loss_scale: float | Tensor | None = None,
    ) -> StepResult:
        """Runs a step, or raises the refusal."""
        refusal = self.refusal(network, streams)
        if refusal is not None:
            raise refusal
        return self.run(network, inputs, targets, streams, loss_scale)
