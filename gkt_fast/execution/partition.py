"""Takes the ghost batches of a stacked activation apart, and stacks them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.library import refuse_second_derivative

__all__ = ["Rows", "lead_and_kept"]


class Rows(NamedTuple):
    """How many rows the ghost batches of an activation have.

    Args:
        lead: rows of the first one.
        other: rows of each other one, at most as many.
    """

    lead: int
    other: int

    def start(self, index: int) -> int:
        """Where a ghost batch begins; for the number of all, how many rows there are."""
        return 0 if index == 0 else self.lead + (index - 1) * self.other

    def ghosts(self, rows: int) -> int:
        """The number of ghost batches in so many rows."""
        return 1 + (rows - self.lead) // self.other if rows else 0


def lead_and_kept(x: Tensor, rows: Rows, lead: int, kept: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The first `lead` ghost batches, and some by themselves, without copying.

    Backward writes each gradient once into one buffer, where narrowing would fill a whole buffer for every part.

    Args:
        x: the ghost batches, one after another along the first dimension.
        rows: of the ghost batches.
        lead: number of leading ghost batches, may be all.
        kept: indices of the ghost batches wanted by themselves, of the first one only `rows.other` rows; they may be
            among the leading ones, and occur repeatedly.
    """
    ghosts = rows.ghosts(x.shape[0])
    if lead == ghosts and (not kept or (ghosts == 1 and rows.lead == rows.other)):
        return x, [x] * len(kept)
    leading, *others = _LeadAndKept.apply(x, rows, lead, tuple(kept))
    return leading, others


class _LeadAndKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, lead: int, kept: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.example = x.detach()[:0]
        ctx.total, ctx.rows, ctx.lead, ctx.kept = x.shape[0], rows, lead, kept
        leading = x.narrow(0, 0, rows.start(lead))
        return (leading, *(x.narrow(0, rows.start(i), rows.other) for i in kept))

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
        rows: Rows = ctx.rows
        shape = (ctx.total, *ctx.example.shape[1:])
        like = next(gradient for gradient in gradients if gradient is not None)
        channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        total = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
        written = set()
        if gradients[0] is not None:
            total.narrow(0, 0, rows.start(ctx.lead)).copy_(gradients[0])
            written.update(range(ctx.lead))
        for index, gradient in zip(ctx.kept, gradients[1:], strict=True):
            if gradient is None:
                continue
            start = rows.start(index)
            part = total.narrow(0, start, rows.other)
            if index in written:
                part.add_(gradient)
                continue
            part.copy_(gradient)
            written.add(index)
            rest = rows.start(index + 1) - start - rows.other
            if rest:
                total.narrow(0, start + rows.other, rest).zero_()
        for index in set(range(rows.ghosts(ctx.total))) - written:
            start = rows.start(index)
            total.narrow(0, start, rows.start(index + 1) - start).zero_()
        return total
