"""GKT in the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ..config import GKTConfig
from ..gkt import GKT
from .knowledge import refuse_knowledge_by_sample
from .scaling import loss_scale

__all__ = ["GKTTrainerMixin", "Trainer"]

Criterion = Callable[[Tensor, Tensor], Tensor]


class GKTTrainerMixin:
    """Before `transformers.Trainer` in a class's bases, trains its model with its subnets.

    The trainer's model stays the model of transformers that it was given: saving, loading, its `config`, evaluation and
    gradient checkpointing are the trainer's own. In training, `GKT` around the model takes its place within whatever
    Accelerate wraps it in. Subnets are drawn by `state.global_step`: batches that are accumulated into one optimizer
    step get the same ones, and a resumed run goes on with the next. `label_smoothing_factor` is GKT's
    `label_smoothing`. A model of problem type "multi_label_classification" trains on binary cross entropy, and wants
    `distillation="sigmoid"`.

    Args:
        gkt: GKT's hyper-parameters; None: the defaults.
        criterion: see `GKT`.
        stages: see `GKT`.
        *args: of the trainer.
        **options: of the trainer.

    Raises:
        ValueError: the trainer's arguments ask for what GKT can't do: several GPUs in one process (DataParallel), FSDP,
            DeepSpeed, `torch_compile`, `compute_loss_func`, regression, knowledge kept by sample, or label smoothing
            given twice.
    """

    def __init__(
        self,
        *args: Any,
        gkt: GKTConfig | None = None,
        criterion: Criterion | None = None,
        stages: Sequence[str | Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        config, criterion = self._checked(GKTConfig() if gkt is None else gkt, criterion)
        self.gkt = GKT(self.model, config, stages, criterion=criterion)
        # The loss is the mean over a batch; the trainer divides by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._gkt_prepared: nn.Module | None = None

    def _checked(self, config: GKTConfig, criterion: Criterion | None) -> tuple[GKTConfig, Criterion | None]:
        refused = {
            "several GPUs in one process (DataParallel)": self.args.n_gpu > 1,
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "torch_compile (gkt_fast.compile_blocks(model) compiles the blocks)": self.args.torch_compile,
            "compute_loss_func (give the trainer a criterion)": self.compute_loss_func is not None,
        }
        for what, asked in refused.items():
            if asked:
                raise ValueError(
                    f"GKT doesn't run with {what}; several GPUs want torchrun or accelerate launch"
                )
        refuse_knowledge_by_sample(config, "transformers' Trainer")
        problem = getattr(self.model.config, "problem_type", None)
        if problem == "regression":
            raise ValueError("problem_type is 'regression'; GKT distils classes")
        if problem == "multi_label_classification" and criterion is None:
            if config.distillation != "sigmoid":
                raise ValueError(
                    f"problem_type is {problem!r} and distillation is {config.distillation!r}; it must be 'sigmoid'"
                )
            criterion = F.binary_cross_entropy_with_logits
        smoothing = self.args.label_smoothing_factor
        if smoothing and config.label_smoothing not in (0.0, smoothing):
            raise ValueError(
                f"label_smoothing_factor is {smoothing} and the configuration's label_smoothing is "
                f"{config.label_smoothing}; give it once"
            )
        return config.replace(label_smoothing=smoothing or config.label_smoothing), criterion

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """In training, GKT around the model within what Accelerate wraps it in; the trainer then prepares only the
        optimizer."""
        if not training:
            return super()._wrap_model(model, training, dataloader)
        if self._gkt_prepared is None:
            self._gkt_prepared = self.accelerator.prepare(self.gkt)
        return self._gkt_prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """In training, the loss of the full network and its subnets; otherwise the trainer's own."""
        if model is not self._gkt_prepared:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(f"the batch has no labels; it has {', '.join(inputs)}")
        output = model(
            _positional(self.gkt.model, inputs),
            labels,
            step=self.state.global_step,
            loss_scale=loss_scale(self.accelerator.scaler, labels.device),
        )
        return (
            (output.loss, {"loss": output.loss, "logits": output.logits}) if return_outputs else output.loss
        )


class Trainer(GKTTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` with GKT: its own arguments and those of `GKTTrainerMixin`."""


def _positional(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """A batch's named inputs as positional arguments of the model's forward; those between are at their defaults."""
    parameters = inspect.signature(model.forward).parameters
    names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    unknown = [name for name in inputs if name not in names]
    if unknown:
        raise ValueError(
            f"the batch holds {', '.join(unknown)}, which {type(model).__name__}.forward takes by no name "
            f"of its own ({', '.join(names)})"
        )
    last = max(names.index(name) for name in inputs)
    return tuple(inputs.get(name, parameters[name].default) for name in names[: last + 1])
