"""Measured times: what is timed, what the table makes of them, and elastic networks in the table."""

from __future__ import annotations

import csv

import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401
from PIL import Image
from torch import nn

from gkt_fast import (
    Latency,
    Subnet,
    SubnetResult,
    best_subnet,
    evaluate,
    evaluate_subnets,
    make_elastic,
    pareto_front,
    plot_subnets,
    write_subnets_csv,
)
from gkt_fast.deployment import latency
from gkt_fast.deployment.latency import measure_latencies
from gkt_fast.models import cifar_resnet


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return self.layer(x)


def test_every_network_runs_in_turn(monkeypatch):
    """By a clock that each call moves on by its batch size."""
    now = [0.0]
    networks = [Counted().eval(), Counted().eval()]
    order = []

    def hook(module, inputs, output):
        now[0] += len(inputs[0]) / 1000
        order.append((networks.index(module), len(inputs[0])))

    for network in networks:
        network.register_forward_hook(hook)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    found = measure_latencies(networks, (torch.zeros(1, 3),), (1, 4), ["torch"], repeats=5, warmup=2)
    assert order == [(0, 1), (0, 4), (1, 1), (1, 4)] * 7
    for entries in found:
        assert [(e.runtime, e.batch_size) for e in entries] == [("torch", 1), ("torch", 4)]
        for entry in entries:
            assert entry.lower_ms == pytest.approx(entry.batch_size) == pytest.approx(entry.median_ms)


def test_onnxruntime_is_timed_too():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()]
    (entries,) = measure_latencies(networks, (torch.zeros(2, 3, 2, 2),), (1, 5), repeats=3)
    assert [(entry.runtime, entry.batch_size) for entry in entries] == [
        ("torch", 1),
        ("torch", 5),
        ("onnxruntime", 1),
        ("onnxruntime", 5),
    ]
    assert all(0 < entry.lower_ms <= entry.median_ms <= entry.upper_ms for entry in entries)


class Looks(nn.Module):
    """Can't be exported: its control flow depends on values."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale if x.sum() > 0 else x


def test_a_runtime_that_cannot_run_it_is_left_out_and_said(caplog, monkeypatch):
    (entries,) = measure_latencies([Looks().eval()], (torch.zeros(1, 3),), repeats=1)
    assert [entry.runtime for entry in entries] == ["torch"]
    assert "no latencies in onnxruntime: torch can't export Looks" in caplog.text
    monkeypatch.setattr(latency.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with caplog.at_level("INFO", "gkt_fast"):
        measure_latencies([Looks().eval()], (torch.zeros(1, 3),), repeats=1)
    assert "no latencies in onnxruntime: onnxscript isn't installed" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"runtimes": ["tensorrt"]}, "runtimes holds 'tensorrt'; it must hold 'torch' or 'onnxruntime'"),
        ({"batch_sizes": [0]}, "batch_sizes holds 0; it must hold integers of at least 1"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_latencies([Counted()], (torch.zeros(1, 3),), **arguments)


def result(depth, flops, accuracy, one, many):
    times = (Latency("torch", 1, one, one, one), Latency("onnxruntime", 8, many, many / 2, many * 2))
    return SubnetResult(Subnet(((True,) * depth,)), depth, flops, accuracy, 1.0, None, times)


TABLE = [result(3, 300, 0.9, 3.0, 10.0), result(2, 200, 0.8, 4.0, 6.0), result(1, 100, 0.7, 1.0, 8.0)]


def test_best_by_measured_time():
    assert best_subnet(TABLE, budget_ms=2).depths == (1,)
    assert best_subnet(TABLE, budget_ms=3).depths == (3,)
    assert best_subnet(TABLE, budget_ms=7, runtime="onnxruntime", batch_size=8).depths == (2,)
    assert best_subnet(TABLE, budget_ms=9, budget_flops=150).depths == (1,)
    assert [r.depths for r in pareto_front(TABLE, lambda r: r.milliseconds())] == [(1,), (3,)]
    with pytest.raises(ValueError, match=r"budget_ms is 0\.5; the cheapest subnet, 1, takes 1 ms"):
        best_subnet(TABLE, budget_ms=0.5)
    with pytest.raises(ValueError, match="3 was not timed in torch at batch 8; measured: torch at batch 1"):
        best_subnet(TABLE, budget_ms=1, batch_size=8)
    with pytest.raises(ValueError, match="the most accurate subnet with at most 2 ms, 1, reaches"):
        best_subnet(TABLE, budget_ms=2, min_accuracy=0.75)
    with pytest.raises(ValueError, match="budget_ms is 0; it must be greater than 0"):
        best_subnet(TABLE, budget_ms=0)
    untimed = SubnetResult(TABLE[0].subnet, 1, 1, 0.5, 1.0)
    with pytest.raises(ValueError, match="measured: nothing"):
        best_subnet([untimed], budget_ms=1)


def test_csv_and_picture(tmp_path):
    write_subnets_csv(TABLE, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["torch_batch1_ms"] == "4.0" and rows[1]["onnxruntime_batch8_ms_upper"] == "12.0"
    plot_subnets(TABLE, tmp_path / "t.png", runtime="onnxruntime", batch_size=8)
    with Image.open(tmp_path / "t.png") as image:
        assert image.size == (840, 540)
    with pytest.raises(ValueError, match="was not timed in torch at batch 2"):
        plot_subnets(TABLE, tmp_path / "x.png", runtime="torch", batch_size=2)
    assert not (tmp_path / "x.png").exists()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return cifar_resnet(14, num_classes=5, width=4)


def loader():
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 12, 12), torch.randint(5, (6,))) for _ in range(2)]


def test_subnets_are_timed_over_shared_weights(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    depths = [(1, 1, 1), (2, 2, 2)]
    found = evaluate_subnets(
        network, loader(), depths, calibration_loader=loader(), latency=["torch"], latency_batch=3
    )
    for entry in found:
        assert [(e.runtime, e.batch_size) for e in entry.latencies] == [("torch", 1), ("torch", 3)]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="latency_batch is 0"):
        evaluate_subnets(network, loader(), depths, latency_batch=0)


def test_elastic_networks_in_the_table(network):
    elastic = make_elastic(network, [(1, 1, 1), (2, 2, 2)], calibration_loader=loader())
    found = evaluate_subnets(elastic, loader(), latency=["torch"])
    assert [entry.subnet for entry in found] == list(elastic.subnets)
    for entry in found:
        alone = evaluate(network, loader(), entry.depths, calibration_loader=loader())
        assert entry.loss == pytest.approx(alone.loss) and entry.accuracy == alone.accuracy
        assert evaluate(elastic, loader(), entry.depths).loss == pytest.approx(alone.loss)
    assert evaluate_subnets(elastic, loader(), [(1, 1, 1)])[0].depths == (1, 1, 1)
    with pytest.raises(ValueError, match="the elastic network's own"):
        evaluate_subnets(elastic, loader(), calibration_loader=loader())
    with pytest.raises(ValueError, match="the elastic network's own"):
        evaluate(elastic, loader(), calibration_loader=loader())
