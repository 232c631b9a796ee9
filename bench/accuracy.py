"""Does it train better, for how much, and against whom: one CSV row per finished training run.

    python bench/accuracy.py imagefolder:PATH --train-images 1000 --epochs 100 --seeds 0 1 2
    python bench/accuracy_report.py

PATH holds train/CLASS/*, and test/CLASS/* or val/CLASS/* (CIFAR-10 as images, for instance). A run that has its row is
skipped, one that was cut off goes on from its last epoch, and `--minutes` bounds when new runs are started: so the
whole can be run in pieces. Checkpoints stay in WORK: a run whose row was deleted is only evaluated again. Every run
of a seed starts from the same weights and sees the same order of images; the training images are the same in all
runs. What a step costs is measured first, in CPU time of one thread and with the recipes in turn, and kept
(`accuracy_cost.csv`): wall-clock times of runs on a busy machine say little.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, environment, write_csv
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gkt_fast import Callback, GKTTrainer, LinearWarmup, extract_subnet, method_config
from gkt_fast.models import cifar_resnet

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison.

    Args:
        method: name for `gkt_fast.method_config`.
        changes: fields of `GKTConfig` that differ from the method's.
        alone: depths of the network that is trained; None: the full one.
        costs_as: train for as many epochs as cost what this recipe costs at the epochs asked for.
        kd_warmup: share of the training in which the distillation terms' weight rises from 0.
        baseline: the recipe that the report compares this one with.
    """

    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    alone: tuple[int, ...] | None = None
    costs_as: str | None = None
    kd_warmup: float = 0.0
    baseline: str = "plain"


METHODS = {
    "plain": Recipe("plain"),
    "plain, cost of gkt": Recipe("plain", costs_as="gkt"),
    "label smoothing": Recipe("plain", {"label_smoothing": 0.1}),
    "stochastic depth": Recipe("stochastic_depth"),
    "st": Recipe("st"),
    "st, 3 subnets": Recipe("st", {"loops": 3}),
    "st++": Recipe("st++"),
    "gkt": Recipe("gkt"),
    "gkt, 2 groups": Recipe("gkt", {"groups": 2}),
    "gkt, 2 loops": Recipe("gkt", {"loops": 2}),
}
ALONE = {
    "plain 1-1-1": Recipe("plain", alone=(1, 1, 1)),
    "plain 2-2-2": Recipe("plain", alone=(2, 2, 2)),
}
BUDGETS = {
    f"gkt, budget {budget}": Recipe("gkt", {"budget": budget}, baseline="gkt")
    for budget in (1.0, 1.2, 1.25, 1.5)
}
CHOICES = {
    "gkt, normalised": Recipe("gkt", {"normalize_logits": True}, baseline="gkt"),
    "gkt, decay 0.8": Recipe("gkt", {"decay": 0.8}, baseline="gkt"),
    "gkt, temperature 2": Recipe("gkt", {"temperature": 2.0}, baseline="gkt"),
    "gkt, kd_weight 0.33": Recipe("gkt", {"kd_weight": 0.33}, baseline="gkt"),
    "gkt, kd_weight 0.5": Recipe("gkt", {"kd_weight": 0.5}, baseline="gkt"),
    "gkt, kd_weight 2": Recipe("gkt", {"kd_weight": 2.0}, baseline="gkt"),
    "gkt, kd warm-up 0.2": Recipe("gkt", kd_warmup=0.2, baseline="gkt"),
    "gkt, ema 0.9, 2 loops": Recipe("gkt", {"loops": 2, "ema": 0.9}, baseline="gkt, 2 loops"),
    "gkt, ema 0, 2 loops": Recipe("gkt", {"loops": 2, "ema": 0.0}, baseline="gkt, 2 loops"),
    "gkt, batch_norm sequential": Recipe("gkt", {"batch_norm": "all_streams"}, baseline="gkt"),
    "gkt, subnet_ce_weight 0.33": Recipe("gkt", {"subnet_ce_weight": 0.33}, baseline="gkt"),
}
SETTING = (
    "train_images", "test_images", "image_size", "depth", "width", "epochs", "batch_size", "lr", "weight_decay",
    "precision",
)  # fmt: skip
"""What must be equal for rows to be compared."""
COST_SETTING = ("image_size", "depth", "width", "batch_size", "precision")
"""What a step's cost depends on."""
STUDIES = {"methods": METHODS, "alone": ALONE, "budgets": BUDGETS, "choices": CHOICES}
ONE_BY_ONE = {"gkt, one by one": Recipe("gkt", {"execution": "sequential"})}
"""In no study, since it trains what "gkt" does: for its cost alone."""
RECIPES = METHODS | ALONE | BUDGETS | CHOICES | ONE_BY_ONE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="imagefolder:PATH")
    parser.add_argument("--train-images", type=int, default=1000, help="the same number of each class")
    parser.add_argument("--test-images", type=int, default=10000, help="the same number of each class")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--depth", type=int, default=20, help="of the cifar_resnet, 6n + 2")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=["methods"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="instead of the studies' recipes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=RESULTS / "accuracy.csv")
    parser.add_argument(
        "--work", type=Path, default=Path("accuracy_runs"), help="checkpoints and logs of the runs"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.recipes or [name for study in args.study for name in STUDIES[study]]
    data = load(args)
    costs = step_costs(names, data, args)
    deadline = time.monotonic() + 60 * args.minutes
    for seed in args.seeds:
        for name in names:
            if is_finished(args.csv, run_key(name, seed, args)):
                continue
            if time.monotonic() > deadline:
                print("The minutes are over; run the same command again to go on.")
                return
            append(args.csv, run(name, seed, data, costs, args))


@dataclass(frozen=True)
class Images:
    """Images in memory: uint8 (N, 3, H, W), class indices (N,)."""

    images: Tensor
    targets: Tensor


def load(args: argparse.Namespace) -> dict[str, Images]:
    """The training and test images, the first ones of each class; decoded once and kept beside the checkpoints."""
    kind, _, path = args.data.partition(":")
    if kind != "imagefolder" or not path:
        raise SystemExit(f"data is {args.data!r}; it must be imagefolder:PATH")
    cache = args.work / f"images_{args.image_size}_{args.train_images}_{args.test_images}.pt"
    if cache.exists():
        return {split: Images(*tensors) for split, tensors in torch.load(cache).items()}
    test = next((Path(path) / name for name in ("test", "val") if (Path(path) / name).is_dir()), None)
    if test is None or not (Path(path) / "train").is_dir():
        raise SystemExit(f"{path} must hold the folders train, and test or val")
    data = {
        "train": decode(Path(path) / "train", args.train_images, args.image_size),
        "test": decode(test, args.test_images, args.image_size),
    }
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save({split: (part.images, part.targets) for split, part in data.items()}, cache)
    return data


def decode(folder: Path, number: int, image_size: int) -> Images:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    resize = v2.Compose([v2.PILToTensor(), v2.Resize(image_size, antialias=True)])
    dataset = ImageFolder(folder, resize)
    each = number // len(dataset.classes)
    if each * len(dataset.classes) != number:
        raise SystemExit(
            f"{number} images can't be the same number of each of {len(dataset.classes)} classes"
        )
    of_class: dict[int, list[int]] = {}
    for index, target in enumerate(dataset.targets):
        of_class.setdefault(target, []).append(index)
    if min(map(len, of_class.values())) < each:
        raise SystemExit(f"{folder} has classes with fewer than {each} images")
    chosen = [index for indices in of_class.values() for index in indices[:each]]
    images = torch.stack([dataset[index][0] for index in chosen])
    return Images(images, torch.tensor([dataset.targets[index] for index in chosen]))


def normalized(images: Tensor) -> Tensor:
    mean, std = (255 * torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def train_loader(data: Images, batch_size: int, seed: int) -> DataLoader:
    """Batches in an order of their own in every epoch, randomly shifted by up to an eighth and mirrored."""
    from torchvision.transforms import v2

    side = data.images.shape[-1]
    augment = v2.Compose([v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip()])

    def collate(indices: list[int]) -> tuple[Tensor, Tensor]:
        images = torch.stack([augment(data.images[index]) for index in indices])
        return normalized(images), data.targets[indices]

    return DataLoader(
        range(len(data.targets)),
        batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )


def batches(data: Images, batch_size: int = 250) -> list[tuple[Tensor, Tensor]]:
    pieces = zip(data.images.split(batch_size), data.targets.split(batch_size), strict=True)
    return [(normalized(images), targets) for images, targets in pieces]


def build(recipe: Recipe, seed: int, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(seed)
    model = cifar_resnet(args.depth, 10, args.width)
    return model if recipe.alone is None else extract_subnet(model, recipe.alone)


def make_trainer(name: str, seed: int, epochs: int, args: argparse.Namespace) -> GKTTrainer:
    recipe = RECIPES[name]
    model = build(recipe, seed, args)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    config = method_config(recipe.method, image_size=args.image_size, seed=seed, **recipe.changes)
    warmup_steps = round(recipe.kd_warmup * epochs * (args.train_images // args.batch_size))
    return GKTTrainer(
        model,
        optimizer,
        config,
        scheduler=scheduler,
        amp=None if args.precision == "fp32" else args.precision,
        channels_last=True,
        kd_schedule=LinearWarmup(warmup_steps) if warmup_steps else None,
    )


def run(
    name: str, seed: int, data: dict[str, Images], costs: dict[str, float], args: argparse.Namespace
) -> dict[str, object]:
    """Trains one network and evaluates it and its subnets."""
    recipe = RECIPES[name]
    epochs = args.epochs
    if recipe.costs_as is not None:
        epochs = round(epochs * costs[recipe.costs_as])
    trainer = make_trainer(name, seed, epochs, args)
    folder = args.work / "-".join(map(str, run_key(name, seed, args).values())).replace(" ", "_").replace(
        ",", ""
    )
    loader = train_loader(data["train"], args.batch_size, seed)
    trainer.fit(loader, epochs=epochs, output_dir=folder, progress=False, callbacks=[CpuSeconds()])
    row = run_key(name, seed, args) | {
        "epochs_run": epochs,
        "step_cost": costs["plain" if recipe.costs_as else name],
        "cpu_seconds": round(sum(float(epoch["cpu_seconds"]) for epoch in read(folder / "summary.csv")), 2),
        **evaluate(trainer, recipe, seed, data, args),
        **environment(),
    }
    print({key: row[key] for key in ("recipe", "seed", "full", "cpu_seconds")}, flush=True)
    return row


class CpuSeconds(Callback):
    """Adds each epoch's CPU time to `summary.csv`, so that a run in several pieces has its time in all."""

    def on_epoch_start(self, trainer: GKTTrainer) -> None:
        self.started = time.process_time()

    def on_epoch_end(self, trainer: GKTTrainer, metrics: dict[str, float]) -> None:
        metrics["cpu_seconds"] = time.process_time() - self.started


def evaluate(
    trainer: GKTTrainer, recipe: Recipe, seed: int, data: dict[str, Images], args: argparse.Namespace
) -> dict[str, float]:
    """Test accuracy in % of the network as trained, and of subnets with BatchNorm statistics of their own.

    Those come, as the network's own do, from batches of augmented training images in random order.
    """
    test = batches(data["test"])
    result = trainer.evaluate(test)
    row = {"full": percent(result.accuracy), "full_loss": round(result.loss, 4)}
    blocks = (args.depth - 2) // 6
    for kept in range(1, blocks) if recipe.alone is None else ():
        torch.manual_seed(seed)
        calibration = train_loader(data["train"], args.batch_size, seed)
        result = trainer.evaluate(test, (kept,) * 3, calibration_loader=calibration)
        row["-".join([str(kept)] * 3)] = percent(result.accuracy)
    return row


def percent(share: float) -> float:
    return round(100 * share, 2)


def step_costs(names: list[str], data: dict[str, Images], args: argparse.Namespace) -> dict[str, float]:
    """Mean CPU time of a step relative to a plain step, kept in a file; what isn't there yet is measured."""
    path = args.csv.with_name(args.csv.stem + "_cost.csv")
    setting = {key: str(value) for key, value in setting_of(args).items() if key in COST_SETTING}
    rows = read(path)
    known = {row["recipe"]: float(row["step_cost"]) for row in rows if setting.items() <= row.items()}
    wanted = {"plain", *(RECIPES[name].costs_as or name for name in names)}
    missing = sorted(wanted - known.keys())
    if missing:
        measured = measure_costs(missing, data, args)
        rows += [
            {**setting, "recipe": name, "step_cost": cost, **environment()} for name, cost in measured.items()
        ]
        write_csv(path, rows)
        known |= measured
    return known


def measure_costs(
    names: list[str], data: dict[str, Images], args: argparse.Namespace, steps: int = 100
) -> dict[str, float]:
    trainers = {name: make_trainer(name, 0, args.epochs, args) for name in dict.fromkeys(["plain", *names])}
    images, targets = next(iter(train_loader(data["train"], args.batch_size, 0)))
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(steps + 2):
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.step(images, targets)
            if repeat >= 2:
                seconds[name].append(time.process_time() - start)
    plain = statistics.fmean(seconds["plain"])
    return {name: statistics.fmean(seconds[name]) / plain for name in names}


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in SETTING}


def run_key(name: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    return setting_of(args) | {"recipe": name, "seed": seed}


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def is_finished(path: Path, key: dict[str, object]) -> bool:
    wanted = {name: str(value) for name, value in key.items()}
    return any(wanted.items() <= row.items() for row in read(path))


def append(path: Path, row: dict[str, object]) -> None:
    """Adds a row, also where another process adds one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_csv(path, [*read(path), row])


if __name__ == "__main__":
    main()
