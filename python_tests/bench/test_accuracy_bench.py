"""bench/accuracy.py runs in pieces, and its report computes what it says."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import accuracy
import accuracy_report
import pytest
import torch
from documents import marked
from torchvision.io import write_png


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


def run(monkeypatch: pytest.MonkeyPatch, images: Path, results: Path, *more: str) -> list[dict[str, str]]:
    arguments = (
        f"accuracy.py imagefolder:{images} --train-images 40 --test-images 20 --image-size 8 --depth 14 --width 4 "
        f"--epochs 2 --batch-size 10 --csv {results / 'a.csv'} --work {results / 'work'}"
    )
    monkeypatch.setattr(sys, "argv", [*arguments.split(), *more])
    threads = torch.get_num_threads()
    accuracy.main()
    torch.set_num_threads(threads)
    return accuracy.read(results / "a.csv")


def test_runs_are_kept_skipped_and_reported(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        accuracy, "measure_costs", lambda names, data, args: {n: 2.0 if n != "plain" else 1.0 for n in names}
    )
    recipes = ["--recipes", "plain", "plain, cost of gkt", "stochastic depth", "st++", "plain 1-1-1"]
    rows = run(monkeypatch, images, tmp_path, "--seeds", "0", *recipes)
    assert [row["recipe"] for row in rows] == recipes[1:]
    assert [int(row["epochs_run"]) for row in rows] == [2, 4, 2, 2, 2]
    assert [float(row["step_cost"]) for row in rows] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert all(0 <= float(row["full"]) <= 100 for row in rows)
    assert [row["1-1-1"] != "" for row in rows] == [True, True, True, True, False]
    assert all(0 < float(row["cpu_seconds"]) < 100 for row in rows)

    with monkeypatch.context() as patch:
        patch.setattr(accuracy.GKTTrainer, "step", lambda *_: pytest.fail("trained again"))
        (tmp_path / "a.csv").unlink()
        assert run(patch, images, tmp_path, "--seeds", "0", *recipes) == rows
    again = run(monkeypatch, images, tmp_path, "--seeds", "0", "1", "--recipes", "plain")
    assert again[:5] == rows
    assert [(row["recipe"], row["seed"]) for row in again[5:]] == [("plain", "1")]
    assert (
        len(run(monkeypatch, images, tmp_path, "--seeds", "2", "--recipes", "plain", "--minutes", "0")) == 6
    )

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["accuracy_report.py", str(tmp_path / "a.csv")])
    accuracy_report.main()
    printed = capsys.readouterr().out
    assert all(
        f"| {name} |" in printed for name in ["plain, cost of gkt", "stochastic depth", "st++", "1-1-1"]
    )
    assert (tmp_path / "accuracy_40x8px_2epochs.png").stat().st_size > 1000


def test_runs_of_a_seed_start_alike(monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path) -> None:
    """The paired difference rests on it: equal recipes give equal rows, another seed gives another."""
    monkeypatch.setattr(accuracy, "measure_costs", lambda names, data, args: dict.fromkeys(names, 1.0))
    rows = run(monkeypatch, images, tmp_path, "--seeds", "0", "1", "--recipes", "plain", "plain, cost of gkt")
    losses = [row["full_loss"] for row in rows]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]


def test_costs_are_measured_once(monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path) -> None:
    run(monkeypatch, images, tmp_path, "--seeds", "0", "--recipes", "gkt", "--minutes", "0")
    with open(tmp_path / "a_cost.csv", newline="") as file:
        costs = {row["recipe"]: float(row["step_cost"]) for row in csv.DictReader(file)}
    assert set(costs) == {"plain", "gkt"}
    assert costs["plain"] == 1.0 and costs["gkt"] > 0
    monkeypatch.setattr(
        accuracy, "measure_costs", lambda names, data, args: pytest.fail(f"{names} measured again")
    )
    run(monkeypatch, images, tmp_path, "--seeds", "0", "--recipes", "gkt", "--minutes", "0")


def test_the_interval_is_student_s() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027."""
    values, baseline = {"0": 11.0, "1": 22.0, "2": 33.0, "9": 0.0}, {"0": 10.0, "1": 20.0, "2": 30.0}
    mean, half = accuracy_report.difference(values, baseline)
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert accuracy_report.difference({"0": 1.0}, baseline) is None


def made_up(recipe: str, seed: int, full: float, smallest: float | None) -> dict[str, str]:
    row = dict.fromkeys(accuracy.SETTING, "8") | {"recipe": recipe, "seed": str(seed), "epochs_run": "10"}
    depth = {} if smallest is None else {"1-1-1": str(smallest)}
    return row | {"step_cost": "1.5", "cpu_seconds": "25", "full": str(full)} | depth


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
    methods, alone, budgets, choices = accuracy_report.tables(rows).values()
    assert [row["recipe"] for row in methods] == ["plain", "gkt", "gkt, 2 loops"]
    assert [row["difference"] for row in methods] == ["", "+10.00 ± 0.00", "+12.00 ± 0.00"]
    assert methods[0]["CPU s per epoch"] == "2.50" and methods[0]["1-1-1"] == "20.50 ± 0.71"
    assert alone[0]["gkt"] == "50.50 ± 0.71 (+5.00 ± 0.00)" and alone[0]["plain"].endswith("(-25.00 ± 0.00)")
    assert [row["recipe"] for row in budgets] == ["plain", "gkt, budget 1.0", "gkt"]
    assert [row["difference"] for row in budgets] == ["", "-2.00 ± 0.00", "+10.00 ± 0.00"]
    assert {row["recipe"]: (row["full"], row["1-1-1"]) for row in choices} == {
        "gkt, kd_weight 2": ("+3.00 ± 0.00", "+1.00 ± 0.00"),
        "gkt, ema 0, 2 loops": ("-1.00 ± 0.00", "+1.00 ± 0.00"),
    }
    accuracy_report.plot(rows, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000


def test_the_headline_puts_cost_and_accuracy_side_by_side() -> None:
    rows = [made_up("plain", 0, 50, 20), made_up("gkt", 0, 60, 40), made_up("plain 1-1-1", 0, 45, None)]
    lines = accuracy_report.headline(rows).splitlines()
    assert lines[0] == "| method | 8 images of 8x8, 8 epochs: cost | full network | depths 1-1-1 |"
    assert lines[2:] == [
        "| plain | 1.88 | 50.00 | 20.00 |",  # 10 epochs of 1.5 plain steps for 8
        "| gkt | 1.88 | 60.00 | 40.00 |",
        "| its smallest subnet, trained alone | 1.88 |  | 45.00 |",
    ]


@pytest.mark.parametrize("name", accuracy_report.DOCUMENTS)
def test_documents_say_what_the_rows_say(name: str) -> None:
    """`python bench/accuracy_report.py --update` writes the tables anew."""
    rows = accuracy.read(accuracy_report.RESULTS / "accuracy.csv")
    text = (accuracy_report.ROOT / name).read_text()
    assert marked(text, accuracy_report.COMMAND) == accuracy_report.DOCUMENTS[name](rows)


def test_bad_data(images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="45 images can't be the same number"):
        run(monkeypatch, images, tmp_path, "--train-images", "45")
    with pytest.raises(SystemExit, match="fewer than 5 images"):
        run(monkeypatch, images, tmp_path, "--train-images", "50")
