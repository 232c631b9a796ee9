"""What every execution mode takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import GKTConfig
from ..network.interception import Site
from ..subnets.plan import Layer

__all__ = ["Execution", "Network", "StepResult", "Streams", "tensors_in"]


@dataclass
class Network:
    """A model with the places where its streams may part.

    Args:
        model: the network.
        sites: its blocks and the modules between them.
        writes_input: what is known of layers that write into their input (`states.States`).
        returns: what is known of the number of values that blocks return (`states.States`).
        layers: gives the layers at the sites in order of execution, for modes that plan a step before they run it.
        noisy: paths of the layers that draw random numbers, which every stream runs by itself; None: noise may be
            shared as the states are.
    """

    model: nn.Module
    sites: list[Site]
    writes_input: dict[str, bool] = field(default_factory=dict)
    returns: dict[str, int] = field(default_factory=dict)
    layers: Callable[[], Sequence[Layer]] = list
    noisy: frozenset[str] | None = None


@dataclass(frozen=True)
class Streams:
    """The streams of a step.

    Args:
        dropped: for each the paths of the blocks that it drops, the full network (none) first. A single stream may be
            a subnet.
        config: the hyper-parameters.
        resolutions: height and width that each subnet's images are resized to; empty: as they are.
    """

    dropped: tuple[frozenset[str], ...]
    config: GKTConfig
    resolutions: tuple[int, ...] = ()

    def group(self, stream: int) -> int:
        """The group of a subnet's stream, 1 to G."""
        return (stream - 1) % self.config.groups + 1


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
"""A mode: (network, inputs of the model, targets, streams, loss scale) -> result."""


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among the inputs of a model."""
    return [value for value in values if isinstance(value, Tensor)]
