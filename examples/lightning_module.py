"""GKT in Lightning: GKTModule in place of a LightningModule. lightning_plain.py is the same without.

python examples/lightning_module.py
"""

from functools import partial

import lightning
import torch
from torch.utils.data import DataLoader

from gkt_fast import GKTConfig
from gkt_fast.data import digits
from gkt_fast.integrations.lightning import GKTModule
from gkt_fast.models import cifar_resnet


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    data = digits(320)
    module = GKTModule(
        cifar_resnet(14, data.num_classes, in_channels=data.in_channels),
        GKTConfig(groups=3),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2),
    )
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
