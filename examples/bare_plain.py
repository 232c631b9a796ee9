"""A training loop as people write it, on scikit-learn's handwritten digits. bare_gkt.py is the same with GKT."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

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
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for epoch in range(epochs):
    model.train()
    for images, targets in train_loader:
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f} accuracy {100 * accuracy(model):.1f} %")
