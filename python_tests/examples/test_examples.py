"""The examples and the throughput benchmark, small, as their users run them."""

from __future__ import annotations

import csv
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.documents import ROOT
from helpers.processes import run_script
from PIL import Image

from gkt_fast.config import EXECUTIONS


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_demo(tmp_path):
    flags = ["--epochs", 1, "--seeds", 1, "--train-images", 50, "--depth", 14, "--width", 4]
    output = run_script("examples/demo.py", *flags, "--output", tmp_path / "out", folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo.csv", "subnets.csv", "demo.png"}
    methods = ["plain", "Stimulative Training", "GKT", "alone"]

    table = rows(tmp_path / "out" / "demo.csv")
    assert [row["method"] for row in table] == methods
    shown = ["2-2-2", "1-1-1"]
    columns = [f"{depths} {statistic}" for depths in shown for statistic in ("mean", "std")]
    for row in table:
        assert list(row) == ["method", *columns, "step shared", "step one by one"]
        assert all(math.isfinite(float(value)) for value in list(row.values())[1:] if value)
    assert float(table[0]["step shared"]) == 1.0
    assert [row["step shared"] != "" for row in table] == [True, True, True, False]

    subnets = rows(tmp_path / "out" / "subnets.csv")
    chain = ["2-2-2", "2-2-1", "2-1-1", "1-1-1"]
    assert [row["depths"] for row in subnets] == chain * 3 + ["1-1-1"]
    accuracies = {(row["method"], row["depths"]): float(row["accuracy"]) for row in subnets}
    accuracies["alone", "2-2-2"] = accuracies["plain", "2-2-2"]
    for row in table:
        name = "each depth alone" if row["method"] == "alone" else row["method"]
        for depths in shown:
            accuracy = accuracies[row["method"], depths]
            assert float(row[f"{depths} mean"]) == accuracy
            assert re.search(rf"^{name} .*{accuracy:.2f} \+- 0\.00", output, re.MULTILINE)
    costs = [float(row["mflops"]) for row in subnets[:4]]
    assert costs == sorted(costs, reverse=True)
    assert re.search(r"^GKT against plain training, one block per stage: [+-]\d+\.\d\d points$", output, re.M)
    assert re.search(r"seed 0, 1-1-1 alone trained$", output, re.M), (
        "a line for each network, away from a terminal"
    )
    after = output[output.index("\nNext:\n") :]
    commands = re.findall(r"^  (\S.*)$", after, re.M)
    assert len(commands) == 3 and all(
        re.match(r"\S*python\S* (-m gkt_fast|examples/)", line) for line in commands
    )
    names = [re.search(r"--experiment \S+|$", line)[0] for line in commands if " train " in line]
    assert len(set(names)) == len(names) == 2, "a folder for each run"

    with Image.open(tmp_path / "out" / "demo.png") as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 3  # something is drawn


def test_demo_needs_a_batch_of_images(tmp_path):
    error = run_script("examples/demo.py", "--train-images", 20, folder=tmp_path, code=2)
    assert "--train-images is 20; it must be at least --batch-size (50)" in error


def test_minimal_example(tmp_path):
    output = run_script("examples/minimal.py", folder=tmp_path)
    assert re.search(r"^Epoch 2/2: .*val_accuracy", output, re.MULTILINE)
    assert re.search(
        r"^Evaluation\(accuracy=\d\.\d+, loss=\d+\.\d+, samples=64, mean_iou=None\)$", output, re.MULTILINE
    )
    assert list(tmp_path.iterdir()) == []


def test_segmentation(tmp_path):
    """Plain training and GKT; the picture has a row for each of four images and a column for each network."""
    flags = ["--train-images", 40, "--test-images", 12, "--epochs", 3, "--image-size", 24]
    output = run_script("examples/segmentation.py", *flags, "--output", tmp_path / "out", folder=tmp_path)
    table = re.findall(r"^(\d-\d-\d) +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
    assert [row[0] for row in table] == ["3-3-3", "2-2-2", "1-1-1"]
    assert all(0 < float(cell) <= 100 for row in table for cell in row[1:])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["segmentation.png"]
    with Image.open(tmp_path / "out" / "segmentation.png") as image:
        assert image.size == (780, 560)


def test_shapes_of_the_segmentation_example():
    """Each class takes part, outlines are ignored, and the same seed gives the same images."""
    path = ROOT / "examples" / "segmentation.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("segmentation", path))
    module.__spec__.loader.exec_module(module)
    images, targets = module.make_shapes(20, 32, seed=3).tensors
    assert images.shape == (20, 3, 32, 32) and targets.shape == (20, 32, 32)
    assert set(targets.unique().tolist()) == {0, 1, 2, 3, module.IGNORED}
    again = module.make_shapes(20, 32, seed=3).tensors
    assert torch.equal(images, again[0]) and torch.equal(targets, again[1])
    assert not torch.equal(images, module.make_shapes(20, 32, seed=4).tensors[0])
    x, y = torch.tensor([0.0, 3.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
    assert module.inside("circle", x, y, 4.0, 0.0).tolist() == [4.0, 1.0, -1.0]
    square = module.inside("square", x, y, 4.0, 0.0)
    torch.testing.assert_close(square, torch.tensor([3.6, 0.6, -1.4]))


def test_segmentation_needs_a_batch_of_images(tmp_path):
    error = run_script("examples/segmentation.py", "--train-images", 5, folder=tmp_path, code=2)
    assert "--train-images is 5; it must be at least --batch-size (10)" in error


MODES = [mode for mode in EXECUTIONS if mode != "auto"]


def test_throughput_has_a_row_for_every_mode(tmp_path):
    flags = [
        "--model",
        "cifar_resnet20",
        "--batch-size",
        2,
        "--repeats",
        1,
        "--groups",
        2,
        "--no-channels-last",
        "--modes",
        *MODES,
    ]
    output = run_script("bench/throughput.py", *flags, "--csv", tmp_path / "t.csv", folder=tmp_path)
    measured = rows(tmp_path / "t.csv")
    assert [row["mode"] for row in measured] == ["plain", *MODES]
    columns = {"model", "mode", "ratio", "mean_ratio", "median_ms", "lower_ms", "upper_ms", "flops_ratio", "saved_mib",
               "batch_size", "groups", "loops", "channels_last", "repeats", "device", "threads", "torch",
               "commit"}  # fmt: skip
    ratios = {}
    for row in measured:
        assert columns <= set(row)
        assert (row["model"], row["batch_size"], row["groups"], row["repeats"]) == (
            "cifar_resnet20",
            "2",
            "2",
            "1",
        )
        assert row["channels_last"] == "False"
        assert 0 < float(row["lower_ms"]) <= float(row["median_ms"]) <= float(row["upper_ms"])
        assert float(row["ratio"]) == pytest.approx(float(row["median_ms"]) / float(measured[0]["median_ms"]))
        assert re.search(rf"^ *cifar_resnet20 +{row['mode']} ", output, re.MULTILINE)
        ratios[row["mode"]] = float(row["flops_ratio"])
    assert ratios["plain"] == 1
    assert 1 < ratios["shared"] < ratios["sequential"] <= 3


def test_throughput_measures_only_the_modes_asked_for(tmp_path):
    flags = ["--model", "vit_like", "--batch-size", 4, "--repeats", 1, "--modes", "shared", "--threads", 1]
    flags += ["--subnet-share", 1.0, 0.5]
    run_script("bench/throughput.py", *flags, "--csv", tmp_path / "new" / "t.csv", folder=tmp_path)
    measured = [(row["mode"], row["subnet_share"]) for row in rows(tmp_path / "new" / "t.csv")]
    assert measured == [("plain", "1.0"), ("shared", "1.0"), ("shared", "0.5")]


def test_cascade(tmp_path):
    flags = ["--epochs", 1, "--train-images", 50]
    output = run_script("examples/cascade.py", *flags, folder=tmp_path)
    single = re.findall(r"^depths (\d-\d-\d): ([\d.]+) %, ([\d.]+) MFLOPs$", output, re.MULTILINE)
    assert [row[0] for row in single] == ["1-1-1", "2-2-2", "3-3-3"]
    found = re.search(r"^cascade: ([\d.]+) %, ([\d.]+) MFLOPs on average; (.*)$", output, re.MULTILINE)
    assert float(found.group(2)) > 0 and "% at 3-3-3" in found.group(3)
    assert [path.name for path in tmp_path.iterdir()] == ["elastic.pt"]
