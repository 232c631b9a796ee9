"""A step of one stream: the full network (`groups=0`: plain training, bit for bit), or a subnet (stochastic depth)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..network.block_order import BlockOrder
from ..network.inputs import call_model
from ..network.interception import Site, intercept
from ..network.look import look
from ..network.network import Network
from ..subnets.streams import Streams
from .loss import target_loss
from .step import Mode, StepResult

__all__ = ["MODE", "run_plain"]


def run_plain(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs the stream by the model's own forward. `loss_scale` is not needed: backward comes later."""
    dropped = [site for site in network.sites if site.path in streams.dropped[0]]
    if any(site.path not in network.returns for site in dropped):
        _learn_returns(network, inputs)

    def skip(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return network.skip(site, args, kwargs)

    with intercept(network.model, dropped, skip):
        logits = network.logits(call_model(network.model, inputs))
    term = target_loss(logits, targets, streams)
    weight = streams.config.ce_weight
    return StepResult(term if weight == 1.0 else weight * term, term.detach().reshape(1), logits.detach())


def _learn_returns(network: Network, inputs: tuple[Any, ...]) -> None:
    """Runs all blocks once, in evaluation mode, to see how many values each returns."""
    blocks = [site for site in network.sites if site.is_block]
    order = BlockOrder(blocks)
    order.begin_stream()

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        order.call(site)
        output = module(*args, **kwargs)
        network.learn_returns(site, output)
        return output

    with look(network.model), intercept(network.model, blocks, call):
        call_model(network.model, inputs)
    order.end_stream()


MODE = Mode(run_plain, shares_states=False)
