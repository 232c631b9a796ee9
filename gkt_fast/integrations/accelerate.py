"""GKT in a loop with Hugging Face's Accelerate."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..gkt import GKT, GKTOutput
from .scaling import loss_scale

__all__ = ["GKTStep", "unwrap_network"]


class GKTStep:
    """Calls a prepared `GKT` batch by batch, as the optimizer's steps want it.

    The batches that Accelerate accumulates into one optimizer step get the same subnets, and the counter goes up with
    the optimizer's steps; it is part of GKT's state, which `accelerator.save_state` writes. Where the losses of a
    float16 run are scaled, GKT is told. Call it inside `accelerator.accumulate(gkt)`.

    Args:
        accelerator: the one that prepared it.
        gkt: `GKT`, as returned by `accelerator.prepare`.

    Raises:
        TypeError: gkt is no GKT.
    """

    def __init__(self, accelerator: Accelerator, gkt: nn.Module) -> None:
        inner = accelerator.unwrap_model(gkt)
        if not isinstance(inner, GKT):
            raise TypeError(f"gkt is {type(inner).__name__}; it must be the prepared gkt_fast.GKT")
        self.accelerator = accelerator
        self.gkt = gkt
        self._inner = inner
        self._accumulating = False

    def __call__(
        self,
        inputs: Tensor | tuple[Any, ...],
        targets: Tensor,
        kd_weight: float | None = None,
        indices: Tensor | None = None,
    ) -> GKTOutput:
        """One batch; the arguments are those of `GKT`."""
        output = self.gkt(
            inputs,
            targets,
            step=self._inner.next_step - (1 if self._accumulating else 0),
            loss_scale=loss_scale(self.accelerator.scaler, self.accelerator.device),
            kd_weight=kd_weight,
            indices=indices,
        )
        self._accumulating = not self.accelerator.sync_gradients
        return output


def unwrap_network(accelerator: Accelerator, gkt: nn.Module) -> nn.Module:
    """The network in a prepared `GKT`, to evaluate or to save."""
    return accelerator.unwrap_model(gkt).model
