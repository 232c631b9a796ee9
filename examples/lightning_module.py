"""GKT in a LightningModule: automatic optimization, precision, strategies and checkpoints as ever.

python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gkt_fast import GKT, GKTConfig
from gkt_fast.data import digits
from gkt_fast.models import cifar_resnet


class GKTModule(lightning.LightningModule):
    """A classifier trained with its subnets; `module.gkt.model` is the network.

    Args:
        model: the network.
        config: GKT's hyper-parameters.
        lr: learning rate.
    """

    def __init__(self, model: nn.Module, config: GKTConfig, lr: float = 0.05) -> None:
        super().__init__()
        self.gkt = GKT(model, config)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output = self.gkt(*batch)
        losses = {"train_loss": output.loss, "train_ce": output.ce, "train_kd": output.kd.sum()}
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True)
        return output.loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        hits = (self.gkt.model(images).argmax(1) == targets).float().mean()
        self.log("val_accuracy", hits, sync_dist=True, batch_size=len(images))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    data = digits(320)
    module = GKTModule(cifar_resnet(14, data.num_classes, in_channels=data.in_channels), GKTConfig(groups=3))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="auto",
        log_every_n_steps=5,
        default_root_dir="lightning_run",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_loader = DataLoader(data.train, 32, shuffle=True, drop_last=True)
    trainer.fit(module, train_loader, DataLoader(data.test, 500))
    metrics = {name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()}
    print(f"after {trainer.global_step} steps: {metrics}")


if __name__ == "__main__":
    main()
