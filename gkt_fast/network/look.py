"""Looks at a model: runs of it that show what it does and leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .reachable import kept_attributes

__all__ = ["kept_modes", "look", "modes_of", "restore_modes"]


@contextmanager
def look(
    model: nn.Module,
    *,
    training: bool | None = False,
    gradients: bool = False,
    hooks: bool = True,
    compiled: bool = False,
) -> Iterator[None]:
    """Inside, the model may be run to see what it does; afterwards it is as it was.

    Put back are what `_KEEPERS` lists: attributes of all modules and what can be reached from them, buffers, the states
    of Python's, NumPy's and torch's random number generators, and the modes of all modules, by the modules' own
    `train`. Weights are not copied: a forward, or a `train` that merges adapters, may round them. What is seen does not
    depend on whether the caller is in inference mode.

    Args:
        model: the network, or a part of it.
        training: the mode in which to look; None: every module in its own.
        gradients: whether autograd records what runs.
        hooks: whether what hooks keep is put back too; False where the caller's hooks are meant to see the run.
        compiled: whether compiled modules run compiled, or as they are written, so that a look asks for no graphs.
    """
    with ExitStack() as stack:
        stack.enter_context(_without_inference_mode())
        stack.enter_context(kept_attributes(model, hooks=hooks))
        for keeper in _KEEPERS:
            stack.enter_context(keeper(model))
        if not compiled:
            stack.enter_context(uncompiled(model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if training is not None:
            _set_mode(model, training)
        yield


def _set_mode(module: nn.Module, training: bool) -> None:
    """Puts a module into training or evaluation mode by its own `train` or `eval`."""
    if training:
        module.train()
    else:
        module.eval()


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode, training or evaluation, in which it is now.

    Modules get there by their own `train` and `eval`, outermost first, so that what these did to them is undone.
    """
    modes = modes_of(model)
    try:
        yield
    finally:
        restore_modes(modes)


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The modules, parents before their children, each with whether it is in training mode."""
    return [(module, module.training) for module in model.modules()]


def restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Puts modules back into their modes; parents come before their children."""
    for module, training in modes:
        if module.training is not training:
            _set_mode(module, training)
    for module, training in modes:  # what a `train` of its own did to other modules
        if module.training is not training:
            module.training = training


@contextmanager
def _without_inference_mode() -> Iterator[None]:
    """Inside, tensors are ordinary ones, with version counters; gradients are recorded or not, as before."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


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
            buffers.clear()
            buffers.update(originals)


@contextmanager
def _kept_generators(model: nn.Module) -> Iterator[None]:
    """Afterwards random numbers go on as if none had been drawn: Python's, NumPy's, torch's on the CPU and the model's
    GPUs."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices if torch.cuda.is_available() else ()):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


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


_KEEPERS = (_kept_buffers, _kept_generators, kept_modes)
"""What a look puts back beside attributes, in the order in which it is set aside: modes are put back first, by code of
the modules that may write to all the rest. To put back something more, add its context manager here."""
