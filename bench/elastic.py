"""Elastic networks: what switching, sharing and stopping early cost, and how a trained network becomes elastic.

    python bench/elastic.py cost          # bench/results/elastic.csv: a ViT of 12 blocks and ResNet-56, one thread
    python bench/elastic.py fine-tune     # bench/results/elastic_fine_tuning.csv: digits
    python bench/elastic.py picture       # docs/pictures/elastic.png: accuracy against mean time, on digits

Times are medians of calls that were measured in turn in one process; figures are ratios of them. With one thread they
are that thread's CPU time, to which others on the machine don't add.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import RESULTS, Timing, environment, print_table, write_csv
from harness import measure as measure_by
from models import MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gkt_fast import (
    Cascade,
    ElasticNetwork,
    GKTConfig,
    GKTTrainer,
    evaluate,
    extract_subnet,
    fit_cascade,
    make_elastic,
    pictures,
    recalibrate_batch_norm,
)
from gkt_fast.data import digits
from gkt_fast.deployment.cascade import confidence_of
from gkt_fast.models import cifar_resnet

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "elastic.png"
DEPTHS = {
    "vit_like": [(2,), (4,), (6,), (9,), (12,)],
    "cifar_resnet56": [(1, 1, 1), (3, 3, 3), (5, 5, 5), (7, 7, 7), (9, 9, 9)],
}
CASCADES = {"vit_like": [(4,), (8,), (12,)], "cifar_resnet56": [(3, 3, 3), (6, 6, 6), (9, 9, 9)]}
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cost", "fine-tune", "picture"])
    parser.add_argument("--models", nargs="+", choices=[*DEPTHS], default=[*DEPTHS])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=60, help="of training from scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="instead of the file in bench/results")
    parser.add_argument("--png", type=Path, default=PICTURE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "cost":
        rows = [row for name in args.models for row in cost(name, args.repeats)]
        print_table(rows, ["model", "what", "depths", "batch_size", "value", "unit", "bound"])
        write_csv(args.csv or RESULTS / "elastic.csv", rows)
    elif args.what == "fine-tune":
        rows = fine_tuning(args)
        print_table(rows, ["network", "epochs", "depths", "accuracy", "deviation"])
        write_csv(args.csv or RESULTS / "elastic_fine_tuning.csv", rows)
    else:
        draw(args)


def measure(calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """`harness.measure`, by CPU time where there is one thread."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return measure_by(calls, repeats, warmup, clock)


def cost(name: str, repeats: int) -> list[dict[str, object]]:
    """Switching, forward passes, memory and a cascade of one network."""
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    images = torch.randn(BATCH, *MODELS[name].sample)
    elastic = make_elastic(model, DEPTHS[name], calibration_loader=[images])
    rows = [switching(elastic, repeats), *forwards(model, elastic, images, repeats), *memory(model, elastic)]
    del elastic
    rows += cascade_time(make_elastic(model, CASCADES[name], calibration_loader=[images]), images, repeats)
    return [{"model": name, **row, **environment()} for row in rows]


def switching(elastic: ElasticNetwork, repeats: int, switches: int = 100) -> dict[str, object]:
    """Time to set other depths and to find their module."""
    first, last = elastic.subnets[0].depths, elastic.subnets[-1].depths

    def switch() -> None:
        for _ in range(switches // 2):
            elastic.depths = first
            elastic.at()
            elastic.depths = last
            elastic.at()

    microseconds = 1e3 * measure({"switch": switch}, 20 * repeats)["switch"].median / switches
    return {"what": "switching depth", "value": microseconds, "unit": "us", "bound": 50}


@torch.no_grad()
def forwards(
    model: nn.Module, elastic: ElasticNetwork, images: Tensor, repeats: int
) -> list[dict[str, object]]:
    """Elastic forward passes in extracted ones, a call of each in turn."""
    rows = []
    for subnet, size in itertools.product(elastic.subnets, (1, BATCH)):
        alone = extract_subnet(model, subnet).eval()
        recalibrate_batch_norm(alone, [images])
        x, depths = images[:size], subnet.depths
        calls = {
            "extracted": lambda alone=alone, x=x: alone(x),
            "elastic": lambda depths=depths, x=x: elastic(x, depths=depths),
        }
        timings = measure(calls, repeats if size > 1 else 5 * repeats, warmup=5)
        ratio = timings["elastic"].median / timings["extracted"].median
        rows.append(
            {
                "what": "elastic forward over extracted",
                "depths": str(subnet),
                "batch_size": size,
                "value": ratio,
                "unit": "ratio",
                "bound": 1.02,
                "milliseconds": timings["elastic"].median,
            }
        )
    return rows


def memory(model: nn.Module, elastic: ElasticNetwork) -> list[dict[str, object]]:
    """Bytes of all tensors, and of the file, in those of the network."""

    def size(network: nn.Module) -> int:
        tensors = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    with tempfile.TemporaryDirectory() as folder:
        elastic.save(Path(folder) / "elastic.pt")
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        files = [(Path(folder) / name).stat().st_size for name in ("elastic.pt", "model.pt")]
    depths = f"{len(elastic.subnets)} depths"
    return [
        {"what": "memory over the network's", "depths": depths, "value": size(elastic) / size(model), "unit": "ratio",
         "bound": 1.02},
        {"what": "file over the network's", "depths": depths, "value": files[0] / files[1], "unit": "ratio"},
    ]  # fmt: skip


@torch.no_grad()
def cascade_time(elastic: ElasticNetwork, images: Tensor, repeats: int) -> list[dict[str, object]]:
    """A cascade's time in what the rows that reach each depth predict.

    Predicted: for each depth its time alone at this batch, times the share of its FLOPs that the depth before hasn't
    done, times the share of rows that reach it. Thresholds let half of the rows leave at the first exit, and half of
    those left at the second.
    """
    sure = [confidence_of(elastic(images, depths=s), "probability") for s in elastic.subnets]
    first = sure[0].quantile(0.5).item()
    second = sure[1][sure[0] < first].quantile(0.5).item()
    cascade = Cascade(elastic, None, [first, second])
    exits = cascade(images).exits
    reaching = [float((exits >= step).double().mean()) for step in range(len(elastic.subnets))]
    calls = {str(s): lambda s=s: elastic(images, depths=s) for s in elastic.subnets}
    timings = measure(calls | {"cascade": lambda: cascade(images)}, repeats)
    predicted = 0.0
    for subnet, share, step in zip(elastic.subnets, reaching, cascade.flops(images), strict=True):
        (whole,) = Cascade(elastic, [subnet]).flops(images)
        predicted += share * timings[str(subnet)].median * step / whole
    order = " -> ".join(map(str, elastic.subnets))
    measured = timings["cascade"].median
    shares = ", ".join(f"{100 * share:.0f} %" for share in reaching)
    return [
        {"what": "cascade over predicted", "depths": order, "batch_size": len(images), "value": measured / predicted,
         "unit": "ratio", "bound": 1.1, "milliseconds": measured, "rows": shares},
        {"what": "cascade over the deepest", "depths": order, "batch_size": len(images),
         "value": measured / timings[str(elastic.subnets[-1])].median, "unit": "ratio", "milliseconds": measured,
         "rows": shares},
    ]  # fmt: skip


def fine_tuning(args: argparse.Namespace) -> list[dict[str, object]]:
    """Accuracy of every depth: trained plainly, then by GKT for a few epochs more, against GKT from scratch."""
    data = digits(args.train_images)
    tuned = max(1, args.epochs // 10)
    found: dict[tuple[str, int, str], list[float]] = {}
    for seed in range(args.seeds):
        model = train(network(seed), GKTConfig(groups=0, seed=seed), data.train, args.epochs, 0.05)
        networks = [("plain", args.epochs, model)]
        for epochs in dict.fromkeys((1, tuned, 2 * tuned)):
            started = network(seed)
            started.load_state_dict(model.state_dict())
            networks.append(
                ("plain, then GKT", epochs, train(started, GKTConfig(seed=seed), data.train, epochs, 0.01))
            )
        scratch = train(network(seed), GKTConfig(seed=seed), data.train, args.epochs, 0.05)
        networks.append(("GKT from scratch", args.epochs, scratch))
        calibration, test = DataLoader(data.train, args.train_images), DataLoader(data.test, 512)
        for name, epochs, trained in networks:
            for k in (1, 2, 3):
                result = evaluate(trained, test, (k, k, k), calibration_loader=calibration)
                found.setdefault((name, epochs, f"{k}-{k}-{k}"), []).append(100 * result.accuracy)
    return [
        {
            "network": name,
            "epochs": epochs,
            "depths": depths,
            "accuracy": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "seeds": len(values),
            "train_images": args.train_images,
            **environment(),
        }
        for (name, epochs, depths), values in found.items()
    ]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return cifar_resnet(20, in_channels=1)


def train(model: nn.Module, config: GKTConfig, images: TensorDataset, epochs: int, lr: float) -> nn.Module:
    """SGD with a cosine schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    trainer = GKTTrainer(model, optimizer, config, scheduler=scheduler)
    generator = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(images, 25, shuffle=True, drop_last=True, generator=generator)
    trainer.fit(loader, epochs=epochs, progress=False)
    return model.eval()


def enlarged(images: TensorDataset) -> TensorDataset:
    """Images of twice the height and width: a load that is more than the calls of its layers."""
    pixels, targets = images.tensors
    return TensorDataset(F.interpolate(pixels, scale_factor=2, mode="bilinear"), targets)


def draw(args: argparse.Namespace) -> None:
    """Single depths and cascades of one trained network: thresholds from half of the test images, shown on the rest."""
    data = digits(args.train_images)
    train_set, test_set = enlarged(data.train), enlarged(data.test)
    model = train(network(0), GKTConfig(groups=0), train_set, args.epochs, 0.05)
    model = train(model, GKTConfig(), train_set, 1, 0.01)
    images, targets = test_set.tensors
    half = len(images) // 2
    validation, test = (
        [(images[:half], targets[:half])],
        list(zip(images[half:].split(256), targets[half:].split(256), strict=True)),
    )
    depths = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 2, 2), (3, 3, 3)]
    elastic = make_elastic(model, depths, calibration_loader=DataLoader(train_set, args.train_images))
    singles = {str(s): Cascade(elastic, [s]) for s in elastic.subnets}
    least = sum(singles["1-1-1"].flops(images[:1])) / sum(singles["3-3-3"].flops(images[:1]))
    bounds = [least + (1 - least) * share for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)]
    cascades = {f"at most {bound:.2f}": fit_cascade(elastic, validation, max_cost=bound) for bound in bounds}
    points = singles | cascades
    with torch.no_grad():
        timings = measure(
            {name: lambda c=c: [c(x) for x, _ in test] for name, c in points.items()}, args.repeats
        )
    rows = sum(len(x) for x, _ in test)
    measured = [
        {
            "what": label,
            "name": name,
            "us": 1e3 * timings[name].median / rows,
            "accuracy": c.evaluate(test).accuracy,
        }
        for label, group in (("single depths", singles), ("cascades", cascades))
        for name, c in group.items()
    ]
    write_csv(args.csv or RESULTS / "elastic_picture.csv", measured)
    plot(measured, f"ResNet-20 on digits of 16x16 pixels, {rows} images that chose no threshold", args.png)
    print_table(measured, ["what", "name", "us", "accuracy"])
    print(f"Written to {args.png}")


def plot(rows: list[dict[str, object]], remark: str, path: Path) -> None:
    with pictures.picture(path, (7, 4.3)) as figure:
        axes = figure.subplots()
        pictures.ask(axes, "Does stopping early save time?", f"test accuracy (%); {remark}")
        names = {}
        for label, colour, style, named in (
            ("single depths", pictures.COLOURS["plain"], "o-", 0),
            ("cascades", pictures.COLOURS["gkt"], "s-", 2),
        ):
            points = sorted((row["us"], 100 * row["accuracy"]) for row in rows if row["what"] == label)
            axes.plot(*zip(*points, strict=True), style, color=colour)
            names[label] = (label, *points[named], colour)
        axes.set_xlabel("mean time of an image in batches of 256, µs on one thread")
        axes.margins(x=0.2, y=0.1)
        pictures.name_lines(axes, [names["single depths"]], side="right")
        pictures.name_lines(axes, [names["cascades"]])


if __name__ == "__main__":
    main()
