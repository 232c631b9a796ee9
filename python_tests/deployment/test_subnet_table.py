"""The table of subnets: which ones, what they cost and do, which are on the Pareto front, which is the best."""

from __future__ import annotations

import csv
import itertools
import math
import re

import pytest
import torch
import yaml
from helpers.reference_step import one_thread  # noqa: F401
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gkt_fast import (
    Stage,
    Subnet,
    SubnetResult,
    active_subnet,
    best_subnet,
    choose_subnets,
    evaluate,
    evaluate_subnets,
    extract_subnet,
    pareto_front,
    plot_subnets,
    recalibrate_batch_norm,
    write_subnets_csv,
)
from gkt_fast.cli import main
from gkt_fast.data import digits
from gkt_fast.models import cifar_resnet
from gkt_fast.training.checkpoint import load_checkpoint


def stages(*depths, first_droppable=True):
    return [
        Stage(tuple(f"s{i}.{j}" for j in range(depth)), (first_droppable,) + (True,) * (depth - 1))
        for i, depth in enumerate(depths)
    ]


RESNET_50 = stages(3, 4, 6, 3, first_droppable=False)
RESNET_101 = stages(3, 4, 23, 3, first_droppable=False)


def test_all_ordered_subnets_where_they_are_few():
    subnets = choose_subnets(stages(2, 3), max_subnets=6)
    assert [subnet.depths for subnet in subnets] == [(2, 3), (2, 2), (1, 3), (2, 1), (1, 2), (1, 1)]
    assert (
        len(choose_subnets(RESNET_50, max_subnets=216))
        == 216
        == len(set(choose_subnets(RESNET_50, max_subnets=999)))
    )


@pytest.mark.parametrize("min_depth, least", [(0, (0, 0)), (1, (1, 1)), ((2, 1), (2, 1)), (9, (2, 3))])
def test_smallest_depths(min_depth, least):
    assert choose_subnets(stages(2, 3), min_depth)[-1].depths == least
    assert choose_subnets(stages(2, 3, first_droppable=False), 0)[-1].depths == (1, 1)


def test_a_nested_chain_and_a_seeded_sample_where_they_are_many():
    subnets = choose_subnets(RESNET_50, max_subnets=30)
    assert len(set(subnets)) == 30
    assert (
        subnets
        == choose_subnets(RESNET_50, max_subnets=30)
        != choose_subnets(RESNET_50, max_subnets=30, seed=1)
    )
    common = set(subnets) & set(choose_subnets(RESNET_50, max_subnets=30, seed=1))
    chain = sorted(common, key=lambda subnet: -sum(subnet.depths))
    assert chain[0].depths == (3, 4, 6, 3) and chain[-1].depths == (1, 1, 1, 1)
    assert {sum(subnet.depths) for subnet in chain} == set(range(4, 17))
    links = [subnet for subnet in choose_subnets(RESNET_50, max_subnets=13)]
    assert all(small.is_within(large) for large, small in itertools.pairwise(links))
    assert [sum(subnet.depths) for subnet in links] == list(range(16, 3, -1))


def test_a_chain_longer_than_what_may_be_evaluated():
    subnets = choose_subnets(RESNET_101, max_subnets=7)
    assert len(subnets) == 7
    assert subnets[0].depths == (3, 4, 23, 3) and subnets[-1].depths == (1, 1, 1, 1)
    assert all(small.is_within(large) for large, small in itertools.pairwise(subnets))
    assert [subnet.depths for subnet in choose_subnets(RESNET_101, max_subnets=1)] == [(3, 4, 23, 3)]


def test_choices_that_do_not_fit():
    with pytest.raises(ValueError, match="max_subnets is 0; it must be at least 1"):
        choose_subnets(RESNET_50, max_subnets=0)
    with pytest.raises(ValueError, match=r"min_depth is \(1, 1\); it must have one entry for each of 4"):
        choose_subnets(RESNET_50, min_depth=[1, 1])


def batches(count=3, size=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator) + i,
            torch.randint(classes, (size,), generator=generator),
        )
        for i in range(count)
    ]


def small_net(depth=14):
    torch.manual_seed(0)
    model = cifar_resnet(depth, num_classes=5, width=4)
    for images, _ in batches():
        model(images)
    return model


def test_results_are_those_of_the_subnets_one_by_one():
    """Held against the masked network and torch's own counter on it."""
    model, loader, calibration = small_net(), batches(seed=1), batches(seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = evaluate_subnets(model, loader, calibration_loader=calibration, calibration_samples=15)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert [r.depths for r in results] == [s.depths for s in choose_subnets(stages(2, 2, 2))]
    for result in results:
        alone = evaluate(model, loader, result.depths, calibration_loader=calibration, calibration_samples=15)
        assert result.accuracy == alone.accuracy and result.mean_iou is None
        assert result.loss == pytest.approx(alone.loss, rel=1e-5)
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            active_subnet(model.eval(), result.depths),
        ):
            model(loader[0][0][:1])
        kept = [
            p
            for i, s in enumerate((model.layer1, model.layer2, model.layer3))
            for p in s[: result.depths[i]].parameters()
        ]
        outside = [p for name, p in model.named_parameters() if not name.startswith("layer")]
        assert result.parameters == sum(p.numel() for p in kept + outside)
        model.train()
        if result.subnet == Subnet.full(stages(2, 2, 2)):
            assert result.flops == counter.get_total_flops()
        else:  # there each dropped block ran once, to find out what it returns
            assert result.flops < counter.get_total_flops()
    full = next(r for r in results if r.depths == (2, 2, 2))
    with FlopCounterMode(display=False) as counter:
        model.layer3[1](torch.zeros(1, 16, 2, 2))
    assert (
        full.flops - next(r.flops for r in results if r.depths == (2, 2, 1)) == counter.get_total_flops() > 0
    )


def test_recalibration_reaches_every_subnet():
    model, loader = small_net(), batches(seed=1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.fill_(7.0)
    before = evaluate_subnets(model, loader, [(2, 2, 2), (1, 1, 1)])
    after = evaluate_subnets(model, loader, [(2, 2, 2), (1, 1, 1)], calibration_loader=batches(seed=2))
    for old, new in zip(before, after, strict=True):
        network = extract_subnet(model, new.depths)
        recalibrate_batch_norm(network, batches(seed=2))
        assert evaluate(network, loader).loss == pytest.approx(new.loss, rel=1e-6)
        assert new.loss != pytest.approx(old.loss, rel=1e-3)


def test_chosen_subnets_and_named_stages():
    mask = Subnet(((False, True), (True, False)))
    results = evaluate_subnets(small_net(), batches(), [(1, 2), mask], stages=["layer1", "layer2"])
    assert [r.subnet for r in results] == [Subnet(((True, False), (True, True))), mask]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"subnets": []}, "subnets is empty"),
        ({"subnets": [(1, 1, 9)]}, r"depths is \(1, 1, 9\); its entry 2 must be between 1 and 2"),
        ({"loader": []}, "loader gave no row"),
        ({"max_subnets": -1}, "max_subnets is -1"),
    ],
)
def test_tables_of_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_subnets(
            **({"model": small_net(8 if "max_subnets" in arguments else 14), "loader": batches()} | arguments)
        )


def result(depth, flops, accuracy, parameters=10):
    return SubnetResult(Subnet(((True,) * depth + (False,) * (9 - depth),)), parameters, flops, accuracy, 1.0)


TABLE = [result(9, 900, 0.9), result(8, 800, 0.92), result(5, 500, 0.7), result(4, 500, 0.8), result(1, 100, 0.5),
         result(2, 200, 0.5)]  # fmt: skip


def test_pareto_front():
    assert [r.depths for r in pareto_front(TABLE)] == [(1,), (4,), (8,)]
    assert pareto_front([]) == []
    for r in TABLE:
        beaten = any(o.flops <= r.flops and o.accuracy > r.accuracy for o in TABLE)
        beaten |= any(o.flops < r.flops and o.accuracy >= r.accuracy for o in TABLE)
        assert (r in pareto_front(TABLE)) == (not beaten)


@pytest.mark.parametrize(
    "wanted, depths",
    [
        ({}, 8),
        ({"budget_flops": 800}, 8),
        ({"budget_flops": 799}, 4),
        ({"budget_flops": 250.5}, 1),
        ({"min_accuracy": 0.5}, 1),
        ({"min_accuracy": 0.51}, 4),
        ({"min_accuracy": 0.9}, 8),
        ({"min_accuracy": 0.7, "budget_flops": 850}, 8),
        ({"min_accuracy": 0.7, "budget_flops": 600}, 4),
    ],
)
def test_best_subnet(wanted, depths):
    assert best_subnet(iter(TABLE), **wanted).depths == (depths,)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"budget_flops": 99}, "budget_flops is 99; the cheapest subnet, 1, takes 100"),
        ({"min_accuracy": 0.95}, "min_accuracy is 0.95; the most accurate subnet, 8, reaches 0.92"),
        (
            {"min_accuracy": 0.9, "budget_flops": 600},
            "min_accuracy is 0.9; the most accurate subnet with at most 600 FLOPs, 4, reaches 0.8",
        ),
        ({"budget_flops": 0}, "budget_flops is 0; it must be greater than 0"),
        ({"budget_flops": math.nan}, "budget_flops is nan"),
        ({"min_accuracy": 90}, "min_accuracy is 90; it must be between 0 and 1"),
    ],
)
def test_no_best_subnet(wanted, message):
    with pytest.raises(ValueError, match=message):
        best_subnet(TABLE, **wanted)
    with pytest.raises(ValueError, match="results is empty"):
        best_subnet([])


def test_csv_and_picture(tmp_path):
    write_subnets_csv(TABLE, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["depths"], row["flops"], float(row["accuracy"]), row["pareto"]) for row in rows] == [
        (str(r.subnet), str(r.flops), r.accuracy, str(int(r in pareto_front(TABLE)))) for r in TABLE
    ]
    assert rows[0]["mean_iou"] == ""
    plot_subnets(TABLE, tmp_path / "t.png", "title")
    plot_subnets(TABLE[:1], tmp_path / "one.png")
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.size == (840, 540)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of the command line."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [
        "train",
        "--model",
        "cifar_resnet14",
        "--train-images",
        "60",
        "-b",
        "20",
        "--epochs",
        "1",
        "--min-depth",
        "1-2-1",
    ]
    assert main([*flags, "--output", str(folder), "--experiment", "x"]) == 0
    return folder / "x"


def test_the_command_prints_writes_draws_and_exports(checkpoint, tmp_path, capsys):
    written = yaml.safe_load((checkpoint / "args.yaml").read_text())
    (checkpoint / "args.yaml").write_text(yaml.safe_dump(written | {"device": "of another machine"}))
    arguments = ["subnets", checkpoint, "--output", tmp_path / "out", "--export-onnx", tmp_path / "best.onnx"]
    assert main([str(a) for a in [*arguments, "--budget-flops", "2.7e6"]]) == 0
    (checkpoint / "args.yaml").write_text(yaml.safe_dump(written))
    out = capsys.readouterr().out
    begun = f"Evaluating the subnets of cifar_resnet14, {checkpoint / 'best.pt'}, on 1737 test images"
    assert out.splitlines()[0] == begun
    shown = re.findall(r"^(\d-\d-\d) +([\d,]+) +([\d.]+) +([\d.]+) % +[\d.]+(  \*)?$", out, re.MULTILINE)
    assert {row[0] for row in shown} == {"2-2-2", "2-2-1", "1-2-2", "1-2-1"}
    assert [float(row[2]) for row in shown] == sorted((float(row[2]) for row in shown), reverse=True)
    with open(tmp_path / "out" / "subnets.csv", newline="") as file:
        rows = {row["depths"]: row for row in csv.DictReader(file)}
    for depths, parameters, mflops, accuracy, pareto in shown:
        row = rows[depths]
        assert int(row["parameters"]) == int(parameters.replace(",", ""))
        assert float(row["flops"]) / 1e6 == pytest.approx(float(mflops), abs=0.006)
        assert 100 * float(row["accuracy"]) == pytest.approx(float(accuracy), abs=0.006)
        assert row["pareto"] == str(int(bool(pareto)))
    as_trained = re.search(r"^The full network \(2-2-2\) as it was trained: ([\d.]+) %", out, re.MULTILINE)
    assert "BatchNorm's statistics are re-estimated" in out
    assert 0 <= float(as_trained[1]) <= 100
    with Image.open(tmp_path / "out" / "subnets.png") as picture:
        assert picture.size == (840, 540)
    best = re.search(r"^Best: depths (\S+), accuracy ([\d.]+) %, ([\d.]+) MFLOPs$", out, re.MULTILINE)
    affordable = {
        depths: float(row["accuracy"]) for depths, row in rows.items() if float(row["flops"]) <= 2.7e6
    }
    assert 0 < len(affordable) < 4
    assert affordable[best[1]] == max(affordable.values())
    _check_exported(tmp_path / "best.onnx", 100 * float(rows[best[1]]["accuracy"]))


def _check_exported(path, accuracy):
    """The file itself is as accurate as the table says."""
    import onnxruntime

    images, targets = digits(60).test.tensors
    logits = onnxruntime.InferenceSession(path).run(["logits"], {"input": images.numpy()})[0]
    assert 100 * (torch.from_numpy(logits).argmax(1) == targets).float().mean().item() == pytest.approx(
        accuracy, abs=1
    )


def test_the_command_draws_beside_the_checkpoint(checkpoint, capsys):
    flags = [
        "--model",
        "cifar_resnet14",
        "--train-images",
        "60",
        "-b",
        "20",
        "--min-depth",
        "2",
        "--calibration-samples",
        "20",
    ]
    assert main(["subnets", str(checkpoint / "last.pt"), *flags]) == 0
    assert "2-2-2 " in capsys.readouterr().out
    assert {"subnets.csv", "subnets.png"} <= {path.name for path in checkpoint.iterdir()}
    assert load_checkpoint(checkpoint / "last.pt")["epoch"] == 1


FIT = ["--model", "cifar_resnet14", "--train-images", "60"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--model", "cifar_resnet20"],
            "is of another model than CifarResNet: 36 missing (layer1.2.conv1.weight",
        ),
        (
            [*FIT, "--export-onnx", "gone/x.onnx"],
            "path is 'gone/x.onnx', which can't be written: No such file",
        ),
        ([*FIT, "--output", "/dev/null/x"], "/dev/null/x"),
        ([*FIT, "--min-depth", "1-1"], "min_depth is (1, 1); it must have one entry for each of 3 stages"),
        ([*FIT, "--min-depth", "9-1-1"], "min_depth is (9, 1, 1); a stage has only 2 blocks"),
        ([*FIT, "--max-subnets", "0"], "argument --max-subnets: '0' must be an integer of at least 1"),
        ([*FIT, "--min-accuracy", "90"], "min_accuracy is 90.0; it must be between 0 and 1"),
        ([*FIT, "--data", "mnist"], "data is 'mnist'"),
    ],
)
def test_bad_values_end_with_code_2_and_a_message(checkpoint, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "gkt_fast.deployment.subnet_table.evaluate", lambda *_, **__: pytest.fail("it evaluated before")
    )
    try:
        code = main(["subnets", str(checkpoint), *flags])
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n", "args.yaml holds list; it must be a mapping of flags to values"),
        ("image_size: big\n", "argument --image-size: 'big' must be an integer of at least 1"),
    ],
)
def test_bad_files_of_arguments(checkpoint, capsys, text, message):
    written = (checkpoint / "args.yaml").read_text()
    (checkpoint / "args.yaml").write_text(text)
    try:
        code = main(["subnets", str(checkpoint)])
    except SystemExit as exit:
        code = exit.code
    finally:
        (checkpoint / "args.yaml").write_text(written)
    assert code == 2 and message in capsys.readouterr().err


def test_checkpoints_that_are_none(tmp_path, capsys):
    assert main(["subnets", str(tmp_path)]) == 2
    assert f"there is no checkpoint at {tmp_path / 'last.pt'}" in capsys.readouterr().err
    (tmp_path / "x.pt").write_text("nothing")
    assert main(["subnets", str(tmp_path / "x.pt")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_averaged_weights_and_depths_within_a_budget(checkpoint, tmp_path, capsys, monkeypatch):
    flags = ["--min-depth", "2", "--output", str(tmp_path), "--ema"]
    assert main(["subnets", str(checkpoint), *flags]) == 2
    assert "best.pt holds no averaged weights" in capsys.readouterr().err
    train = [
        "train",
        "--config",
        str(checkpoint / "args.yaml"),
        "--ema-decay",
        "0.5",
        "--experiment",
        "averaged",
    ]
    assert main(train) == 0
    folder = checkpoint.parent / "averaged"
    taken = []
    monkeypatch.setattr(
        "gkt_fast.cli.subnet_study.evaluate_subnets", lambda model, *_, **__: taken.append(model) or TABLE
    )
    assert main(["subnets", str(folder), *flags]) == 0
    averaged = load_checkpoint(folder / "best.pt")["ema"]
    for name, value in taken[0].state_dict().items():
        assert torch.equal(value, averaged[f"module.{name}"]), name
    assert not torch.equal(taken[0].fc.weight, load_checkpoint(folder / "best.pt")["model"]["fc.weight"])


def test_no_subnet_qualifies(checkpoint, tmp_path, capsys):
    """Said after the table, which shows why."""
    flags = [*FIT, "--min-depth", "2", "--min-accuracy", "1", "--output", str(tmp_path)]
    assert main(["subnets", str(checkpoint), *flags, "--export-onnx", str(tmp_path / "x.onnx")]) == 2
    captured = capsys.readouterr()
    assert (
        "2-2-2 " in captured.out
        and "min_accuracy is 1; the most accurate subnet, 2-2-2, reaches" in captured.err
    )
    assert {path.name for path in tmp_path.iterdir()} == {"subnets.csv", "subnets.png"}
