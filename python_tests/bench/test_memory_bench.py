"""bench/memory.py counts what fused blocks keep; the figures that were measured with it hold."""

from __future__ import annotations

import csv
from pathlib import Path

from helpers.processes import run_script

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "memory.csv"
AT_MOST = {
    ("cifar_resnet56", "plain+fused"): 0.78,
    ("cifar_resnet56", "stacked"): 1.27,
    ("resnet50_64px", "plain+fused"): 0.87,
    ("resnet50_64px", "stacked"): 1.45,
    ("resnet50_64px", "plain+fused, pointwise"): 0.45,
    ("resnet50_64px", "stacked, pointwise"): 0.72,
}


def ratios(path: Path) -> dict[tuple[str, str], float]:
    with path.open() as file:
        return {(row["model"], row["step"]): float(row["saved_ratio"]) for row in csv.DictReader(file)}


def test_what_was_measured():
    measured = ratios(RESULTS)
    for case, most in AT_MOST.items():
        assert measured[case] <= most, case


def test_the_benchmark_runs_small(tmp_path):
    path = tmp_path / "memory.csv"
    arguments = (
        "--models cifar_resnet20 --batch-size 2 --steps 2 --peak-steps 1 --repeats 1 --threads 1 --csv"
    )
    printed = run_script("bench/memory.py", *arguments.split(), path, folder=tmp_path)
    found = {step: ratio for (_, step), ratio in ratios(path).items()}
    assert found["plain"] == 1
    assert found["plain+fused"] < 0.82 < found["plain+fused, kept"]
    assert found["plain+fused, pointwise"] == found["plain+fused"]  # there are no 1x1 convolutions
    assert found["stacked, pointwise"] == found["stacked"] < found["stacked, kept"]
    assert "recompute_percent" in printed
