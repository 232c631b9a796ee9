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
from .inputs import call_model, first_rows, map_tensors, rows_in, tensors_in
from .interception import Site, intercept
from .look import look

__all__ = [
    "count_flops",
    "count_layers",
    "example_for",
    "form_of",
    "one_sample",
]


def one_sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """One sample of a model's inputs without its large values: floating point tensors on the device "meta".

    Whole numbers (lengths, token numbers, masks) are copied: models may not run on others. Tensors whose first
    dimension is not the batch (that of the first tensor) keep their shape.
    """

    def form(value: Tensor) -> Tensor:
        whole = not (value.is_floating_point() or value.is_complex())
        return value.clone() if whole else torch.empty(value.shape, dtype=value.dtype, device="meta")

    return map_tensors(form, first_rows(inputs, 1))


def form_of(inputs: tuple[Any, ...]) -> list[Any]:
    """The shapes and dtypes of one sample's tensors, to be compared."""
    batch = rows_in(inputs)
    return [
        (value.shape[1:] if value.dim() and value.shape[0] == batch else value.shape, value.dtype)
        for value in tensors_in(inputs)
    ]


def count_flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Floating point operations of one forward pass in evaluation mode (a multiply-add is two).

    Args:
        model: the network; left in the mode it was in, with the random state it had.
        inputs: as of `count_layers`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # importing it warns where there is no Triton

    counter = FlopCounterMode(display=False)
    with look(model), counter:
        call_model(model, example_for(model, inputs))
    return counter.get_total_flops()


def example_for(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs on the model's device, floating point ones in the dtype of its parameters; zeros where only the form
    is known (device "meta")."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def placed(value: Tensor) -> Tensor:
        dtype = parameter.dtype if value.is_floating_point() else value.dtype
        if value.is_meta:
            return torch.zeros(value.shape, dtype=dtype, device=parameter.device)
        return value.detach().to(parameter.device, dtype, copy=True)

    return map_tensors(placed, inputs)


def count_layers(model: nn.Module, sites: Iterable[Site], inputs: tuple[Any, ...]) -> list[Layer]:
    """Runs the model twice in evaluation mode and counts the layers at `sites`, in order of execution.

    Args:
        model: the network; left in the mode it was in, with the random state it had.
        sites: its blocks and the modules between them.
        inputs: the model's inputs, or what `one_sample` left of them; the model gets `example_for` them.
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
            call_model(model, example_for(model, inputs))
        reads = older_reads(model, sites, example_for(model, inputs))
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
