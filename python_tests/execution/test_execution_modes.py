"""What sets the modes apart: how `auto` chooses, what `stacked` refuses, what `lean` keeps, what `explain` says."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from helpers.reference_step import choice_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from gkt_fast import GKT, GKTConfig
from gkt_fast.execution import StackingError
from gkt_fast.execution.lean import stream_order
from gkt_fast.execution.partition import Rows, lead_and_kept
from gkt_fast.models import cifar_resnet
from gkt_fast.subnets.plan import Layer, make_plan


def batch(samples: int = 6, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, size, size, generator=generator)
    return images, torch.randint(10, (samples,), generator=generator)


class Block(nn.Module):
    """A residual block with one knob for everything that stacking can't take."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        norm = type("OtherNorm", (nn.BatchNorm2d,), {}) if kind == "subclass" else nn.BatchNorm2d
        self.bn = norm(width)
        self.kind = kind

    def forward(self, x, scale=1.0):
        body = self._body
        return x + scale * (
            checkpoint(body, x, use_reentrant=False) if self.kind == "checkpoint" else body(x)
        )

    def _body(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    """A stem, four blocks and a head."""

    def __init__(self, kind: str = "plain", width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, kind) for _ in range(4))
        self.head = nn.Linear(width, 10)
        self.kind = kind

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if self.kind == "between" and i:
                x = x * 1.5
            x = block(x, x.new_tensor(0.5)) if self.kind == "arguments" else block(x)
        return self.head(x.mean((2, 3)))


STEP = {"step": 1}


def test_auto_stacks_what_can_be_stacked():
    choice = choice_of("auto", Net(), batch()[:1])
    assert choice.mode == "stacked"
    lean = choice_of("lean", Net(), batch()[:1])
    assert (lean.mode, lean.reason) == ("lean", "asked for")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("subclass", r"'blocks\.0\.bn' \(OtherNorm\) looks across the batch"),
        ("arguments", r"block 'blocks\.0' takes 2 tensors"),
        ("between", r"computes something between two blocks, before 'blocks\.\d'"),
    ],
)
def test_stacked_refuses_with_a_reason_and_auto_falls_back_once(kind, reason, caplog):
    images, targets = batch()
    with pytest.raises(StackingError, match=reason):
        GKT(Net(kind), GKTConfig(execution="stacked"))(images, targets, **STEP)
    torch.manual_seed(0)
    auto = GKT(Net(kind), GKTConfig(groups=2))
    torch.manual_seed(0)
    shared = GKT(Net(kind), GKTConfig(groups=2, execution="shared"))
    with caplog.at_level(logging.INFO, logger="gkt_fast"):
        for step in range(3):
            outputs = [gkt(images, targets, step=step) for gkt in (auto, shared)]
            for output in outputs:
                output.loss.backward()
            assert torch.equal(outputs[0].loss, outputs[1].loss)
    messages = [r.getMessage() for r in caplog.records if "execution='auto' runs 'shared'" in r.getMessage()]
    assert len(messages) == 1
    for a, b in zip(auto.model.state_dict().values(), shared.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_hooks_on_batch_norm_are_a_reason_against_stacking():
    model = Net()
    model.blocks[1].bn.register_forward_hook(lambda *_: None)
    assert "has hooks" in choice_of("auto", model, batch()[:1]).reason


def test_stacked_refuses_recomputation_and_recovers():
    images, targets = batch()
    gkt = GKT(Net("checkpoint"), GKTConfig(execution="stacked"))
    with pytest.raises(RuntimeError, match="recomputed during backward"):
        gkt(images, targets, **STEP).loss.backward()


def test_stacked_batch_norm_in_eval_mode_uses_running_statistics():
    images, targets = batch()
    losses = []
    for execution in ("sequential", "stacked"):
        torch.manual_seed(0)
        gkt = GKT(Net(), GKTConfig(execution=execution))
        gkt(images, targets, **STEP)
        gkt.eval()
        losses.append(gkt(images, targets, step=2).loss)
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


def test_stacked_calls_each_block_once_per_step():
    gkt = GKT(cifar_resnet(20, width=4), GKTConfig(execution="stacked", loops=2))
    calls: dict[str, int] = {}
    for path, module in gkt.model.named_modules():
        if path in {block for stage in gkt.stages for block in stage.blocks}:
            module.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1}))
    gkt(*batch(), **STEP)
    calls.clear()
    gkt(*batch(), **STEP)
    assert set(calls.values()) == {1}
    assert len(calls) == 9


@pytest.mark.parametrize("lead", [0, 1, 2, 3])
@pytest.mark.parametrize("kept", [(), (0,), (2,), (0, 2), (1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lead_and_kept_gradients(lead, kept, channels_last):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 5, dtype=torch.double)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    leading, parts = lead_and_kept(mine, Rows(2, 2), lead, kept)
    expected = [other[: lead * 2], *(other[i * 2 : i * 2 + 2] for i in kept)]
    for a, b in zip([leading, *parts], expected, strict=True):
        assert torch.equal(a, b)
    weights = [torch.randn_like(e) for e in expected]
    used = [0] if kept == () else range(1, len(expected))  # leaves some parts without a gradient
    for tensors in ([leading, *parts], expected):
        sum((tensors[i] * weights[i]).sum() for i in used).backward()
    assert torch.equal(mine.grad, other.grad)


def saved_bytes(gkt: GKT, images: torch.Tensor, targets: torch.Tensor, step: int) -> int:
    """Most bytes of activations held for backward at any time of a step."""
    held: dict[int, int] = {}
    peak = 0
    weights = {p.data_ptr() for p in [*gkt.parameters(), *gkt.buffers()]}

    class Held:
        """Counts as long as autograd keeps it."""

        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal peak
            self.tensor = tensor
            self.key = tensor.untyped_storage().data_ptr()
            held[self.key] = held.get(self.key, 0) + 1
            sizes[self.key] = tensor.untyped_storage().nbytes()
            peak = max(peak, sum(sizes[key] for key in held if key not in weights))

        def __del__(self) -> None:
            held[self.key] -= 1
            if not held[self.key]:
                del held[self.key]

    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.tensor):
        gkt(images, targets, step=step).loss.backward()
    return peak


def test_lean_keeps_little_more_than_one_network():
    images, targets = batch(8, 16)
    peaks = {}
    for execution in ("sequential", "shared", "lean"):
        torch.manual_seed(0)
        gkt = GKT(cifar_resnet(32, width=8), GKTConfig(execution=execution, fuse_blocks=False))
        gkt(images, targets, step=0).loss.backward()
        peaks[execution] = max(saved_bytes(gkt, images, targets, step) for step in range(6))
    assert peaks["lean"] <= 1.10 * peaks["sequential"]
    assert peaks["shared"] > 1.5 * peaks["sequential"]


@pytest.mark.parametrize(("groups", "loops"), [(3, 1), (3, 2), (2, 3), (1, 4), (4, 2)])
def test_stream_order_respects_teachers(groups, loops):
    config = GKTConfig(groups=groups, loops=loops)
    layers = [Layer(f"b{i}", True, 1) for i in range(5)]
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        dropped = [frozenset()] + [
            frozenset(f"b{i}" for i in range(5) if torch.rand((), generator=draw) < 0.4)
            for _ in range(groups * loops)
        ]
        order = stream_order(make_plan(layers, dropped), config)
        assert sorted(order) == list(range(groups * loops + 1))
        place = {stream: i for i, stream in enumerate(order)}
        for loop, group in itertools.product(range(loops), range(groups)):
            stream = 1 + loop * groups + group
            assert place[0] < place[stream]
            if group:
                assert place[stream - 1] < place[stream]
                if loop + 1 < loops:  # the teacher's next update comes afterwards
                    assert place[stream] < place[stream + groups - 1]
            if loop:
                assert place[stream - groups] < place[stream]


def test_explain_shows_the_plan_and_the_choice():
    gkt = GKT(cifar_resnet(20, width=4), GKTConfig(loops=2))
    with pytest.raises(ValueError, match="the model has not been called yet"):
        gkt.explain()
    gkt.layers(batch()[0])
    text = gkt.explain(step=3)
    cost = gkt.cost(gkt.sample(3))
    assert f"one by one {cost.sequential_ratio:.2f} x, shared {cost.shared_ratio:.2f} x" in text
    assert text.splitlines()[-1].startswith("execution: stacked (")
    assert "predicted activations kept for backward" in text
    states = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[2:-3]}
    assert states["conv1"] == 1
    assert states["fc"] == len({gkt.config.seed, *map(str, gkt.sample(3)), "3-3-3"}) - 1


@pytest.mark.parametrize("mode", ["sequential", "lean", "shared"])
def test_float16_without_a_loss_scale_is_named_once_where_backward_runs_inside(mode, caplog):
    gkt = GKT(cifar_resnet(8, width=4, num_classes=3), GKTConfig(groups=1, execution=mode))
    batch = torch.randn(4, 3, 8, 8), torch.randint(3, (4,))
    with caplog.at_level("WARNING", "gkt_fast"), torch.autocast("cpu", torch.float16):
        gkt(*batch, loss_scale=8.0)
        assert "loss scale" not in caplog.text
        for _ in range(2):
            gkt(*batch)
    assert caplog.text.count("without a loss scale") == (mode != "shared")
