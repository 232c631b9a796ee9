"""What every execution mode takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import GKTConfig
from ..network.network import Network
from ..subnets.streams import Streams

__all__ = ["Execution", "Mode", "StepResult", "knowledge_options", "loss_options", "tensors_in"]


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Args:
        loss: scalar; its backward delivers the gradients of the whole step.
        terms: (S,), detached: the full network's cross entropy, then each subnet's distillation term.
        logits: (B, C, *spatial) of the full network, detached.
    """

    loss: Tensor
    terms: Tensor
    logits: Tensor


Execution = Callable[[Network, tuple[Any, ...], Tensor, Streams, "float | Tensor | None"], StepResult]
"""Runs a step: (network, inputs of the model, targets, streams, loss scale) -> result."""


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
    """

    run: Execution
    refusal: Callable[[Network, Streams], Exception | None] = _nothing_against
    shares_states: bool = True

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


def knowledge_options(config: GKTConfig) -> dict[str, Any]:
    """The options of `GroupKnowledge` and `group_knowledge_loss` that both take."""
    return {
        "ema": config.ema,
        "temperature": config.temperature,
        "normalize_logits": config.normalize_logits,
        "ignore_index": config.ignore_index,
        "label_smoothing": config.label_smoothing,
        "distill_ignored": config.distill_ignored,
    }


def loss_options(config: GKTConfig) -> dict[str, Any]:
    """The options of `group_knowledge_loss`."""
    return {
        **knowledge_options(config),
        "groups": config.groups,
        "loops": config.loops,
        "ce_weight": config.ce_weight,
        "kd_weight": config.kd_weight,
        "subnet_ce_weight": config.subnet_ce_weight,
    }


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among the inputs of a model."""
    return [value for value in values if isinstance(value, Tensor)]
