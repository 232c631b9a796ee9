"""What each layer of a model costs: operations by torch's own FLOP counter, memory by torch's saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..subnets.plan import Layer
from .chain import older_reads
from .inputs import call_model, map_tensors, rows_in, tensors_in
from .interception import Site, intercept
from .look import look

__all__ = ["count_flops", "count_layers", "one_sample", "same_form", "zeros_for"]


def one_sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The form of one sample of a model's inputs: tensors on the device "meta", other values as they are.

    Tensors whose first dimension is not the batch (that of the first tensor) keep their shape.
    """
    batch = rows_in(inputs)

    def form(value: Tensor) -> Tensor:
        shape = (1, *value.shape[1:]) if value.dim() and value.shape[0] == batch else value.shape
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return map_tensors(form, inputs)


def same_form(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether the tensors of two samples have the same shapes."""
    return [tensor.shape for tensor in tensors_in(a)] == [tensor.shape for tensor in tensors_in(b)]


def count_flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Floating point operations of one forward pass in evaluation mode (a multiply-add is two).

    Args:
        model: the network; left in the mode it was in, with the random state it had.
        inputs: as of `count_layers`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # importing it warns where there is no Triton

    counter = FlopCounterMode(display=False)
    with look(model), counter:
        call_model(model, zeros_for(model, inputs))
    return counter.get_total_flops()


def zeros_for(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Zeros in the form of `inputs` on the model's device, floating point ones in the dtype of its parameters."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def zeros(value: Tensor) -> Tensor:
        dtype = parameter.dtype if value.is_floating_point() else value.dtype
        return torch.zeros(value.shape, dtype=dtype, device=parameter.device)

    return map_tensors(zeros, inputs)


def count_layers(model: nn.Module, sites: Iterable[Site], inputs: tuple[Any, ...]) -> list[Layer]:
    """Runs the model twice in evaluation mode and counts the layers at `sites`, in order of execution.

    Args:
        model: the network; left in the mode it was in, with the random state it had.
        sites: its blocks and the modules between them.
        inputs: the model's inputs in the form of `one_sample`; the model gets `zeros_for` them.
    """
    from torch.utils.flop_counter import FlopCounterMode  # importing it warns where there is no Triton

    layers: list[Layer] = []
    weights: set[int] = set()
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    differentiable = [False]
    counter = FlopCounterMode(display=False)

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        before = counter.get_total_flops()
        saved.clear()
        output = module(*args, **kwargs)
        flops = counter.get_total_flops() - before
        layers.append(Layer(site.path, site.is_block, flops, sum(saved.values())))
        differentiable.append(any(v.requires_grad for v in tree_leaves(output) if isinstance(v, Tensor)))
        return output

    with look(model, gradients=True):
        weights.update(value.data_ptr() for value in [*model.parameters(), *model.buffers()])
        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            intercept(model, sites, call),
            counter,
        ):
            call_model(model, zeros_for(model, inputs))
        reads = older_reads(model, sites, zeros_for(model, inputs))
    names = ["the model's input", *(f"the output of {layer.path!r}" for layer in layers)]
    for i, older in enumerate(reads):
        over_blocks = [j for j in older if any(layer.is_block for layer in layers[j : i + 1])]
        if over_blocks:
            layer = min(i, len(layers) - 1)
            gradient = any(differentiable[j] for j in over_blocks)
            layers[layer] = replace(
                layers[layer], reads_back=names[over_blocks[0]], reads_back_gradient=gradient
            )
    return layers
