"""From losses to optimizer steps: loss scaling, gradient accumulation, clipping, steps that are taken back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import rank, reduce_min
from .schedules import check_step
from .step_guard import StepGuard

__all__ = ["Optimization"]


class Optimization:
    """The backward passes of one or several batches, and the optimizer step after the last of them.

    Each batch counts by its number of samples, so that the gradients are those of the mean over all samples, as of one
    big batch (but for BatchNorm, whose statistics are of each batch, for rows without a label, which are averaged over
    within their batch, and with `subnet_share`, by which each batch gives subnets its own first rows).

    Args:
        model: the network.
        optimizer: over its parameters.
        device: where it is.
        loss_scaling: whether to scale the loss dynamically (float16).
        accumulate: batches of an optimizer step.
        clip_grad_norm: largest norm of all gradients together; larger ones are scaled down. None: no limit.
        skip_nonfinite: whether a step with a loss or gradients that are NaN or infinite changes nothing (see
            `StepGuard`). A float16 step whose gradients overflow is skipped by the loss scaling in any case.

    Raises:
        ValueError, TypeError: accumulate or clip_grad_norm is out of its range, or skip_nonfinite doesn't go with the
            optimizer.
        TypeError: the optimizer's `step` needs an argument, such as a closure.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        *,
        loss_scaling: bool = False,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int):
            raise TypeError(f"accumulate is {accumulate!r}; it must be an integer")
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}; it must be at least 1")
        if clip_grad_norm is not None and not 0.0 < clip_grad_norm < math.inf:
            raise ValueError(f"clip_grad_norm is {clip_grad_norm}; it must be a positive number or None")
        check_step("optimizer", optimizer)
        if skip_nonfinite and hasattr(optimizer, "consolidate_state_dict"):
            raise ValueError(
                f"skip_nonfinite is True, and the optimizer is {type(optimizer).__name__}, which hides its state, so "
                "that a step can't be taken back; set skip_nonfinite=False"
            )
        self.optimizer = optimizer
        self.device = device
        self.accumulate = accumulate
        self.clip_grad_norm = clip_grad_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.batches = 0
        """Batches whose gradients wait for the optimizer's step."""
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps taken back so far; a tensor, so that counting doesn't make the host wait."""
        self._guard = StepGuard(model, optimizer) if skip_nonfinite else None
        self._one = torch.ones((), device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._samples = 0
        self._expected_samples = 0

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step with a NaN or infinite loss or gradient is taken back."""
        return self._guard is not None

    def begin_batch(self) -> None:
        """Before a batch's forward pass."""
        if self.batches == 0 and self._guard is not None:
            self._guard.remember()

    def loss_scale(self) -> Tensor | None:
        """The factor on losses, on the device; None: there is none."""
        return self.scaler.scale(self._one) if self.scaler.is_enabled() else None

    def is_last(self) -> bool:
        """Whether the batch that comes next completes a step."""
        return self.batches + 1 == self.accumulate

    def backward(self, loss: Tensor, samples: int) -> None:
        """Adds the gradients of a batch.

        Args:
            loss: scalar, the mean over the batch's samples.
            samples: their number.
        """
        if self.batches == 0:
            self.optimizer.zero_grad(set_to_none=True)
            self._samples, self._expected_samples = 0, samples * self.accumulate
            self._finite = torch.ones_like(self._finite)
        self.batches += 1
        self._samples += samples
        if self._guard is not None:
            self._finite = self._finite & torch.isfinite(loss.detach())
        if samples != self._expected_samples:
            loss = loss * (samples / self._expected_samples)
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """The optimizer's step with the gradients of all batches since the last one."""
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if self._samples != self._expected_samples:  # fewer batches or samples than the first one promised
            torch._foreach_mul_(gradients, self._expected_samples / self._samples)
        if self.clip_grad_norm is not None or self._guard is not None:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.get_total_norm(gradients)
            if self.clip_grad_norm is not None:
                self._clip(norm)
            if self._guard is not None and not self.scaler.is_enabled():
                self._finite = self._finite & torch.isfinite(norm)
        if self._guard is not None:
            self._finite = reduce_min(self._finite.int()).bool()  # a step of all ranks, or of none
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self._guard is not None:
            self._guard.restore_unless(self._finite)
            self.skipped += ~self._finite
        self.batches = 0

    def forget_batches(self) -> None:
        """Gives up the gradients that wait for the optimizer's step."""
        self.batches = 0

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state for a checkpoint, which rank 0 writes. Every rank must call it.

        Of a `ZeroRedundancyOptimizer` rank 0 gathers the whole state; the others return their parameter groups alone.
        """
        if hasattr(self.optimizer, "consolidate_state_dict"):
            self.optimizer.consolidate_state_dict(to=0)
            if rank() != 0:
                return {"state": {}, "param_groups": [dict(group) for group in self.optimizer.param_groups]}
        return self.optimizer.state_dict()

    def _clip(self, norm: Tensor) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
