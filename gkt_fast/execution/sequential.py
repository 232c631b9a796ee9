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
from .cut_stream import CutStream
from .gradients import GradientSum, deliver, refusal_of_sharded, tell_of_unscaled_float16
from .running_buffers import RunningBuffers
from .share import Share, share_of
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
    config, share = streams.config, share_of(streams, inputs)
    gradients = GradientSum(network.model, inputs, loss_scale)
    stream_loss = StreamLoss(streams, targets, share)
    layers = tracking_layers(network.model)
    noisy = network.noisy_layers() if share and config.independent_noise else frozenset()
    order = BlockOrder(network.sites)
    buffers = RunningBuffers(network, streams)
    for stream, dropped in enumerate(streams.dropped):
        # At another resolution nothing is in common with the full network.
        size = streams.resolutions[stream - 1] if stream and streams.resolutions else None
        own_rows = share if stream else None
        cuts = own_rows is not None and size is None
        one = (
            CutStream(network, dropped, noisy, own_rows, order)
            if cuts
            else _WholeStream(network, dropped, order, None if stream else share, own_rows)
        )

        def forward(rows: Share | None, size: int | None = size) -> Tensor:
            return network.logits(gradients.run(_prepared(network.model, rows, size), inputs))

        updates_statistics = stream == 0 or streams.all_update_statistics
        with (
            nullcontext() if updates_statistics else frozen_statistics(layers),
            buffers.stream(stream),
            intercept(network.model, one.sites, one.call),
        ):
            logits = one.logits(forward)
            with frozen_statistics(layers):  # within the interception: what is recomputed is this stream's
                gradients.add(stream_loss(stream, logits))
    loss = deliver(stream_loss.total(), gradients)
    return StepResult(loss, stream_loss.terms(), stream_loss.full_logits, stream_loss.learnt())


class _WholeStream:
    """A stream whose layers all run on the rows that it begins with.

    Args:
        network: the network.
        dropped: paths of the blocks that it drops.
        order: records the blocks that it calls.
        share: what others will cut of the full network's activations; None: nothing.
        rows: the rows that it begins with; None: all.
    """

    def __init__(
        self,
        network: Network,
        dropped: frozenset[str],
        order: BlockOrder,
        share: Share | None,
        rows: Share | None,
    ) -> None:
        self.sites = [site for site in network.sites if site.is_block]
        self._network, self._dropped, self._order = network, dropped, order
        self._share, self._rows = share, rows

    def call(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A call of the block at `site`; the handler for `intercept`."""
        if not recomputing():
            self._order.call(site)
        if site.path in self._dropped:
            return self._network.skip(site, args, kwargs)
        output = module(*args, **kwargs)
        self._network.learn_returns(site, output)
        if self._share is not None:
            self._share.check_block(site.path, output)
        return output

    def logits(self, forward: Callable[[Share | None], Tensor]) -> Tensor:
        """The stream's logits; `forward` as of `CutStream.logits`."""
        self._order.begin_stream()
        logits = forward(self._rows)
        self._order.end_stream()
        if self._share is not None or self._rows is not None:
            (self._share or self._rows).check_logits(logits, of_subnet=self._rows is not None)
        return logits


def _prepared(model: nn.Module, rows: Share | None, size: int | None) -> Callable[..., Any]:
    """The model, on some rows of its inputs, and on images resized to a height and width."""
    if rows is None and size is None:
        return model

    def run(*args: Any, **kwargs: Any) -> Any:
        if rows is not None:
            args, kwargs = rows.cut((args, kwargs))
        if size is not None:
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
