"""Which layers draw random numbers: found by looking at the generators before and after a layer runs.

Dropout, stochastic depth and the like come as modules, as functions in a block's forward and as arguments of attention;
what they have in common is that they move a random number generator on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _disable_current_modes

from .inputs import call_model
from .interception import Site, intercept
from .look import look

__all__ = ["DrawDetector", "UnexpectedNoiseError", "forbid_draws", "noisy_layers"]


class UnexpectedNoiseError(RuntimeError):
    """A layer that drew no random numbers when such layers were looked for draws some now."""


class DrawDetector:
    """Tells whether random numbers were drawn since it last looked: by Python, or by torch on the CPU or model's GPU.

    Reading a GPU's generator doesn't wait for the GPU.

    Args:
        model: its first parameter says on which device to look.
    """

    def __init__(self, model: nn.Module) -> None:
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._seen = self._states()

    def _states(self) -> tuple[Any, ...]:
        # The states are real where FakeTensorMode makes all other tensors fake, for a GPU that needn't be there.
        with _disable_current_modes():
            tensors = [torch.get_rng_state()]
            if self._device.type == "cuda" and torch.cuda.is_available():
                tensors.append(torch.cuda.get_rng_state(self._device))
            return random.getstate(), *(tensor.numpy().tobytes() for tensor in tensors)

    def drawn(self) -> bool:
        """Whether a generator moved on since the last call."""
        states = self._states()
        drawn, self._seen = states != self._seen, states
        return drawn


@contextmanager
def forbid_draws(detector: DrawDetector | None, path: str) -> Iterator[None]:
    """Checks that a layer which should draw no random numbers doesn't; no detector: nothing is checked.

    Raises:
        UnexpectedNoiseError: it did.
    """
    if detector is not None:
        detector.drawn()
    yield
    if detector is not None and detector.drawn():
        raise UnexpectedNoiseError(
            f"layer {path!r} drew random numbers, which it did not when independent_noise=True looked for such layers; "
            "make a new GKT after a rate of dropout or stochastic depth was raised from 0"
        )


def noisy_layers(model: nn.Module, sites: Iterable[Site], inputs: tuple[Any, ...]) -> frozenset[str]:
    """Runs the model once and returns the paths of the layers that draw random numbers, or get any drawn before them.

    Args:
        model: the network. Runs in the mode in which it is, in training mode where that is evaluation;
            normalisation layers always use their running statistics. Buffers, modes and generators are left as they
            were.
        sites: its blocks and the modules between them.
        inputs: an example of its input, one sample.
    """
    noisy: set[str] = set()
    detector = DrawDetector(model)

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        drawn_before = detector.drawn()
        output = module(*args, **kwargs)
        if detector.drawn() or drawn_before:
            noisy.add(site.path)
        return output

    with look(model, training=None if model.training else True, gradients=True):
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.eval()
        with intercept(model, sites, call):
            call_model(model, inputs)
    return frozenset(noisy)
