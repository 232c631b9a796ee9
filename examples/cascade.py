"""One network at every depth, and a cascade that stops early, on scikit-learn's digits within a minute.

    python examples/cascade.py

Trains a narrow ResNet-20 by GKT, makes it elastic, runs it at several depths, lets a cascade decide for each image how
deep to go, and writes all of it as one file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, random_split

from gkt_fast import GKTConfig, GKTTrainer, evaluate_subnets, fit_cascade, load_elastic, make_elastic
from gkt_fast.data import digits
from gkt_fast.models import cifar_resnet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train-images", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("elastic.pt"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the layers are too small to share
    torch.manual_seed(0)
    data = digits(args.train_images)
    validation, test = random_split(data.test, [0.5, 0.5], torch.Generator().manual_seed(0))
    train_loader = DataLoader(data.train, 25, shuffle=True, drop_last=True)
    val_loader, test_loader = DataLoader(validation, 64), DataLoader(test, 64)

    model = cifar_resnet(20, width=3, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    GKTTrainer(model, optimizer, GKTConfig(), scheduler=scheduler).fit(train_loader, epochs=args.epochs)

    depths = [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    elastic = make_elastic(model, depths, calibration_loader=train_loader)
    for result in evaluate_subnets(elastic, test_loader):
        print(f"depths {result.subnet}: {100 * result.accuracy:.2f} %, {result.flops / 1e6:.2f} MFLOPs")

    cascade = fit_cascade(elastic, val_loader, max_drop=0.5)
    found = cascade.evaluate(test_loader)
    shares = ", ".join(f"{100 * s:.0f} % at {d}" for d, s in zip(cascade.order, found.shares, strict=True))
    print(f"cascade: {100 * found.accuracy:.2f} %, {found.mean_flops / 1e6:.2f} MFLOPs on average; {shares}")

    elastic.save(args.output)
    again = load_elastic(args.output, cifar_resnet(20, width=3, in_channels=1))
    images, _ = next(iter(test_loader))
    with torch.no_grad():
        assert torch.equal(again(images, depths=(1, 1, 1)), elastic(images, depths=(1, 1, 1)))
    print(f"Written to {args.output}: {len(depths)} depths in {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
