"""Gradients computed inside a forward, handed out by the loss's own backward.

Modes that run backward at once must still behave like an ordinary loss: hooks on parameters, DistributedDataParallel,
accumulation and loss scaling see one backward with one gradient per parameter. So the inner passes run on aliases of
the parameters (same storage, no hooks), their gradients are added up here, and one autograd function over the real
parameters multiplies the sum by its `grad_output`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import is_sharded
from ..network.inputs import call_model, map_tensors, tensors_in
from ..network.network import Network
from ..ops.library import refuse_second_derivative

__all__ = ["GradientSum", "deliver", "refusal_of_sharded", "tell_of_unscaled_float16"]


def refusal_of_sharded(model: nn.Module) -> ValueError | None:
    """What modes that run backward within the forward refuse a model with that is sharded by `fully_shard`."""
    if not is_sharded(model):
        return None
    return ValueError(
        "model is sharded by fully_shard or FullyShardedDataParallel, which reduce gradients as soon as a backward "
        "reaches a block; "
        "execution='lean' and 'sequential' run several backward passes within the forward. Use 'stacked' or 'shared'"
    )


def tell_of_unscaled_float16(network: Network, loss_scale: float | Tensor | None) -> None:
    """Warns once where backward runs inside in float16 without a loss scale; a GradScaler outside comes too late."""
    device = next((parameter.device.type for parameter in network.model.parameters()), "cpu")
    if loss_scale is not None or not torch.is_grad_enabled() or not torch.amp.is_autocast_available(device):
        return
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        network.tell_once(
            "execution='lean' and 'sequential' run backward inside GKT's forward, in float16 here and without a loss "
            "scale, so that small gradients become 0: pass loss_scale=scaler.scale(torch.ones((), device=...)), or use "
            "'stacked', 'shared' or bfloat16",
            logging.WARNING,
        )


class GradientSum:
    """The sum of gradients over several backward passes.

    Args:
        model: the network, for which there is no `refusal_of_sharded`; gradients are taken for its parameters that
            require one.
        inputs: its inputs; gradients are taken for those that require one.
        loss_scale: factor on every inner loss, taken out again at the end (float16 loss scaling); None: 1.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], loss_scale: float | Tensor | None) -> None:
        self.enabled = torch.is_grad_enabled()
        parameters = [p for p in model.parameters() if p.requires_grad] if self.enabled else []
        aliases = {id(parameter): parameter.detach().requires_grad_() for parameter in parameters}
        self._places = [
            (module._parameters, name, parameter, aliases[id(parameter)])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in aliases
        ]
        wanted = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad and self.enabled]
        self._input_aliases = {id(tensor): tensor.detach().requires_grad_() for tensor in wanted}
        self.sources = [*parameters, *wanted]
        self._leaves = [*aliases.values(), *self._input_aliases.values()]
        self.loss_scale = loss_scale

    def run(self, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """The model's forward on the aliases."""
        if self._input_aliases:
            inputs = map_tensors(lambda tensor: self._input_aliases.get(id(tensor), tensor), inputs)
        with self._aliased():
            return call_model(model, inputs)

    @contextmanager
    def _aliased(self) -> Iterator[None]:
        """The aliases stand in the parameters' places (tied modules and tied parameters included)."""
        try:
            for parameters, name, _, alias in self._places:
                parameters[name] = alias
            yield
        finally:
            for parameters, name, parameter, _ in self._places:
                parameters[name] = parameter

    def add(self, loss: Tensor) -> None:
        """Backward of one stream's loss; its gradients are added to the sum."""
        if not loss.requires_grad:
            return
        scaled = loss if self.loss_scale is None else loss * self.loss_scale
        with self._aliased():  # for what is recomputed (activation checkpointing)
            scaled.backward()
        # Autocast caches low-precision copies of the weights; their graph ended with this backward.
        torch.clear_autocast_cache()

    def result(self) -> list[Tensor | None]:
        """The sum for every source, with the loss scale taken out."""
        gradients = [leaf.grad for leaf in self._leaves]
        if self.loss_scale is None:
            return gradients
        return [None if gradient is None else gradient / self.loss_scale for gradient in gradients]


def deliver(loss: Tensor, gradients: GradientSum) -> Tensor:
    """The loss as a function of the sources of `gradients`: its backward hands out their sum."""
    if not gradients.sources:
        return loss
    return _Deliver.apply(loss, gradients.result(), *gradients.sources)


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *sources: Tensor) -> Tensor:
        ctx.gradients = gradients
        result = loss.clone()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            scaled = [None if g is None else g * grad_output.to(g.dtype) for g in ctx.gradients]
        if torch.is_grad_enabled():
            present = tuple(gradient for gradient in scaled if gradient is not None)
            refused = iter(refuse_second_derivative(None, present, through=ctx.saved_tensors))
            scaled = [None if gradient is None else next(refused) for gradient in scaled]
        return None, None, *scaled
