"""Bytes, FLOPs and launches of ops against numbers worked out by hand, and the bound's formula."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gkt_fast import GKT, GKTConfig, ghost_batch_norm, group_knowledge_loss, use_backend
from gkt_fast.batch_norm.fusion import FusedBlock
from gkt_fast.instruments import roofline
from gkt_fast.instruments.op_counts import OpCost, OpCounter, fake_in_place
from gkt_fast.models import cifar_resnet

FLOAT = 4  # bytes


def counted(function, fake: bool = True) -> list[OpCost]:
    """The ops of `function`, on fake tensors or real ones."""
    with FakeTensorMode() if fake else nullcontext(), use_backend("cpp"), OpCounter() as counter:
        function()
    return counter.ops


def only(ops: list[OpCost], name: str) -> OpCost:
    """The op of that name, which must have run once."""
    (op,) = (op for op in ops if op.name == name)
    return op


@pytest.mark.parametrize("fake", [True, False])
def test_a_convolution(fake):
    """x (2, 3, 8, 8), weight (4, 3, 3, 3), padding 1: y (2, 4, 8, 8), 27 multiply-adds for each of its elements."""
    x, weight, y = 2 * 3 * 64, 4 * 3 * 9, 2 * 4 * 64

    def run():
        images = torch.ones(2, 3, 8, 8, requires_grad=True)
        kernel = torch.ones(4, 3, 3, 3, requires_grad=True)
        F.conv2d(images, kernel, padding=1).backward(torch.ones(2, 4, 8, 8))

    ops = counted(run, fake)
    assert only(ops, "aten::convolution") == OpCost(
        "aten::convolution", FLOAT * (x + weight + y), 2 * 27 * y, 1, torch.float32
    )
    # One kernel for the gradient of x and one for that of weight; each reads the gradient of y.
    moved = FLOAT * (y + weight + x + y + x + weight)
    assert only(ops, "aten::convolution_backward") == OpCost(
        "aten::convolution_backward", moved, 2 * 2 * 27 * y, 2, torch.float32
    )


def test_a_linear_layer():
    """x (5, 7), weight (3, 7), bias (3,): y (5, 3), 7 multiply-adds for each of its elements."""

    def run():
        x, weight, bias = torch.ones(5, 7), torch.ones(3, 7), torch.ones(3)
        with torch.no_grad():
            F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())

    ops = counted(run)
    product = OpCost("aten::addmm", 2 * (35 + 21 + 3 + 15), 2 * 7 * 15, 1, torch.bfloat16)
    assert only(ops, "aten::addmm") == product
    assert "aten::t" not in {op.name for op in ops}  # a view


def test_ghost_batch_norm_is_one_op_each_way():
    """x (4, 3, 2, 2): 48 elements, 12 lines of 4 positions, so 12 bytes of mask; statistics (3, 2 ghosts, 3)."""

    def run():
        x, residual = (torch.empty(4, 3, 2, 2).requires_grad_() for _ in range(2))
        weight, bias = (torch.empty(3).requires_grad_() for _ in range(2))
        y, _, _ = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
        y.backward(torch.empty(4, 3, 2, 2))

    ops = counted(run)
    forward = only(ops, "gkt_fast::ghost_batch_norm")
    backward = only(ops, "gkt_fast::ghost_batch_norm_backward")
    # Reads x twice, the residual, weight and bias; writes y, statistics and mask.
    assert forward.bytes == FLOAT * (2 * 48 + 48 + 6 + 48 + 18) + 12
    # Reads the gradient of y, x and the mask twice, weight and statistics; writes four gradients.
    assert backward.bytes == FLOAT * (2 * 48 + 2 * 48 + 3 + 18 + 2 * 48 + 6) + 2 * 12
    assert (forward.flops, backward.flops) == (0, 0)
    assert (forward.launches, backward.launches) == (3, 3)
    assert not any(op.name.startswith("aten::native_batch_norm") for op in ops)


def test_batch_norm_with_running_statistics_is_one_pass():
    def moved(training: bool) -> int:
        def run():
            x, mean, var = torch.empty(4, 3, 2, 2), torch.empty(3), torch.empty(3)
            running = {} if training else {"running_mean": mean, "running_var": var}
            ghost_batch_norm(x, None, None, ghosts=2, activation="identity", **running)

        return only(counted(run), "gkt_fast::ghost_batch_norm").bytes

    statistics = FLOAT * 18
    assert moved(training=True) == FLOAT * 3 * 48 + statistics
    assert moved(training=False) == FLOAT * (2 * 48 + 6) + statistics


def test_group_knowledge_loss_is_one_op():
    """Reads 4 streams' logits of 5 rows and 7 classes and the soft targets; writes their gradient, loss and terms."""

    def run():
        group_knowledge_loss(torch.empty(4, 5, 7).requires_grad_(), torch.empty(5, 7))

    (op,) = counted(run)
    assert op.name == "gkt_fast::group_knowledge_loss"
    assert op.bytes == FLOAT * (140 + 35 + 140 + 1 + 4)
    assert op.launches == 2


@pytest.mark.parametrize(("normalize_logits", "own", "compared"), [(False, 2, 1), (True, 4, 2)])
def test_group_knowledge_loss_reads_long_rows_again(normalize_logits, own, compared):
    """4 streams of 2 rows of 2,000 classes; class indices are counted by a kernel of its own."""

    def run():
        logits = torch.empty(4, 2, 2000).requires_grad_()
        group_knowledge_loss(logits, torch.empty(2, dtype=torch.int64), normalize_logits=normalize_logits)

    (op,) = counted(run)
    stream = 2 * 2000
    assert op.bytes == FLOAT * ((4 * own + 3 * compared + 4) * stream + 1 + 4) + 8 * 2
    assert op.launches == 3


def test_attention():
    """2 images, 3 heads, 5 tokens, width 8: two products forward, five backward."""

    def run():
        query, key, value = (torch.empty(2, 3, 5, 8).requires_grad_() for _ in range(3))
        F.scaled_dot_product_attention(query, key, value).backward(torch.empty(2, 3, 5, 8))

    product = 2 * 2 * 3 * 5 * 5 * 8
    assert sorted(op.flops for op in counted(run) if op.flops) == [2 * product, 5 * product]


def test_memory_that_is_not_touched_is_not_counted():
    def run():
        x = torch.empty(8, 4)  # nothing
        x.view(2, 16).t().unsqueeze(0).detach()  # nothing
        x.expand(3, 8, 4).sum()  # reads 32, writes 1
        x[2:4].mul_(2)  # reads and writes 8
        x[0].copy_(x[1])  # reads and writes 4
        x.zero_()  # writes 32

    assert [(op.name, op.bytes) for op in counted(run)] == [
        ("aten::sum", FLOAT * 33),
        ("aten::mul_", FLOAT * 16),
        ("aten::copy_", FLOAT * 8),
        ("aten::zero_", FLOAT * 32),
    ]


def test_the_bound_takes_the_slower_of_both_and_the_launches():
    rates = roofline.Rates(1e3, {torch.float32: 1e6}, 0.5)
    by_memory = OpCost("a", 2000, 10**6, 1, torch.float32)  # 2 s and 1 s
    by_flops = OpCost("b", 2000, 3 * 10**6, 2, torch.float32)  # 2 s and 3 s
    elsewhere = OpCost("c", 1000, 0, 1, torch.int64)  # 1 s
    runs = [[by_memory, by_flops], [by_memory, by_flops, elsewhere, elsewhere]]
    assert roofline.bound(runs, rates) == pytest.approx((2 + 3 + 1.5) + 0.5 * (2 * (1 + 0.5)))
    assert roofline.memory_bound_share(runs, rates) == pytest.approx((2 + 1) / 8)


def test_scenarios_run_from_the_bound_to_slow_kernels_and_a_slow_host():
    rates = roofline.Rates(1e3, {}, 0.5)
    ops = [OpCost("aten::relu", 2000, 0, 1, torch.float32), OpCost("gkt_fast::x", 1000, 0, 2, torch.float32)]
    seconds = [2 + 1 + 1.5, 3 + 1 + 1.5, 3 + 2 + 1.5]
    assert roofline.scenarios([ops], rates, 5.0) == pytest.approx([*seconds, 5.0, 5.5, 6.5])


@pytest.fixture(scope="module")
def tiny():
    network = roofline.Network(lambda: cifar_resnet(14, width=4), 16, 6, 10)
    return {mode: roofline.count_steps(network, mode, torch.float32, 6, 2) for mode in roofline.MODES}


def test_modes_do_the_work_of_their_plans(tiny):
    """FLOPs from the ops that ran agree with the plan's: the same states, each forward and backward."""
    gkt = GKT(cifar_resnet(14, width=4), GKTConfig())
    gkt.layers(torch.empty(1, 3, 16, 16))
    flops = {mode: [sum(op.flops for op in run) for run in runs] for mode, runs in tiny.items()}
    plain = flops["plain"][0]
    assert flops["shared"] == flops["stacked"] == flops["lean"]
    for step in range(2):
        cost = gkt.cost(gkt.sample(step))
        assert flops["shared"][step] / plain == pytest.approx(cost.shared_ratio, rel=0.02)
        assert flops["sequential"][step] / plain == pytest.approx(cost.sequential_ratio, rel=0.02)


def test_stacking_saves_launches_and_sharing_saves_bytes(tiny):
    launches = {mode: sum(op.launches for run in runs for op in run) for mode, runs in tiny.items()}
    moved = {mode: sum(op.bytes for run in runs for op in run) for mode, runs in tiny.items()}
    assert launches["stacked"] < launches["shared"] < launches["sequential"]
    assert moved["shared"] < moved["sequential"]
    assert moved["stacked"] < 1.2 * moved["shared"]  # putting states together and apart costs copies


@pytest.mark.parametrize("recompute", [True, False])
def test_a_fused_block_recomputes_what_its_convolutions_read(recompute, monkeypatch):
    """Blocks of 4, 8 and 16 channels; 2 images of 8x8, 4x4, 2x2: each one's first norm runs again, in one pass."""
    monkeypatch.setattr(FusedBlock, "recompute", recompute)
    network = roofline.Network(lambda: cifar_resnet(8, width=4), 8, 2, 10)
    (ops,) = roofline.count_steps(network, "plain+fused", torch.float32, 2, 1)
    again = [op for op in ops if op.name == "gkt_fast::ghost_batch_norm" and op.launches == 1]
    sizes = [(2 * 4 * 64, 4, 2 * 64), (2 * 8 * 16, 8, 2 * 16), (2 * 16 * 4, 16, 2 * 4)]
    # Reads x, weight, bias and statistics; writes y and a bit for each element, of 8 channels a byte.
    expected = [
        FLOAT * (2 * size + 5 * channels) + rows * -(-channels // 8) for size, channels, rows in sizes
    ]
    assert [op.bytes for op in again] == (expected if recompute else [])


def test_fake_parameters_keep_their_form():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    fake_in_place(model, FakeTensorMode())
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def test_rows_are_labelled_and_finite():
    network = roofline.Network(lambda: cifar_resnet(8, width=4), 8, 2, 10)
    rows = roofline.predict("tiny", network, torch.bfloat16, steps=1)
    assert len(rows) == len(roofline.MODES) * len(roofline.GPUS)
    for row in rows:
        assert row["dtype"] == "bfloat16" and 0 < row["predicted_ms"] < math.inf
        assert 0 < row["memory_share"] <= 1
        assert (row["plain_steps"] == 1) == (row["mode"] == "plain")
    data_sheet, measured = (
        [r["predicted_ms"] for r in rows if r["rates"] == k] for k in ("data sheet", "measured")
    )
    assert all(a < b for a, b in zip(data_sheet, measured, strict=True))
