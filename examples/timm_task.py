"""GKT as a training task of timm, in the loop of timm's train.py: its factories, averaged weights, its checkpoints.

python examples/timm_task.py
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import AverageMeter, accuracy, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gkt_fast import GKT, GKTConfig
from gkt_fast.data import digits


class GKTTask(TrainingTask):
    """Takes the place of timm's ClassificationTask. Validation and checkpoints see the network itself.

    Args:
        model: the network.
        config: GKT's hyper-parameters; `label_smoothing` stands for train.py's criterion.
        options: of TrainingTask.
    """

    def __init__(self, model: nn.Module, config: GKTConfig, **options: Any) -> None:
        super().__init__(**options)
        self.trainable_module = GKT(model, config)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> GKTTask:
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids, **ddp_kwargs)
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        module = super().get_eval_model(module, ema)
        return None if module is None else unwrap_model(module).model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        return {"gkt": unwrap_model(self.get_trainable_module(ema)).get_extra_state()}

    def load_task_state(self, state: dict[str, Tensor] | None, *_: Any, ema: bool = False, **__: Any) -> None:
        if state is not None:
            unwrap_model(self.get_trainable_module(ema)).set_extra_state(state["gkt"])

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        output = self.trainable_module(input, target)
        return {
            "loss": output.loss,
            "output": output.logits,
            "ce_loss": output.ce,
            "kd_loss": output.kd.sum(),
        }


def main() -> None:
    torch.manual_seed(0)
    data = digits(320)
    train_loader = DataLoader(data.train, 32, shuffle=True, drop_last=True)
    model = timm.create_model("resnet18", num_classes=data.num_classes, in_chans=data.in_channels)
    task = GKTTask(model, GKTConfig(groups=3, label_smoothing=0.1))
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=5e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2)
    task.setup_ema(decay=0.9)

    for epoch in range(epochs):
        task.train()
        losses = {name: AverageMeter() for name in ("loss", "ce_loss", "kd_loss")}
        for images, targets in train_loader:
            result = task(images, targets)
            optimizer.zero_grad()
            result["loss"].backward()
            torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
            optimizer.step()
            task.update_ema()
            for name, meter in losses.items():
                meter.update(result[name].item(), len(images))
        scheduler.step(epoch + 1)
        means = " ".join(f"{name} {meter.avg:.3g}" for name, meter in losses.items())
        print(f"epoch {epoch + 1}: {means} top1 {validate(task.get_eval_model(), data.test):.1f} %")
    print(f"averaged weights: top1 {validate(task.get_eval_model(ema=True), data.test):.1f} %")


@torch.no_grad()
def validate(model: nn.Module, dataset: Any) -> float:
    model.eval()
    top1 = AverageMeter()
    for images, targets in DataLoader(dataset, 500):
        top1.update(accuracy(model(images), targets)[0].item(), len(images))
    return top1.avg


if __name__ == "__main__":
    main()
