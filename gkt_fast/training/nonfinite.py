"""Losses, gradients and weights that are NaN or infinite: noticed, named, and kept out of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..distributed import any_rank, rank
from ..subnets.streams import first_group, place_of
from .state import TrainingState

__all__ = ["LossCheck", "NonFiniteLossError", "check_network", "non_finite_entries"]

logger = logging.getLogger("gkt_fast")


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite. The checkpoints on disk are from before."""


class LossCheck:
    """Reads whether the losses are finite, for which the host waits; all ranks read at the same time.

    Attributes:
        skipped: steps taken back so far, as last read.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self.skipped = int(state.optimization.skipped)

    def read(self) -> None:
        """Reads the losses of the epoch so far. Where such steps are taken back, it logs how many there were.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite, and such steps are not taken back.
        """
        state = self._state
        found = state.metrics.first_non_finite()
        where = "" if found is None else self._describe(*found)
        cause = "" if found is None else self._cause()
        if not state.optimization.skip_nonfinite:
            if found is not None:
                raise NonFiniteLossError(
                    f"the loss is not finite at {where}; checkpoints written before are untouched"
                    + (f". {cause}" if cause else "")
                )
            return
        skipped = int(state.optimization.skipped)
        if skipped > self.skipped:
            logger.warning(
                "%d steps skipped so far for NaN or infinite losses or gradients%s%s",
                skipped,
                f"; the first loss of this epoch at {where}" if where else "",
                f". {cause}" if cause else "",
            )
        self.skipped = skipped

    def _cause(self) -> str:
        """A class index out of range, which makes the loss NaN on a GPU; none that another rank met."""
        found = self._state.gkt.wrong_class_index()
        return "" if found is None else f"On rank {rank()} {found}"

    def _describe(self, step: int, streams: Sequence[int]) -> str:
        """The step, and the streams whose term is not finite."""
        config, subnets = self._state.gkt.config, self._state.gkt.sample(step)
        names = []
        for stream in streams:
            if not config.train_full:
                names.append(f"the subnet {subnets[0]}")
            elif stream == 0:
                names.append("the full network")
            else:
                loop, group = place_of(stream, config.step_groups)
                group += first_group(config, step) - 1
                names.append(f"loop {loop} group {group} ({subnets[stream - 1]})")
        return f"step {step} (epoch {self._state.epoch + 1}) in {', '.join(names) or 'their sum'}"


def check_network(state: TrainingState) -> None:
    """Reads whether the network is finite, for which the host waits. Every rank must call it.

    Raises:
        NonFiniteLossError: a parameter or a BatchNorm statistic is NaN or infinite, on any rank.
    """
    broken = non_finite_entries(state.gkt.model)
    if any_rank(bool(broken), state.device):
        raise NonFiniteLossError(
            f"the network is not finite after step {state.gkt.next_step - 1} "
            f"({len(broken)} tensors, {', '.join(broken[:3])}); checkpoints written before are untouched"
        )


def non_finite_entries(model: nn.Module) -> list[str]:
    """Names of the parameters and BatchNorm statistics that hold NaN or infinity. Reads them: the host waits.

    Other buffers may hold infinity on purpose, as masks do.
    """
    tensors = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            tensors |= {f"{path}.{name}": buffer for name, buffer in module.named_buffers()}
    if not tensors:
        return []
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, good in zip(tensors, finite, strict=True) if not good]
