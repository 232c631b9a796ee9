"""Decides how a step runs; nothing else does. The rule:

1. A step of a single stream is that stream's own forward (`plain`), whatever `execution` says.
2. A mode that is asked for by name runs, or refuses the model with a reason.
3. `execution="auto"` runs `sequential` where subnets see smaller images (`subnet_resolution`): nothing can be shared.
4. Otherwise `stacked` where nothing speaks against it: every state once, in the fewest calls.
5. Otherwise `shared`: the same states, each computed by itself.

The rule is the same on a GPU: predicted bounds (docs/roofline.md) put `stacked` far ahead of `shared` where launches
decide, in small networks, and within 3 % of it where memory does.

`lean` saves memory and `sequential` is the baseline; both are chosen by hand. Some models can be seen not to stack only
while they run (blocks with several arguments, computations between blocks): then the first step is run again as
`shared`, and so are all later ones. Every choice of `auto` other than `stacked` is logged once, with its reason.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..network.network import Network
from ..network.noise import DrawDetector
from ..subnets.streams import Streams
from . import plain, stacked
from .modes import EXECUTION_MODES
from .step import Execution, Mode, StepResult

__all__ = ["Choice", "choose_execution"]

_SHARED_NOISE = (
    "the model draws random numbers in training (dropout, stochastic depth): streams that share a state share them, "
    "where streams run one by one draw their own. GKTConfig(independent_noise=True) draws them for every stream, and "
    "shares states only up to the first such layer"
)


@dataclass(frozen=True)
class Choice:
    """How a step runs.

    Args:
        mode: name of the execution mode, or "plain" for a step of a single stream.
        reason: why, in words.
        run: runs the step. Where the mode refuses the model, raises what says so.
    """

    mode: str
    reason: str
    run: Execution


def choose_execution(network: Network, streams: Streams) -> Choice:
    """How a step with these streams runs on this network.

    Raises:
        ValueError: the form of the network's inputs is not known yet (see `Network.remember`).
    """
    requested = streams.config.execution
    if len(streams.dropped) == 1:
        return Choice("plain", "the step has a single stream", plain.MODE.run)
    if requested == "auto":
        return _choose_automatically(network, streams)
    mode = EXECUTION_MODES[requested]
    refusal = mode.refusal(network, streams)
    if refusal is not None:
        return Choice(requested, f"asked for, but it refuses this model: {refusal}", _refusing(refusal))
    return Choice(requested, "asked for", _telling_of_noise(mode, mode.run))


def _choose_automatically(network: Network, streams: Streams) -> Choice:
    if streams.config.subnet_resolution is not None:
        name = "sequential"
        reason = "subnets see smaller images (subnet_resolution), so that no activation can be shared"
    else:
        against = network.refused.get("stacked") or stacked.reason_against(network, streams)
        if against is None:
            tried = "" if network.returns else "; the first step shows whether the model can be stacked"
            reason = f"every state once, states that run the same layer as one batch{tried}"
            return Choice("stacked", reason, _telling_of_noise(stacked.MODE, _run_stacked_or_next))
        name, reason = "shared", f"states can't be stacked: {against}"
    network.tell_once(f"execution='auto' runs {name!r}: {reason}")
    mode = EXECUTION_MODES[name]
    return Choice(name, reason, _telling_of_noise(mode, mode.run))


def _run_stacked_or_next(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None,
) -> StepResult:
    """Runs a step as `stacked`; a model that turns out not to be stackable runs it again as chosen then."""
    mode = EXECUTION_MODES["stacked"]
    try:
        return mode.run(network, inputs, targets, streams, loss_scale)
    except stacked.StackingError as error:
        network.refused["stacked"] = str(error)
    return choose_execution(network, streams).run(network, inputs, targets, streams, loss_scale)


def _refusing(refusal: Exception) -> Execution:
    def refuse(*_: Any) -> StepResult:
        raise refusal

    return refuse


def _telling_of_noise(mode: Mode, run: Execution) -> Execution:
    """The same in the first training step of a mode that shares states; there it looks for noise that they share."""

    def run_and_tell(
        network: Network,
        inputs: tuple[Any, ...],
        targets: Tensor,
        streams: Streams,
        loss_scale: float | Tensor | None,
    ) -> StepResult:
        looks = network.model.training and not (network.looked_for_noise or streams.config.independent_noise)
        if not looks:
            return run(network, inputs, targets, streams, loss_scale)
        detector = DrawDetector(network.model)
        result = run(network, inputs, targets, streams, loss_scale)
        network.looked_for_noise = True
        if detector.drawn():
            network.tell_once(_SHARED_NOISE, logging.WARNING)
        return result

    return run_and_tell if mode.shares_states else run
