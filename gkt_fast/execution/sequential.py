"""`execution="sequential"`: streams run one by one, each with its backward at once.

The status quo (Stimulative Training's loop) and the reference for every other mode: nothing is shared, the memory is
that of one network, and each stream may see the images at its own resolution. Gradients are computed inside the forward
and handed out by `gradients.deliver`, so that `loss.backward()` means the same in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..batch_norm.statistics import frozen_statistics, tracking_layers
from ..network.block_order import BlockOrder
from ..network.inputs import map_tensors, tensors_in
from ..network.interception import Site, intercept
from ..network.network import Network
from ..network.recomputation import recomputing
from ..subnets.streams import Streams
from .gradients import GradientSum, deliver, refusal_of_sharded, tell_of_unscaled_float16
from .running_buffers import RunningBuffers
from .step import Mode, StepResult
from .stream_loss import StreamLoss

__all__ = ["MODE", "run_sequential"]


def run_sequential(
    network: Network,
    inputs: tuple[Any, ...],
    targets: Tensor,
    streams: Streams,
    loss_scale: float | Tensor | None = None,
) -> StepResult:
    """Runs the streams one by one. The inner backward passes run on the loss times `loss_scale` (float16)."""
    tell_of_unscaled_float16(network, loss_scale)
    gradients = GradientSum(network.model, inputs, loss_scale)
    stream_loss = StreamLoss(streams, targets)
    layers = tracking_layers(network.model)
    blocks = [site for site in network.sites if site.is_block]
    order = BlockOrder(blocks)
    buffers = RunningBuffers(network, streams)
    for stream, dropped in enumerate(streams.dropped):

        def call(
            site: Site, module: nn.Module, args: tuple, kwargs: dict, dropped: frozenset = dropped
        ) -> Any:
            if not recomputing():
                order.call(site)
            if site.path in dropped:
                return network.skip(site, args, kwargs)
            output = module(*args, **kwargs)
            network.learn_returns(site, output)
            return output

        order.begin_stream()
        updates_statistics = stream == 0 or streams.all_update_statistics
        with (
            nullcontext() if updates_statistics else frozen_statistics(layers),
            buffers.stream(stream),
            intercept(network.model, blocks, call),
        ):
            logits = network.logits(gradients.run(_at_resolution(network.model, streams, stream), inputs))
            order.end_stream()
            with frozen_statistics(layers):  # within the interception: what is recomputed is this stream's
                gradients.add(stream_loss(stream, logits))
    return StepResult(deliver(stream_loss.total(), gradients), stream_loss.terms(), stream_loss.full_logits)


def _at_resolution(model: nn.Module, streams: Streams, stream: int) -> Callable[..., Any]:
    """The model, on images resized as the stream's are."""
    if stream == 0 or not streams.resolutions:
        return model
    size = streams.resolutions[stream - 1]

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = resize_images((args, kwargs), size)
        return model(*args, **kwargs)

    return run


def resize_images(inputs: Any, size: int) -> Any:
    """Resizes every batch of images among the inputs: every floating point tensor (B, C, H, W), however nested.

    Bilinear with antialiasing, to (B, C, size, size).

    Raises:
        ValueError: there is none.
    """
    tensors = tensors_in(inputs)
    if not any(map(_are_images, tensors)):
        listed = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors) or "no tensor"
        raise ValueError(
            f"subnet_resolution resizes images, floating point tensors (B, C, H, W); the model's inputs are {listed}. "
            "Set subnet_resolution=None, or give the model such images"
        )

    def resized(tensor: Tensor) -> Tensor:
        if not _are_images(tensor) or tensor.shape[2:] == (size, size):
            return tensor
        return F.interpolate(tensor, (size, size), mode="bilinear", antialias=True)

    return map_tensors(resized, inputs)


def _are_images(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point()


def _refusal(network: Network, streams: Streams) -> Exception | None:
    return refusal_of_sharded(network.model)


MODE = Mode(run_sequential, _refusal, shares_states=False)
