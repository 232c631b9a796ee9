"""GKT in Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import GKTConfig
from ..gkt import GKT
from ..network.calls import logits_of
from .knowledge import refuse_knowledge_by_sample
from .scaling import loss_scale

__all__ = ["GKTModule", "network_state"]

Criterion = Callable[[Tensor, Tensor], Tensor]


class GKTModule(lightning.LightningModule):
    """A network that Lightning trains with its subnets; automatic optimization, strategies and checkpoints as usual.

    Subnets are drawn by `trainer.global_step`: batches that are accumulated into one optimizer step get the same ones,
    and a resumed run goes on with the next. Logs `train_loss` (distillation included), `train_ce` and `train_kd`;
    `val_loss` and `val_accuracy`; the same as `test_` in tests.

    Args:
        model: the network; `module.model` later.
        config: GKT's hyper-parameters; None: the defaults.
        criterion: see `GKT`; `val_loss` is of it too.
        stages: see `GKT`.
        optimizer: makes the optimizer from the parameters, for example
            `functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)`. None: override `configure_optimizers`.
        scheduler: makes a schedule, stepped after every epoch, from the optimizer.

    Raises:
        ValueError: knowledge is to be kept by sample.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GKTConfig | None = None,
        *,
        criterion: Criterion | None = None,
        stages: Sequence[str | Sequence[str]] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        refuse_knowledge_by_sample(config or GKTConfig(), "Lightning's training step")
        self.gkt = GKT(model, config, stages, criterion=criterion)
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.gkt.model

    def forward(self, *inputs: Any) -> Any:
        """The network's own forward."""
        return self.gkt.model(*inputs)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        output = self.gkt(
            inputs,
            targets,
            step=self.trainer.global_step,
            loss_scale=loss_scale(getattr(self.trainer.precision_plugin, "scaler", None), self.device),
        )
        losses = {"train_loss": output.loss.detach(), "train_ce": output.ce, "train_kd": output.kd.sum()}
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(targets))
        return output.loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate("val", *batch)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate("test", *batch)

    def _evaluate(self, name: str, inputs: Tensor, targets: Tensor) -> None:
        logits = logits_of(self(inputs))
        if self.gkt.criterion is None:
            loss = F.cross_entropy(logits, targets, ignore_index=self.gkt.config.ignore_index)
        else:
            loss = self.gkt.criterion(logits, targets)
        self.log(f"{name}_loss", loss, sync_dist=True, batch_size=len(targets))
        if not targets.is_floating_point():
            counted = targets != self.gkt.config.ignore_index
            hits = (logits.argmax(1) == targets)[counted].float().mean()
            self.log(f"{name}_accuracy", hits, sync_dist=True, batch_size=len(targets))

    def configure_optimizers(self) -> Any:
        if self._make_optimizer is None:
            raise NotImplementedError(
                "give GKTModule an optimizer, such as functools.partial(torch.optim.SGD, lr=0.1), or override "
                "configure_optimizers"
            )
        optimizer = self._make_optimizer(self.gkt.model.parameters())
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer)}


def network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The network's own state_dict in a Lightning checkpoint of a `GKTModule`.

    Raises:
        ValueError: it is of another module.
    """
    prefix = "gkt.model."
    state = {
        key.removeprefix(prefix): value
        for key, value in checkpoint.get("state_dict", {}).items()
        if key.startswith(prefix)
    }
    if not state:
        raise ValueError("the checkpoint holds no network of a GKTModule (keys gkt.model.*)")
    return state
