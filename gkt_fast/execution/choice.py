"""Decides how a step runs; nothing else does. The rule:

1. A step of a single stream is that stream's own forward (`plain`), whatever `execution` says.
2. A mode that is asked for by name runs, or refuses the model with a reason.
3. `execution="auto"` runs `sequential` where subnets see smaller images (`subnet_resolution`): nothing can be shared.
4. Otherwise `stacked` where nothing speaks against it: every state once, in the fewest calls.
5. Otherwise `shared`: the same states, each computed by itself.

The rule is the same on a GPU: predicted bounds (docs/measurements/roofline.md) put `stacked` far ahead of `shared`
where launches decide, in small networks, and within 3 % of it where memory does.

6. Where `shared` is wrong too (a head that reads what a hook kept from a block), `sequential`.

`lean` saves memory and `sequential` is the baseline; both are chosen by hand.

Whether a mode is right for a model shows when it runs. So before the first step of a mode that shares states, and
again after a change of modes, flags, hooks or modules, it is held against streams that run one by one, on a few rows
of the batch (verification.py). Where it is wrong, or says while it runs that it can't, `auto` goes on with the next
mode; a mode that was asked for by name raises the reason. Every choice of `auto` other than `stacked` is logged once,
with its reason.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from ..batch_norm.statistics import check_running_buffers
from ..distributed import any_rank, is_distributed
from ..network.calls import SharedStateError
from ..network.network import Network
from ..network.noise import DrawDetector
from ..subnets.streams import Streams
from . import plain, stacked
from .modes import EXECUTION_MODES
from .stackable import StackingError, reason_against
from .step import Execution, Mode, StepResult
from .verification import Verification

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
        ValueError: the form of the network's inputs is not known yet (see `Network.remember`), or a norm's running
            statistics are no buffers.
    """
    network.note_setup()
    requested = streams.config.execution
    if len(streams.dropped) == 1:
        return Choice("plain", "the step has a single stream", plain.MODE.run)
    network.once("buffers", lambda: check_running_buffers(network.model))
    if requested == "auto":
        return _choose_automatically(network, streams)
    mode = EXECUTION_MODES[requested]
    refusal = mode.refusal(network, streams)
    if refusal is None and requested in network.refused:
        refusal = _refusal_of(requested, network.refused[requested])
    if refusal is not None:
        return Choice(requested, f"asked for, but it refuses this model: {refusal}", _refusing(refusal))
    return Choice(requested, "asked for", _verified(requested, _telling_of_noise(mode, mode.run)))


def _refusal_of(mode: str, reason: str) -> SharedStateError:
    kind = StackingError if mode == "stacked" else SharedStateError
    return kind(f"execution={mode!r} can't run this model: {reason}")


def _choose_automatically(network: Network, streams: Streams) -> Choice:
    if streams.config.subnet_resolution is not None:
        name = "sequential"
        reason = "subnets see smaller images (subnet_resolution), so that no activation can be shared"
    else:
        against = network.refused.get("stacked") or _stacking_against(network, streams)
        if against is None:
            tried = "" if network.returns else "; the first step shows whether the model can be stacked"
            reason = f"every state once, states that run the same layer as one batch{tried}"
            run = _verified("stacked", _telling_of_noise(stacked.MODE, _run_stacked_or_next))
            return Choice("stacked", reason, run)
        name, reason = "shared", f"states can't be stacked: {against}"
        if "shared" in network.refused:
            name, reason = "sequential", f"{reason}; and they can't be shared: {network.refused['shared']}"
    network.tell_once(f"execution='auto' runs {name!r}: {reason}")
    mode = EXECUTION_MODES[name]
    return Choice(name, reason, _verified(name, _telling_of_noise(mode, mode.run)))


def _stacking_against(network: Network, streams: Streams) -> str | None:
    """`reason_against`, and that a look at the model fails which stacking needs and sharing doesn't."""
    try:
        return reason_against(network, streams)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not network.sees_batch or streams.config.independent_noise:
            raise
        network.verdicts["stacked"] = (
            f"a look at it in evaluation mode failed ({type(error).__name__}: {error})"
        )
        return network.verdicts["stacked"]


def _verified(name: str, run: Execution) -> Execution:
    """The same, after the mode was held against streams that run one by one, where it has not been yet.

    Where the mode turns out wrong, the step runs as chosen then: by `auto`, or by a refusal.
    """

    def verify_and_run(
        network: Network,
        inputs: tuple[Any, ...],
        targets: Tensor,
        streams: Streams,
        loss_scale: float | Tensor | None,
    ) -> StepResult:
        if name not in network.verdicts and _needs_verification(network, name):
            _verify(network, inputs, streams, name)
            if network.verdicts[name] is not None:
                return choose_execution(network, streams).run(network, inputs, targets, streams, loss_scale)
        _tell_of_running_buffers(network, streams, name)
        return run(network, inputs, targets, streams, loss_scale)

    return verify_and_run


def _needs_verification(network: Network, name: str) -> bool:
    """Modes with a forward of their own are verified; others only learn which buffers the model writes."""
    if EXECUTION_MODES[name].forward is not None:
        return True
    modules = network.model.modules()
    return network.running_buffers is None and any(
        m._buffers for m in modules if not isinstance(m, _NormBase)
    )


def _verify(network: Network, inputs: tuple[Any, ...], streams: Streams, name: str) -> None:
    """Puts the mode's verdict on record. All ranks of a distributed run do so in the first step, and agree on it.

    Raises:
        SharedStateError: ranks had agreed on the mode, and the model has changed since so that it is wrong on this one.
    """
    reason = Verification(network, inputs, streams).reason_against(EXECUTION_MODES[name])
    if not is_distributed():
        network.verdicts[name] = reason
        return
    if network.agreed:  # whether the model changed on other ranks too can't be known without asking them
        if reason is not None:
            raise _refusal_of(
                name,
                f"{reason}; it did when training began, and ranks can't change the mode one by one. Ask for another "
                "mode by name",
            )
        network.verdicts[name] = None
        return
    device = next((p.device for p in network.model.parameters()), torch.device("cpu"))
    if any_rank(reason is not None, device):
        network.verdicts[name] = reason or "another rank found it wrong for its part of the batch"
    else:
        network.verdicts[name], network.agreed = None, True


def _tell_of_running_buffers(network: Network, streams: Streams, name: str) -> None:
    if not (
        network.running_buffers and streams.all_update_statistics and EXECUTION_MODES[name].shares_states
    ):
        return
    layers = ", ".join(
        repr(path) for path in list(dict.fromkeys(path for path, _ in network.running_buffers))[:5]
    )
    network.tell_once(
        f"batch_norm='all_streams' holds for BatchNorm alone: {layers} write buffers of their own in training, as "
        "often as they are called, which is less where streams share states. Use batch_norm='full', where only the "
        "full network's stream writes them, or execution='sequential'",
        logging.WARNING,
    )


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
    except StackingError as error:
        network.verdicts["stacked"] = str(error)
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
