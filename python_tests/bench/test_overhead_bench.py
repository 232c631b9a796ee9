"""bench/overhead.py compares `shared` execution with a hand-written step that computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.processes import run_script
from helpers.reference_step import assert_same, block_calls, count_calls, one_thread, outcome_of  # noqa: F401
from torch import nn

from gkt_fast import GKT, GKTConfig, fuse_blocks
from gkt_fast.instruments.hand_written import hand_written_step
from gkt_fast.models import cifar_resnet


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loops, min_depth", [(1, 1), (2, 0)])
def test_the_hand_written_step_computes_what_shared_execution_does(fused, loops, min_depth):
    torch.manual_seed(0)
    model = cifar_resnet(20, num_classes=5, width=4).double()
    config = GKTConfig(groups=3, loops=loops, min_depth=min_depth, execution="shared", fuse_blocks=fused)
    images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    for step in range(3):
        gkt = GKT(copy.deepcopy(model), config)
        by_hand = copy.deepcopy(model)
        if fused:
            fuse_blocks(by_hand)
        output = gkt(images, targets, step=step)
        output.loss.backward()
        terms = torch.cat([output.ce.reshape(1), output.kd])
        shared = outcome_of(gkt.model, (images,), output.loss, terms, output.logits)
        norms = [module for module in by_hand.modules() if isinstance(module, nn.BatchNorm2d)]
        depths = [subnet.depths for subnet in output.subnets]
        dropped = [frozenset(), *(subnet.dropped(gkt.stages) for subnet in output.subnets)]
        expected = block_calls(gkt.stages, dropped)
        with count_calls(by_hand, expected) as calls:
            loss, terms = hand_written_step(by_hand, norms, images, targets, depths, config)
        assert calls == expected
        loss.backward()
        assert_same(outcome_of(by_hand, (images,), loss, terms, output.logits), shared, 1e-11)
        assert all(norm.track_running_stats for norm in norms)


def test_the_benchmark_of_the_host_runs(tmp_path):
    path = tmp_path / "host.csv"
    printed = run_script("bench/overhead.py", "--host", "--repeats", "1", "--csv", path, folder=tmp_path)
    lines = [line.split(",")[:2] for line in path.read_text().splitlines()[1:]]
    steps = ["plain", "plain+fused", "stacked"]
    assert lines == [[model, step] for model in ("cifar_resnet56", "resnet50_64px") for step in steps]
    assert "ratio" in printed


def test_the_benchmark_runs_small(tmp_path):
    path = tmp_path / "overhead.csv"
    arguments = "--model cifar_resnet20 --batch-size 2 --repeats 1 --threads 1 --csv"
    printed = run_script("bench/overhead.py", *arguments.split(), path, folder=tmp_path)
    lines = path.read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["plain", "by hand", "shared", "check", "setup"]
    assert "overhead_percent" in printed
