"""What each layer of a model costs: operations by torch's own FLOP counter, memory by torch's saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .execution.interception import Site, intercept
from .plan import Layer

__all__ = ["count_flops", "count_layers", "one_sample", "same_form"]


def one_sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The form of one sample of a model's inputs: tensors on the device "meta", other values as they are.

    Tensors whose first dimension is not the batch (that of the first tensor) keep their shape.
    """
    batch = next((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()), None)

    def form(value: Tensor) -> Tensor:
        shape = (1, *value.shape[1:]) if value.dim() and value.shape[0] == batch else value.shape
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return tuple(form(value) if isinstance(value, Tensor) else value for value in inputs)


def same_form(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether the tensors of two samples have the same shapes."""
    return [getattr(value, "shape", None) for value in a] == [getattr(value, "shape", None) for value in b]


def count_flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Floating point operations of one forward pass in evaluation mode (a multiply-add is two).

    Args:
        model: the network; left in the mode it was in, with the random state it had.
        inputs: as of `count_layers`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # importing it warns where there is no Triton

    counter = FlopCounterMode(display=False)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad(), counter:
            model(*_zeros(model, inputs))
    finally:
        for module, mode in training.items():
            module.training = mode
    return counter.get_total_flops()


def _zeros(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = parameter.dtype if value.is_floating_point() else value.dtype
        return torch.zeros(value.shape, dtype=dtype, device=parameter.device)

    return tuple(map(zeros, inputs))


def count_layers(model: nn.Module, sites: Iterable[Site], inputs: tuple[Any, ...]) -> list[Layer]:
    """Runs the model once in evaluation mode and counts the layers at `sites`, in order of execution.

    Args:
        model: the network; left in the mode it was in, with the random state it had.
        sites: its blocks and the modules between them.
        inputs: the model's positional arguments in the form of `one_sample`. The model gets zeros, floating
            point ones in the dtype of its parameters.
    """
    from torch.utils.flop_counter import FlopCounterMode  # importing it warns where there is no Triton

    layers: list[Layer] = []
    weights = {value.data_ptr() for value in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    training = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False)

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        before = counter.get_total_flops()
        saved.clear()
        output = module(*args, **kwargs)
        flops = counter.get_total_flops() - before
        layers.append(Layer(site.path, site.is_block, flops, sum(saved.values())))
        return output

    model.eval()
    try:
        with (
            torch.random.fork_rng(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            intercept(model, sites, call),
            counter,
        ):
            model(*_zeros(model, inputs))
    finally:
        for module, mode in training.items():
            module.training = mode
    return layers
