"""The least it takes to train a network with GKT: the model, its optimizer, a loader.

    python examples/minimal.py

Random images stand in for yours; the network learns nothing from them.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from gkt_fast import GKTConfig, GKTTrainer

loader = DataLoader(
    TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(10, (64,))), batch_size=16, shuffle=True
)

model = resnet18(num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
trainer = GKTTrainer(model, optimizer, GKTConfig(groups=3))
trainer.fit(loader, epochs=2, val_loader=loader)
print(trainer.evaluate(loader, depths=(1, 1, 1, 1), calibration_loader=loader))
