"""bench/throughput.py measures one model after another into one file."""

from __future__ import annotations

import csv

from helpers.processes import run_script


def test_rows_of_other_models_stay(tmp_path):
    path = tmp_path / "throughput.csv"
    path.write_text(
        "model,mode,ratio\nresnet50_64px,stacked,1.9\nvit_64_tokens,plain,7\nvit_64_tokens,old,7\n"
    )
    arguments = "--model cifar_resnet20 --batch-size 2 --modes stacked --repeats 1 --threads 1 --csv"
    run_script("bench/throughput.py", *arguments.split(), path, folder=tmp_path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["mode"]) for row in rows] == [
        ("resnet50_64px", "stacked"),
        ("vit_64_tokens", "plain"),
        ("vit_64_tokens", "old"),
        ("cifar_resnet20", "plain"),
        ("cifar_resnet20", "stacked"),
    ]
    assert rows[0]["ratio"] == "1.9" and rows[3]["ratio"] == "1.0"
    run_script("bench/throughput.py", *arguments.split(), path, folder=tmp_path)
    with path.open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == [row["model"] for row in rows]
