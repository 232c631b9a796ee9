"""The loop of bare_plain.py with GKT: the model stays as it is, its loss comes from `GKT`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from gkt_fast import GKT, GKTConfig, extract_subnet, recalibrate_batch_norm

images, targets = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = (images.float() / 8 - 1).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
train_set, test_set = (TensorDataset(images[i::6], targets[i::6]) for i in (0, 1))
train_loader = DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)
epochs = 4


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    images, targets = test_set[:]
    return (model.eval()(images).argmax(1) == targets).float().mean().item()


torch.manual_seed(0)
model = resnet18(num_classes=10)
gkt = GKT(model, GKTConfig(groups=3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for epoch in range(epochs):
    model.train()
    for images, targets in train_loader:
        loss = gkt(images, targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f} accuracy {100 * accuracy(model):.1f} %")

small = extract_subnet(model, depths=(1, 1, 1, 1))
recalibrate_batch_norm(small, train_loader)
print(f"half of the blocks: accuracy {100 * accuracy(small):.1f} %")
