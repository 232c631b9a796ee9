"""`execution="shared"`: one autograd graph in which every state is computed once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..batch_norm.statistics import (
    freeze_during_backward,
    frozen_statistics,
    record_statistics,
    tracking_layers,
    update_running_statistics,
)
from ..network.inputs import call_model
from ..network.interception import intercept
from ..network.network import Network
from ..subnets.streams import Streams
from .loss import joint_loss
from .states import States
from .step import Mode, StepResult

__all__ = ["MODE", "run_shared"]


def run_shared(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs all streams through the model, each state once. `loss_scale` is not needed: backward comes later."""
    config = streams.config
    layers = tracking_layers(network.model)
    all_update = streams.all_update_statistics
    with record_statistics(network.model, layers) if all_update else nullcontext([]) as statistics:
        states = States(network, statistics, independent_noise=config.independent_noise)
        try:
            with intercept(network.model, network.sites, states.call):
                states.begin_stream(streams.dropped[0])
                logits = [network.logits(call_model(network.model, inputs))]
                states.end_stream()
                with nullcontext() if all_update else frozen_statistics(layers):
                    for dropped in streams.dropped[1:]:
                        states.begin_stream(dropped)
                        logits.append(network.logits(call_model(network.model, inputs)))
                        states.end_stream()
        finally:
            states.close()
    for updates in states.stream_statistics:
        update_running_statistics(updates)
    loss, terms = joint_loss(torch.stack(logits), targets, streams)
    freeze_during_backward(loss, layers)
    return StepResult(loss, terms, logits[0].detach())


MODE = Mode(run_shared)
