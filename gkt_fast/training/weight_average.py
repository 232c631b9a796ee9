"""The exponential moving average of a network's weights during training."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..network.copying import copy_of

__all__ = ["WeightAverage"]


class WeightAverage:
    """torch's `AveragedModel` with an exponential moving average of parameters and buffers.

    Its own update reads a counter at every step, for which the host waits; here the counter stays on the host.

    Args:
        model: the network; copied. The first update takes its weights as they are then.
        decay: share of the old average in the new one, in [0, 1].

    Raises:
        ValueError: decay is out of its range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema_decay is {decay}; it must be in [0, 1]")
        self._averaged = AveragedModel(
            copy_of(model), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )
        self._source = model
        self._started = False

    @property
    def model(self) -> nn.Module:
        """The network with averaged weights."""
        return self._averaged.module

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the network's weights after a step."""
        if not self._started:
            self._averaged.update_parameters(self._source)
            self._started = True
            return
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(
            lambda: ([], [])
        )
        for average, value in zip(_tensors(self.model), _tensors(self._source), strict=True):
            averages, values = groups[average.device, average.dtype]
            averages.append(average)
            values.append(value)
        for averages, values in groups.values():
            self._averaged.multi_avg_fn(averages, values, None)
        self._averaged.n_averaged += 1

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights and the number of updates, for a checkpoint."""
        return {**self._averaged.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._averaged.load_state_dict(state)
        self._started = bool(self._averaged.n_averaged > 0)


def _tensors(model: nn.Module) -> itertools.chain[Tensor]:
    return itertools.chain((p.detach() for p in model.parameters()), model.buffers())
