"""`execution="shared"`: one autograd graph in which every state is computed once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

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
from .running_buffers import RunningBuffers
from .share import share_of
from .states import States
from .step import Mode, StepResult
from .stream_loss import step_loss

__all__ = ["MODE", "run_shared"]


def run_shared(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs all streams through the model, each state once. `loss_scale` is not needed: backward comes later."""
    config, share = streams.config, share_of(streams, inputs)
    layers = tracking_layers(network.model)
    all_update = streams.all_update_statistics
    with record_statistics(network.model, layers) if all_update else nullcontext([]) as statistics:
        states = States(network, statistics, independent_noise=config.independent_noise, share=share)
        logits = _run_states(states, inputs, streams)
    for updates in states.stream_statistics:
        update_running_statistics(updates)
    full, rest = (None, logits) if share is None else (logits[0], logits[1:])
    loss, terms, learnt = step_loss(rest, targets, streams, full, share)
    freeze_during_backward(loss, layers)
    return StepResult(loss, terms, logits[0].detach(), learnt)


def _run_states(states: States, inputs: tuple[Any, ...], streams: Streams) -> list[Tensor]:
    """The logits of all streams."""
    model = states.network.model
    layers = [] if streams.all_update_statistics else tracking_layers(model)
    buffers = RunningBuffers(states.network, streams)
    logits = []
    try:
        with intercept(model, states.network.sites, states.call):
            for stream, dropped in enumerate(streams.dropped):
                with frozen_statistics(layers) if stream else nullcontext(), buffers.stream(stream):
                    states.begin_stream(dropped)
                    logits.append(states.network.logits(call_model(states.run_model, inputs)))
                    states.end_stream(logits[-1])
    finally:
        states.close()
    return logits


def _forward(network: Network, inputs: tuple[Any, ...], streams: Streams) -> list[Tensor]:
    noise, share = streams.config.independent_noise, share_of(streams, inputs)
    return _run_states(States(network, [], independent_noise=noise, share=share), inputs, streams)


MODE = Mode(run_shared, forward=_forward)
