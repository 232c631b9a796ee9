"""The figures of elastic networks, on small ones."""

from __future__ import annotations

import csv
import importlib

import pytest
from helpers.documents import ROOT
from helpers.processes import run_script
from helpers.reference_step import one_thread  # noqa: F401

from gkt_fast.models import cifar_resnet


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_cost(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    models, bench = importlib.import_module("models"), importlib.import_module("elastic")
    if name == "ViT":
        build, sample, depths = (
            (lambda: models.VisionTransformerLike(3, 24, 2, 8)),
            (8, 48),
            [(1,), (2,), (3,)],
        )
    else:
        build, sample, depths = (
            (lambda: cifar_resnet(20, 10, 4)),
            (3, 8, 8),
            [(1, 1, 1), (2, 2, 2), (3, 3, 3)],
        )
    monkeypatch.setitem(bench.MODELS, "small", models.BenchModel(build, sample, 10, 4))
    monkeypatch.setitem(bench.DEPTHS, "small", depths)
    monkeypatch.setitem(bench.CASCADES, "small", depths)
    rows = bench.cost("small", repeats=1)
    assert [row["what"] for row in rows] == [
        "switching depth",
        *["elastic forward over extracted"] * 6,
        "memory over the network's",
        "file over the network's",
        "cascade over predicted",
        "cascade over the deepest",
    ]
    assert all(row["value"] > 0 for row in rows)
    memory = next(row["value"] for row in rows if row["what"] == "memory over the network's")
    assert (memory == 1) == (name == "ViT") and memory < 1.3
    assert rows[-1]["rows"].startswith("100 %, 50 %, 25 %")


def test_fine_tuning(tmp_path):
    flags = ["fine-tune", "--epochs", 1, "--seeds", 1, "--train-images", 50, "--csv", tmp_path / "t.csv"]
    run_script("bench/elastic.py", *flags, folder=tmp_path)
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == {"plain", "plain, then GKT", "GKT from scratch"}
    assert all(0 < float(row["accuracy"]) < 100 for row in rows)
