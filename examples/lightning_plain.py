"""A classifier in Lightning. lightning_module.py is the same with GKT.

python examples/lightning_plain.py
"""

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gkt_fast.data import digits
from gkt_fast.models import cifar_resnet


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = F.cross_entropy(self.model(images), targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        hits = (self.model(images).argmax(1) == targets).float().mean()
        self.log("val_accuracy", hits, sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    data = digits(320)
    module = Classifier(cifar_resnet(14, data.num_classes, in_channels=data.in_channels))
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
