"""GKT in the loop of timm's train.py: a GKTTask in place of ClassificationTask. timm_plain.py is the same without.

python examples/timm_task.py
"""

from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader

from gkt_fast import GKTConfig
from gkt_fast.data import digits
from gkt_fast.integrations.timm import GKTTask


def main() -> None:
    torch.manual_seed(0)
    data = digits(320)
    train_loader = DataLoader(data.train, 32, shuffle=True, drop_last=True)
    model = timm.create_model("resnet18", num_classes=data.num_classes, in_chans=data.in_channels)
    task = GKTTask(model, criterion_kwargs={"smoothing": 0.1}, config=GKTConfig(groups=3))
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=5e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2)
    task.setup_ema(decay=0.9)

    for epoch in range(epochs):
        task.train()
        losses, kd_losses = AverageMeter(), AverageMeter()
        for images, targets in train_loader:
            result = task(images, targets)
            loss = result["loss"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
            optimizer.step()
            task.update_ema()
            losses.update(loss.item(), len(images))
            kd_losses.update(result["kd_loss"].item(), len(images))
        scheduler.step(epoch + 1)
        top1 = validate(task.get_eval_model(), data.test)
        print(f"epoch {epoch + 1}: loss {losses.avg:.3g} kd_loss {kd_losses.avg:.3g} top1 {top1:.1f} %")
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
