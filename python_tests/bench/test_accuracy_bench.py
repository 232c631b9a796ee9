"""bench/accuracy.py runs in pieces, and its report computes what it says. Both are run as a user runs them."""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from helpers.documents import ROOT
from helpers.processes import run_script
from torchvision.io import write_png

from gkt_fast.instruments.tables import marked, write_csv

SETTING = {
    "train_images": "8", "test_images": "8", "image_size": "8", "augmentation": "shift-mirror",
    "model": "cifar_resnet14", "width": "8", "epochs": "8", "batch_size": "8", "lr": "8", "weight_decay": "8",
    "precision": "8",
}  # fmt: skip
COST_SETTING = {"image_size": 8, "model": "cifar_resnet14", "width": 4, "batch_size": 10, "precision": "fp32"}
"""Of the runs below."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of noise around a colour of their own."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 4), ("test", 3)):
        for c in range(10):
            place = folder / split / f"class{c}"
            place.mkdir(parents=True)
            for i in range(number):
                image = 20 * c + torch.randint(0, 40, (3, 12, 10), generator=generator)
                write_png(image.to(torch.uint8), str(place / f"{i}.png"))
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def arguments(images: Path, results: Path, *more: str) -> list[str]:
    start = (
        f"imagefolder:{images} --train-images 40 --test-images 20 --image-size 8 --model cifar_resnet14 "
        f"--width 4 --epochs 2 --batch-size 10 --csv {results / 'a.csv'} --work {results / 'work'}"
    )
    return [*start.split(), *more]


def run(images: Path, results: Path, *more: str) -> list[dict[str, str]]:
    run_script("bench/accuracy.py", *arguments(images, results, *more), folder=results)
    path = results / "a.csv"
    return read(path) if path.exists() else []


def know_costs(results: Path, costs: dict[str, float], **setting: object) -> None:
    """As if the costs had been measured before: what is in the file isn't measured again."""
    rows = [COST_SETTING | setting | {"recipe": name, "step_cost": cost} for name, cost in costs.items()]
    write_csv(results / "a_cost.csv", rows)


def test_runs_are_kept_skipped_and_reported(images: Path, tmp_path: Path) -> None:
    know_costs(tmp_path, {"plain": 1.0, "gkt": 2.0, "stochastic depth": 2.0, "st++": 2.0, "plain 1-1-1": 2.0})
    recipes = ["--recipes", "plain", "plain, cost of gkt", "stochastic depth", "st++", "plain 1-1-1"]
    rows = run(images, tmp_path, "--seeds", "0", *recipes)
    assert [row["recipe"] for row in rows] == recipes[1:]
    assert [int(row["epochs_run"]) for row in rows] == [2, 4, 2, 2, 2]
    assert [float(row["step_cost"]) for row in rows] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert all(0 <= float(row["full"]) <= 100 for row in rows)
    assert [row["1-1-1"] != "" for row in rows] == [True, True, True, True, False]
    assert all(0 < float(row["cpu_seconds"]) < 100 for row in rows)

    (tmp_path / "a.csv").unlink()
    epochs = {path: path.read_bytes() for path in (tmp_path / "work").glob("*/summary.csv")}
    assert len(epochs) == 5
    assert run(images, tmp_path, "--seeds", "0", *recipes) == rows
    assert all(path.read_bytes() == before for path, before in epochs.items()), "trained again"
    again = run(images, tmp_path, "--seeds", "0", "1", "--recipes", "plain")
    assert again[:5] == rows
    assert [(row["recipe"], row["seed"]) for row in again[5:]] == [("plain", "1")]
    assert len(run(images, tmp_path, "--seeds", "2", "--recipes", "plain", "--minutes", "0")) == 6

    printed = run_script("bench/accuracy_report.py", tmp_path / "a.csv", folder=tmp_path)
    assert all(
        f"| {name} |" in printed for name in ["plain, cost of gkt", "stochastic depth", "st++", "1-1-1"]
    )
    assert (tmp_path / "accuracy_cifar_resnet14_40x8px_2epochs_shift-mirror.png").stat().st_size > 1000


def test_runs_of_a_seed_start_alike(images: Path, tmp_path: Path) -> None:
    """The paired difference rests on it: equal recipes give equal rows, another seed gives another."""
    know_costs(tmp_path, {"plain": 1.0, "gkt": 1.0})
    rows = run(images, tmp_path, "--seeds", "0", "1", "--recipes", "plain", "plain, cost of gkt")
    losses = [row["full_loss"] for row in rows]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]


TRANSFORMER = ["--model", "vit3", "--width", "8", "--augmentation", "randaugment", "--epochs", "7"]


def test_a_transformer_s_depths_are_trained_alone_and_evaluated(images: Path, tmp_path: Path) -> None:
    names = ["plain", "gkt", "stochastic depth", "plain 2"]
    know_costs(tmp_path, dict.fromkeys(names, 1.0), model="vit3", width=8)
    command = [*TRANSFORMER, "--seeds", "0", "--recipes", *names]
    rows = run(images, tmp_path, *command)
    assert {(row["model"], row["augmentation"], row["lr"], row["weight_decay"]) for row in rows} == {
        ("vit3", "randaugment", "0.001", "0.05")
    }
    assert [row["recipe"] for row in rows] == names
    assert [(row["1"] != "", row["2"] != "") for row in rows] == [(True, True)] * 3 + [(False, False)]
    assert run(images, tmp_path, *command) == rows

    epochs = {path.parent.name: read(path) for path in (tmp_path / "work").glob("*/summary.csv")}
    assert len(epochs) == 4
    for history in epochs.values():  # the warm-up, then half of a cosine in two epochs
        rates = [float(epoch["lr"]) for epoch in history]
        assert rates == pytest.approx([1e-3 / 6 * i for i in (1, 2, 3, 4, 5, 6)] + [5e-4], rel=1e-5)

    simple = [*TRANSFORMER, "--augmentation", "shift-mirror", "--seeds", "0", "--recipes", "plain"]
    rows = run(images, tmp_path, *simple)
    assert len(rows) == 5 and rows[4]["full_loss"] != rows[0]["full_loss"]

    printed = run_script("bench/accuracy_report.py", tmp_path / "a.csv", folder=tmp_path)
    assert printed.count("### ViT of 3 blocks, 40 images of 8x8, 7 epochs") == 2
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "accuracy_inference.png",
        "accuracy_vit3_40x8px_7epochs_randaugment.png",
        "accuracy_vit3_40x8px_7epochs_shift-mirror.png",
    }


def test_what_does_not_fit_the_model(images: Path, tmp_path: Path) -> None:
    """Recipes that are asked for are refused, those of a study are left out."""
    for flags, message in (
        (
            [*TRANSFORMER, "--recipes", "plain", "plain 1-1-1", "st++", "plain 4"],
            "recipes ['plain 1-1-1', 'st++', 'plain 4'] don't fit vit3: it has depths (3,)",
        ),
        (["--model", "resnet20"], "model is 'resnet20'; it must be cifar_resnetN"),
    ):
        printed = run_script(
            "bench/accuracy.py", *arguments(images, tmp_path, *flags), folder=tmp_path, code=1
        )
        assert message in printed and "Traceback" not in printed
    run(images, tmp_path, *TRANSFORMER, "--study", "alone", "--minutes", "0")
    measured = {row["recipe"] for row in read(tmp_path / "a_cost.csv")}
    assert measured == {"plain", "plain 2"}


def test_committed_rows_are_not_run_again(tmp_path: Path) -> None:
    """The defaults of a command are those of the rows in bench/results."""
    none = torch.empty(0, 3, 16, 16, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    torch.save({"train": none, "test": none}, tmp_path / "images_16_1000_10000.pt")  # as decoded before
    for name in ("accuracy", "accuracy_cost"):
        shutil.copy(ROOT / "bench" / "results" / f"{name}.csv", tmp_path)
    before = (tmp_path / "accuracy.csv").read_bytes()
    command = "imagefolder:none --image-size 16 --csv accuracy.csv --work . --minutes 0 --seeds 0 1 --recipes"
    recipes = ["plain", "gkt", "plain 1-1-1", "gkt, budget 1.5"]
    printed = run_script("bench/accuracy.py", *command.split(), *recipes, folder=tmp_path)
    assert printed == "" and (tmp_path / "accuracy.csv").read_bytes() == before


def test_costs_are_measured_once(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "--seeds", "0", "--recipes", "gkt", "--minutes", "0")
    measured = (tmp_path / "a_cost.csv").read_bytes()
    costs = {row["recipe"]: float(row["step_cost"]) for row in read(tmp_path / "a_cost.csv")}
    assert set(costs) == {"plain", "gkt"}
    assert costs["plain"] == 1.0 and costs["gkt"] > 0
    run(images, tmp_path, "--seeds", "0", "--recipes", "gkt", "--minutes", "0")
    assert (tmp_path / "a_cost.csv").read_bytes() == measured, "measured again"


def made_up(recipe: str, seed: int, full: float, smallest: float | None) -> dict[str, str]:
    row = SETTING | {"recipe": recipe, "seed": str(seed), "epochs_run": "10"}
    depth = {} if smallest is None else {"1-1-1": str(smallest)}
    return row | {"step_cost": "1.5", "cpu_seconds": "25", "full": str(full)} | depth


def report(rows: Iterable[dict[str, str]], folder: Path) -> str:
    """What the report prints of the rows."""
    write_csv(folder / "rows.csv", list(rows))
    return run_script("bench/accuracy_report.py", folder / "rows.csv", folder=folder)


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each table by its heading; the one without is called headline."""
    found: dict[str, list[dict[str, str]]] = {}
    for part in re.finditer(r"(?:^(.*):\n\n)?((?:^\|.*\|\n)+)", text, re.MULTILINE):
        header, _, *lines = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in part[2].splitlines()
        )
        found[part[1] or "headline"] = [dict(zip(header, line, strict=True)) for line in lines]
    return found


def test_the_interval_is_student_s(tmp_path: Path) -> None:
    """Differences 1, 2, 3 (times 10,000): mean 2, deviation 1, t(0.975, 2) = 4.302653. Unpaired seeds don't count."""
    plain = [made_up("plain", seed, 1e5 * seed, 0) for seed in (1, 2, 3)]
    gkt = [made_up("gkt", seed, 1e5 * seed + 1e4 * seed, 0) for seed in (1, 2, 3)]
    rows = [*plain, *gkt, made_up("gkt", 9, 0, 0), made_up("st", 1, 0, 0)]
    methods = {
        row["recipe"]: row["difference"]
        for row in tables(report(rows, tmp_path))["Methods (difference to plain)"]
    }
    mean, half = methods["gkt"].split(" ± ")
    assert float(mean) == pytest.approx(20000.0)
    assert float(half) == pytest.approx(43026.53 / math.sqrt(3), rel=1e-6)
    assert methods["st"] == ""


def test_the_report_compares_each_recipe_with_its_baseline(tmp_path: Path) -> None:
    runs = {
        "gkt, 2 loops": (62, 54), "plain": (50, 20), "gkt": (60, 50), "gkt, budget 1.0": (58, 30),
        "gkt, ema 0, 2 loops": (61, 55), "gkt, kd_weight 2": (63, 51), "plain 1-1-1": (45, None),
    }  # fmt: skip
    rows = [
        made_up(recipe, seed, full + seed, None if smallest is None else smallest + seed)
        for recipe, (full, smallest) in runs.items()
        for seed in (0, 1)
    ]
    _, methods, alone, budgets, choices = tables(report(rows, tmp_path)).values()
    assert [row["recipe"] for row in methods] == ["plain", "gkt", "gkt, 2 loops"]
    assert [row["difference"] for row in methods] == ["", "+10.00 ± 0.00", "+12.00 ± 0.00"]
    block = (
        2 * 2 * 9 * 8**2 * 64 / 1e6
    )  # two convolutions of 8 channels on 8x8 pixels, of other shapes at the same cost
    stem, head = 2 * 9 * 3 * 8 * 64 / 1e6, 2 * 32 * 10 / 1e6
    first = block + 2 * 0.75 * block  # in two stages the first convolution takes half the channels
    assert float(alone[0]["MFLOPs per image"]) == pytest.approx(stem + first + head, abs=0.05)
    assert methods[0]["CPU s per epoch"] == "2.50" and methods[0]["1-1-1"] == "20.50 ± 0.71"
    assert alone[0]["gkt"] == "50.50 ± 0.71 (+5.00 ± 0.00)" and alone[0]["plain"].endswith("(-25.00 ± 0.00)")
    assert [row["recipe"] for row in budgets] == ["plain", "gkt, budget 1.0", "gkt"]
    assert [row["difference"] for row in budgets] == ["", "-2.00 ± 0.00", "+10.00 ± 0.00"]
    assert {row["recipe"]: (row["full"], row["1-1-1"]) for row in choices} == {
        "gkt, kd_weight 2": ("+3.00 ± 0.00", "+1.00 ± 0.00"),
        "gkt, ema 0, 2 loops": ("-1.00 ± 0.00", "+1.00 ± 0.00"),
    }
    assert (tmp_path / "accuracy_cifar_resnet14_8x8px_8epochs_shift-mirror.png").stat().st_size > 1000


def test_the_headline_puts_cost_and_accuracy_side_by_side(tmp_path: Path) -> None:
    rows = [made_up("plain", 0, 50, 20), made_up("gkt", 0, 60, 40), made_up("plain 1-1-1", 0, 45, None)]
    rows += [made_up("st", 0, 55, 30), made_up("stochastic depth", 0, 54, 35)]
    lines = report(rows, tmp_path).splitlines()
    assert lines[0] == "| training | A: cost | full network | depth 1-1-1 |"
    assert (
        lines[2:8]
        == [
            "| plain | 1.88 | 50.00 | 20.00 |",  # 10 epochs of 1.5 plain steps for 8
            "| Stimulative Training | 1.88 | 55.00 | 30.00 |",  # the older method that does most for the full network
            "| **GKT** | 1.88 | 60.00 | 40.00 |",
            "| the smallest depth, trained alone | 1.88 |  | 45.00 |",
            "",
            "A: ResNet-14, 8 images of 8x8, 8 epochs.",
        ]
    )


def test_the_headline_takes_the_best_settings_that_have_all_rows(tmp_path: Path) -> None:
    """A setting that ranks higher, but isn't done, waits."""

    def setting(images: int, epochs: int, *recipes: str) -> list[dict[str, str]]:
        change = {"model": "cifar_resnet20", "train_images": str(images), "epochs": str(epochs)}
        return [made_up(recipe, 0, 50, 20) | change for recipe in recipes]

    names = ("plain", "plain, cost of gkt", "st", "gkt", "plain 1-1-1")
    known = [*setting(1000, 100, *names), *setting(10000, 15, *names)]

    def legend(rows: list[dict[str, str]]) -> str:
        return next(line for line in report(rows, tmp_path).splitlines() if line.startswith("A: "))

    assert re.findall(r"([\d,]+) images", legend([*setting(5000, 60, *names[:3]), *known])) == [
        "1,000",
        "10,000",
    ]
    assert re.findall(r"([\d,]+) images", legend([*known, *setting(5000, 60, *names)])) == ["5,000", "1,000"]


@pytest.fixture(scope="module")
def committed_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pictures")
    return run_script("bench/accuracy_report.py", "--output", folder, folder=folder)


@pytest.mark.parametrize(
    "name, part", [("README.md", " (opening)"), ("README.md", ""), ("docs/measurements/accuracy.md", "")]
)
def test_documents_say_what_the_rows_say(name: str, part: str, committed_report: str) -> None:
    """`python bench/accuracy_report.py --update` writes them anew."""
    text = marked((ROOT / name).read_text(), f"python bench/accuracy_report.py --update{part}")
    assert text.strip() and f"{text}\n" in committed_report


def test_bad_data(images: Path, tmp_path: Path) -> None:
    for number, message in (
        ("45", "45 images can't be the same number"),
        ("50", "fewer than 5 images"),
    ):
        flags = arguments(images, tmp_path, "--train-images", number)
        printed = run_script("bench/accuracy.py", *flags, folder=tmp_path, code=1)
        assert message in printed and "Traceback" not in printed
