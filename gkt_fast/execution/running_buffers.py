"""Buffers that layers other than torch's normalisation write in training: power iterations, moving ranges, counters.

With `batch_norm="full"` they are treated as BatchNorm's running statistics are: what the full network's stream writes
stays, and every other stream starts from what it started from and leaves nothing behind. So all modes agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..network.network import Network
from ..subnets.streams import Streams

__all__ = ["RunningBuffers"]


class RunningBuffers:
    """The buffers as they are at the start of a step.

    Args:
        network: the network, with its running buffers known (verification.py); where they aren't, there are none.
        streams: the streams of the step.
    """

    def __init__(self, network: Network, streams: Streams) -> None:
        self._places = []
        if not streams.all_update_statistics:
            for path, name in network.running_buffers or []:
                buffers = network.model.get_submodule(path)._buffers
                self._places.append((buffers, name, buffers[name].clone()))

    @contextmanager
    def stream(self, number: int) -> Iterator[None]:
        """For the forward of a stream: unless it is the full network's, it writes to copies."""
        places = self._places if number else []
        own = [buffers[name] for buffers, name, _ in places]
        try:
            for buffers, name, start in places:
                buffers[name] = start.clone()
            yield
        finally:
            for (buffers, name, _), buffer in zip(places, own, strict=True):
                buffers[name] = buffer
