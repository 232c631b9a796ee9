"""Looks at a model: runs of it that show what it does and leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["kept_modes", "look", "uncompiled"]


@contextmanager
def look(model: nn.Module, *, training: bool | None = False, gradients: bool = False) -> Iterator[None]:
    """Inside, the model may be run to see what it does; afterwards it is as it was.

    Restored are what `_KEEPERS` lists: the modes of all modules, the buffers, the states of Python's and torch's random
    number generators. Compiled modules run as they are written, so that a look asks for no graphs.

    Args:
        model: the network, or a part of it.
        training: the mode in which to look; None: every module in its own.
        gradients: whether autograd records what runs.
    """
    with ExitStack() as stack:
        for keeper in _KEEPERS:
            stack.enter_context(keeper(model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if training is not None:
            model.train(training)
        yield


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode, training or evaluation, in which it is now."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, the model reads and writes copies of its buffers; a buffer at two places stays one."""
    copies: dict[int, Tensor] = {}
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        for buffers, originals in kept:
            for name, buffer in originals.items():
                if buffer is not None:
                    buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for buffers, originals in kept:
            for name, buffer in originals.items():
                buffers[name] = buffer


@contextmanager
def _kept_generators(model: nn.Module) -> Iterator[None]:
    """Afterwards random numbers go on as if none had been drawn: Python's, torch's on the CPU and the model's GPUs."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices if torch.cuda.is_available() else ()):
            yield
    finally:
        random.setstate(python_state)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, compiled modules run as they are written."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


_KEEPERS = (kept_modes, _kept_buffers, _kept_generators, uncompiled)
"""What a look puts back. To put back something more, add its context manager here."""
