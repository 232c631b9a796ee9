"""Takes the ghost batches of a stacked activation apart, and stacks them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.library import refuse_second_derivative

__all__ = ["ghost", "lead_and_kept"]


def ghost(x: Tensor, index: int, rows: int) -> Tensor:
    """The ghost batch at `index`, a view."""
    return x if x.shape[0] == rows else x.narrow(0, index * rows, rows)


def lead_and_kept(x: Tensor, rows: int, lead: int, kept: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The first `lead` ghost batches, and some by themselves, without copying.

    Backward writes each gradient once into one buffer, where narrowing would fill a whole buffer for every part.

    Args:
        x: (m * rows, ...).
        rows: rows of a ghost batch.
        lead: number of leading ghost batches, may be all.
        kept: indices of the ghost batches wanted by themselves; they may be among the leading ones.
    """
    ghosts = x.shape[0] // rows
    if lead == ghosts and (not kept or ghosts == 1):
        return x, [x] * len(kept)
    leading, *others = _LeadAndKept.apply(x, rows, lead, tuple(kept))
    return leading, others


class _LeadAndKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, lead: int, kept: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.example = x.detach()[:0]
        ctx.ghosts, ctx.rows, ctx.lead, ctx.kept = x.shape[0] // rows, rows, lead, kept
        return (x.narrow(0, 0, lead * rows), *(x.narrow(0, i * rows, rows) for i in kept))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        result = _LeadAndKept._total(ctx, gradients)
        if torch.is_grad_enabled():
            given = tuple(gradient for gradient in gradients if gradient is not None)
            (result,) = refuse_second_derivative(None, (result,), through=given)
        return result, None, None, None

    @staticmethod
    @torch.no_grad()
    def _total(ctx: Any, gradients: tuple[Tensor | None, ...]) -> Tensor:
        shape = (ctx.ghosts * ctx.rows, *ctx.example.shape[1:])
        like = next(gradient for gradient in gradients if gradient is not None)
        channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        total = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
        written = set()
        if gradients[0] is not None:
            total.narrow(0, 0, ctx.lead * ctx.rows).copy_(gradients[0])
            written.update(range(ctx.lead))
        for index, gradient in zip(ctx.kept, gradients[1:], strict=True):
            part = total.narrow(0, index * ctx.rows, ctx.rows)
            if gradient is None:
                continue
            if index in written:
                part.add_(gradient)
            else:
                part.copy_(gradient)
                written.add(index)
        for index in set(range(ctx.ghosts)) - written:
            total.narrow(0, index * ctx.rows, ctx.rows).zero_()
        return total
