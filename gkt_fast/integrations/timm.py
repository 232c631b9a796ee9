"""GKT as a training task of timm, for its train.py and loops like it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import timm.task
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..config import GKTConfig
from ..gkt import GKT
from ..network.compilation import compile_blocks
from .knowledge import refuse_knowledge_by_sample

__all__ = ["GKTTask"]

logger = logging.getLogger("gkt_fast")


class GKTTask(timm.task.ClassificationTask):
    """Takes the place of timm's `ClassificationTask`, with the same arguments and a configuration.

    Validation, averaged weights and checkpoints see the network itself, whose state_dict keys never change; GKT's step
    counter is in the checkpoint's task state. The criterion is honoured: cross entropy with its label smoothing, and
    soft targets as from mixup, run in the fused loss; any other (binary cross entropy, for one) is GKT's `criterion`.
    `compile` compiles the residual blocks; gradient checkpointing is timm's own.

    Args:
        model: the network.
        criterion: as ClassificationTask's.
        config: GKT's hyper-parameters; None: the defaults.
        stages: see `GKT`.
        accumulate: batches of an optimizer step, train.py's `--grad-accum-steps`: they get the same subnets.
        criterion_kwargs: as ClassificationTask's.
        options: further ones of ClassificationTask.

    Raises:
        ValueError: the criterion and the configuration contradict each other, or knowledge is to be kept by sample.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable | None = None,
        config: GKTConfig | None = None,
        stages: Sequence[str | Sequence[str]] | None = None,
        accumulate: int = 1,
        criterion_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, criterion, criterion_kwargs, **options)
        config, own = _with_criterion(GKTConfig() if config is None else config, self.criterion)
        refuse_knowledge_by_sample(config, "timm's task")
        self.trainable_module = GKT(model, config, stages, criterion=own)
        self.accumulate = accumulate
        self._batches = 0

    @property
    def gkt(self) -> GKT:
        """GKT, whatever wraps it."""
        return unwrap_model(self.trainable_module)

    def train(self, mode: bool = True) -> GKTTask:
        """As ever; an epoch begins with a new optimizer step."""
        self._batches = 0
        return super().train(mode)

    def compile(self, backend: str = "inductor", mode: str | None = None, **options: Any) -> nn.Module:
        """Compiles the residual blocks, in training and evaluation: the network as a whole would be one graph for every
        sampled subnet."""
        gkt = self.gkt
        compile_blocks(gkt.model, gkt.stages, backend=backend, mode=mode, **options)
        return gkt.model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        module = super().get_eval_model(module, ema)
        inner = None if module is None else unwrap_model(module)
        return inner.model if isinstance(inner, GKT) else module

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        return {"gkt": unwrap_model(self.get_trainable_module(ema)).get_extra_state()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if state and "gkt" in state:
            unwrap_model(self.get_trainable_module(ema)).set_extra_state(state["gkt"])
        elif strict:
            logger.warning(
                "the checkpoint holds no state of GKT, since another task wrote it: subnets are drawn from step 0 on"
            )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One training step's losses and the full network's logits; `ce_loss` is the criterion's value without the
        distillation that `loss` holds."""
        first = self._batches % self.accumulate == 0
        self._batches += 1
        output = self.trainable_module(input, target, step=self.gkt.next_step - (0 if first else 1))
        return {
            "loss": output.loss,
            "output": output.logits,
            "ce_loss": output.ce,
            "kd_loss": output.kd.sum(),
        }


def _with_criterion(
    config: GKTConfig, criterion: nn.Module | Callable
) -> tuple[GKTConfig, Callable[[Tensor, Tensor], Tensor] | None]:
    """The configuration for a criterion that the fused loss computes, or the criterion as one of one's own."""
    if isinstance(criterion, SoftTargetCrossEntropy):
        return config, None
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return _smoothed(config, criterion.smoothing), None
    if (
        isinstance(criterion, nn.CrossEntropyLoss)
        and criterion.weight is None
        and criterion.reduction == "mean"
    ):
        if criterion.ignore_index != config.ignore_index:
            config = config.replace(ignore_index=criterion.ignore_index)
        return _smoothed(config, criterion.label_smoothing), None
    return config, criterion


def _smoothed(config: GKTConfig, smoothing: float) -> GKTConfig:
    if smoothing and config.label_smoothing not in (0.0, smoothing):
        raise ValueError(
            f"label_smoothing is {config.label_smoothing} in the configuration and {smoothing} in the criterion; "
            "give it once"
        )
    return config.replace(label_smoothing=smoothing or config.label_smoothing)
