"""A loop with Hugging Face's Accelerate. huggingface_accelerate.py is the same with GKT.

accelerate launch examples/huggingface_accelerate_plain.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from gkt_fast.data import digits
from gkt_fast.models import cifar_resnet


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    data, epochs = digits(320), 2
    model = cifar_resnet(14, data.num_classes, in_channels=data.in_channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 10)
    train_loader = DataLoader(data.train, 16, shuffle=True, drop_last=True)
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, DataLoader(data.test, 500)
    )

    for epoch in range(epochs):
        model.train()
        for images, targets in train_loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), targets)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        hits = []
        for images, targets in test_loader:
            with torch.no_grad():
                predictions = model(images).argmax(1)
            hits.append(accelerator.gather_for_metrics(predictions == targets))
        accuracy = torch.cat(hits).float().mean().item()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f} accuracy {100 * accuracy:.1f} %")
        accelerator.save_state("accelerate_run")


if __name__ == "__main__":
    main()
