"""How well the methods train, and for what cost: one CSV row per finished training run.

    python bench/accuracy.py imagefolder:PATH --train-images 1000 --epochs 100 --seeds 0 1 2
    python bench/accuracy.py imagefolder:PATH --model vit8 --augmentation randaugment --study methods alone
    python bench/accuracy_report.py

Networks and how they are trained are in `accuracy_models`, what is compared in `accuracy_recipes`, what is done to the
images in `accuracy_images`.

PATH holds train/CLASS/*, and test/CLASS/* or val/CLASS/* (CIFAR-10 as images, for instance). A run that has its row is
skipped, one that was cut off goes on from its last epoch, and no run starts after `--minutes`: so the whole can be
run in pieces. Checkpoints stay in WORK: a run whose row was deleted is only evaluated again. Every run of a seed starts
from the same weights and sees the same order of images; the training images are the same in all runs. What a step
costs is measured first, in CPU time of one thread and with the recipes in turn, and kept (`accuracy_cost.csv`):
wall-clock times of runs on a busy machine say little.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accuracy_images import AUGMENTATIONS, Images, batches, decode, train_loader
from accuracy_models import build_model, family_of, make_scheduler
from accuracy_recipes import RECIPES, STUDIES, Recipe
from harness import RESULTS, environment, read_csv, write_csv
from torch import nn
from torch.utils.data import DataLoader

from gkt_fast import Callback, GKTTrainer, GroupKnowledgeMemory, LinearWarmup, extract_subnet, method_config

SETTING = (
    "train_images", "test_images", "image_size", "augmentation", "model", "width", "epochs", "batch_size", "lr",
    "weight_decay", "precision",
)  # fmt: skip
"""What must be equal for rows to be compared."""
COST_SETTING = ("image_size", "model", "width", "batch_size", "precision")
"""What a step's cost depends on."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="imagefolder:PATH")
    parser.add_argument("--train-images", type=int, default=1000, help="the same number of each class")
    parser.add_argument("--test-images", type=int, default=10000, help="the same number of each class")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--augmentation", choices=AUGMENTATIONS, default=AUGMENTATIONS[0])
    parser.add_argument("--model", default="cifar_resnet20", help="cifar_resnetN of N = 6n + 2, or vitN")
    parser.add_argument("--width", type=int, help="default, as of the next two: the model's")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, help="the largest; it ends at 0, by a cosine")
    parser.add_argument("--weight-decay", type=float)
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
    try:
        family, _ = family_of(args.model)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for name in ("width", "lr", "weight_decay"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(family, name))
    torch.set_num_threads(args.threads)
    names = chosen_recipes(args)
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


def chosen_recipes(args: argparse.Namespace) -> list[str]:
    """The recipes asked for; of the studies', those that fit the model."""
    family, number = family_of(args.model)
    depths = family.depths(number)
    wanted = args.recipes or [name for study in args.study for name in STUDIES[study]]
    fitting = [name for name in wanted if RECIPES[name].fits(depths, family.resizable)]
    if args.recipes and fitting != wanted:
        unfit = [name for name in wanted if name not in fitting]
        of_one_size = "" if family.resizable else ", and takes images of one size"
        raise SystemExit(f"recipes {unfit} don't fit {args.model}: it has depths {depths}{of_one_size}")
    return fitting


def augmented(
    data: dict[str, Images], seed: int, args: argparse.Namespace, indexed: bool = False
) -> DataLoader:
    """Batches of the training images."""
    return train_loader(data["train"], args.batch_size, seed, args.augmentation, indexed)


def build(recipe: Recipe, seed: int, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(args.model, args.width, args.image_size)
    return model if recipe.alone is None else extract_subnet(model, recipe.alone)


def make_trainer(name: str, seed: int, epochs: int, args: argparse.Namespace) -> GKTTrainer:
    recipe = RECIPES[name]
    model = build(recipe, seed, args)
    family, _ = family_of(args.model)
    optimizer = family.make_optimizer(model, args.lr, args.weight_decay)
    config = method_config(recipe.method, image_size=args.image_size, seed=seed, **recipe.changes)
    remembered = config.knowledge == "dataset"
    warmup_steps = round(recipe.kd_warmup * epochs * (args.train_images // args.batch_size))
    return GKTTrainer(
        model,
        optimizer,
        config,
        scheduler=make_scheduler(family, optimizer, epochs),
        amp=None if args.precision == "fp32" else args.precision,
        channels_last=True,
        kd_schedule=LinearWarmup(warmup_steps) if warmup_steps else None,
        memory=GroupKnowledgeMemory(args.train_images, None, config.groups) if remembered else None,
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
    folder = args.work / folder_name(run_key(name, seed, args).values())
    loader = augmented(data, seed, args, indexed=trainer.gkt.memory is not None)
    trainer.fit(loader, epochs=epochs, output_dir=folder, progress=False, callbacks=[CpuSeconds()])
    row = run_key(name, seed, args) | {
        "epochs_run": epochs,
        "step_cost": costs["plain" if recipe.costs_as else name],
        "cpu_seconds": round(
            sum(float(epoch["cpu_seconds"]) for epoch in read_csv(folder / "summary.csv")), 2
        ),
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
    stages = trainer.gkt.stages
    for kept in range(1, max(stage.depth for stage in stages)) if recipe.alone is None else ():
        torch.manual_seed(seed)
        depths = (kept,) * len(stages)
        result = trainer.evaluate(test, depths, calibration_loader=augmented(data, seed, args))
        row["-".join(map(str, depths))] = percent(result.accuracy)
    return row


def percent(share: float) -> float:
    return round(100 * share, 2)


def step_costs(names: list[str], data: dict[str, Images], args: argparse.Namespace) -> dict[str, float]:
    """Mean CPU time of a step relative to a plain step, kept in a file; what isn't there yet is measured."""
    path = args.csv.with_name(args.csv.stem + "_cost.csv")
    setting = {key: str(value) for key, value in setting_of(args).items() if key in COST_SETTING}
    rows = read_csv(path)
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
    images, targets, indices = next(iter(augmented(data, 0, args, indexed=True)))
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(steps + 2):
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.step(images, targets, indices=indices if trainer.gkt.memory else None)
            if repeat >= 2:
                seconds[name].append(time.process_time() - start)
    plain = statistics.fmean(seconds["plain"])
    return {name: statistics.fmean(seconds[name]) / plain for name in names}


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in SETTING}


def run_key(name: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    return setting_of(args) | {"recipe": name, "seed": seed}


def folder_name(key: Iterable[object]) -> str:
    return "-".join(map(str, key)).replace(" ", "_").replace(",", "")


def is_finished(path: Path, key: dict[str, object]) -> bool:
    wanted = {name: str(value) for name, value in key.items()}
    return any(wanted.items() <= row.items() for row in read_csv(path))


def append(path: Path, row: dict[str, object]) -> None:
    """Adds a row, also where another process adds one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_csv(path, [*read_csv(path), row])


if __name__ == "__main__":
    main()
