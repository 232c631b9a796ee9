"""Looks leave no trace: every public look over awkward modules, with everything reachable compared before and after."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import one_thread  # noqa: F401
from helpers.state_of import differences, state_of
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gkt_fast import (
    GKT,
    GKTConfig,
    GKTTrainer,
    active_subnet,
    evaluate,
    evaluate_subnets,
    extract_subnet,
    recalibrate_batch_norm,
)
from gkt_fast.deployment.export import export_onnx
from gkt_fast.network.discovery import find_stages
from gkt_fast.network.look import look

CLASSES = 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class CachesInEvaluation(Block):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(8))
        self.scale = None

    def train(self, mode=True):
        if mode:
            self.scale = None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x + self.linear(x) * self.log_scale.exp()
        if self.scale is None:
            self.scale = self.log_scale.exp()
        return x + self.linear(x) * self.scale


class CachesForGood(Block):
    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = torch.ones(8)
            self.register_buffer("late", torch.ones(8))
        return x + self.linear(x) * self.table * self.late


class KeepsActivations(Block):
    def __init__(self):
        super().__init__()
        self.last, self.history, self.recent = None, [], deque(maxlen=3)
        self.nested, self.seen = {"by name": {"outputs": []}}, set()

    def forward(self, x):
        y = x + self.linear(x)
        self.last = y
        self.history.append(y)
        self.recent.append(y)
        self.nested["by name"]["outputs"].append(y)
        self.seen.add(len(self.history))
        return y


class Meter:
    def __init__(self):
        self.calls, self.values = 0, []


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.calls, self.plain, self.meter, self.slotted = 0, torch.zeros(8), Meter(), Slotted()
        self.counter = Counter()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        self.plain += 1
        self.steps += 1
        self.meter.calls += 1
        self.meter.values.append(self.calls)
        self.slotted.calls += 1
        self.counter["forward"] += 1
        return x + self.linear(x)


class Draws(Block):
    def forward(self, x):
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return x + F.dropout(self.linear(x), 0.1, self.training) * noise


class Merges(Block):
    """A low-rank adapter, merged into the weight for evaluation."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.merged, self.kept_weight = False, None

    def train(self, mode=True):
        super().train(mode)
        if self.merged is mode:
            with torch.no_grad():
                if mode:  # from a copy, so that nothing is rounded
                    self.linear.weight.copy_(self.kept_weight)
                    self.kept_weight = None
                else:
                    self.kept_weight = self.linear.weight.clone()
                    self.linear.weight.add_(self.up @ self.down)
            self.merged = not mode
        return self

    def forward(self, x):
        y = self.linear(x)
        return x + (y if self.merged else y + x @ self.down.T @ self.up.T)


class NeverTrains(Block):
    """Keeps its BatchNorm in evaluation mode, as frozen backbones do."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Spectral(Block):
    def __init__(self):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(8, 8))


class HooksAsItRuns(Block):
    def forward(self, x):
        handle = self.linear.register_forward_hook(lambda *_: None)
        y = x + self.linear(x)
        if self.training:
            handle.remove()
        return y


STORE: dict[str, torch.Tensor] = {}
CALLS = 0


def keep_globally(module, args, output):
    global CALLS
    CALLS += 1
    STORE["output"] = output


class Hooked(Block):
    def __init__(self):
        super().__init__()
        outputs, calls = [], 0

        def keep(module, args, output):
            nonlocal calls
            calls += 1
            outputs.append(output)

        self.linear.register_forward_hook(keep)
        self.register_forward_hook(keep_globally)


BLOCKS = [
    Block,
    CachesInEvaluation,
    CachesForGood,
    KeepsActivations,
    Counts,
    Draws,
    Merges,
    NeverTrains,
    Spectral,
    HooksAsItRuns,
    Hooked,
]
ORDINARY_HOOKS = [block for block in BLOCKS if block is not Hooked]
"""What runs as the user's own evaluation may be seen by the user's hooks."""


def net(block, training=True, frozen=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*[block() for _ in range(3)]), nn.Linear(8, CLASSES))
    model.train(training)
    if frozen:
        model[1][1].norm.eval()
    return model


def batch(rows=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def planned(model):
    gkt = GKT(model)
    gkt.layers(batch()[0])
    gkt.explain()
    gkt.cost(gkt.sample(0))


PLANNING = {
    "GKT": lambda model: GKT(model),
    "find_stages": find_stages,
    "stages by hand": lambda model: GKT(model, stages=["1"]),
    "layers, explain, cost": planned,
    "independent noise": lambda model: GKT(model, GKTConfig(independent_noise=True)).layers(batch()[0]),
    "budget": lambda model: GKT(model, GKTConfig(budget=1.5)).cost([], batch()[0]),
    "extract_subnet": lambda model: extract_subnet(model, (1,)),
}
RUNNING = {
    "evaluate": lambda model: evaluate(model, [batch()]),
    "evaluate a subnet": lambda model: evaluate(model, [batch()], (2,), calibration_loader=[batch()]),
    "evaluate_subnets": lambda model: evaluate_subnets(model, [batch()], subnets=[(3,), (1,)]),
}


def assert_no_trace(model, function):
    before = state_of(model)
    function(model)
    assert differences(before, state_of(model)) == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", PLANNING)
def test_planning_leaves_no_trace(name, block, training):
    assert_no_trace(net(block, training), PLANNING[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", ORDINARY_HOOKS)
@pytest.mark.parametrize("name", RUNNING)
def test_evaluation_leaves_no_trace(name, block, training):
    assert_no_trace(net(block, training), RUNNING[name])


@pytest.mark.parametrize("execution", ["auto", "shared", "lean", "stacked"])
@pytest.mark.parametrize("block", [Block, KeepsActivations, Counts, Draws, Merges, Spectral, Hooked])
def test_the_first_step_leaves_what_the_second_does(block, execution):
    """Planning and verification come with the first step. What each step adds by itself is the same."""
    torch.manual_seed(0)
    added = []
    model = net(block)
    gkt = GKT(model, GKTConfig(groups=1, sampler="fixed", subnets=((2,),), execution=execution))
    for _ in range(2):
        before = random.getstate(), len(getattr(model[1][0], "history", ())), getattr(model[1][0], "calls", 0)
        modes = [module.training for module in model.modules()]
        calls = CALLS
        gkt(*batch())
        assert [module.training for module in model.modules()] == modes
        first = model[1][0]
        added.append(
            (
                len(getattr(first, "history", ())) - before[1],
                getattr(first, "calls", 0) - before[2],
                CALLS - calls,
            )
        )
    assert added[0] == added[1]


def test_the_comparison_sees_what_a_forward_leaves():
    """Every awkward block but the plain one in evaluation mode leaves traces when it just runs."""
    for block in BLOCKS[1:]:
        if block is NeverTrains:
            continue
        model = net(block)
        before = state_of(model)
        model.eval()(batch()[0])
        model(batch()[0])
        model.train()
        model(batch()[0])
        assert differences(before, state_of(model)), block


def test_statistics_are_recalibrated_and_nothing_else_changes():
    for block in ORDINARY_HOOKS:
        model = net(block)
        before = state_of(model)
        recalibrate_batch_norm(model, [batch()], depths=(2,))
        changed = differences(before, state_of(model))
        assert all("running_" in path or "num_batches_tracked" in path for path in changed), block
        assert changed or block is not Block


def test_export_leaves_no_trace(tmp_path):
    pytest.importorskip("onnxruntime")
    for block in (CachesInEvaluation, Merges, Counts):
        assert_no_trace(net(block), lambda model: export_or_refuse(model, tmp_path / "net.onnx"))


def export_or_refuse(model, path):
    try:
        export_onnx(model, path, inputs=batch()[0])
    except RuntimeError as error:  # counters can't be exported; the model must be as it was all the same
        assert "can't export" in str(error)


def test_a_look_that_fails_leaves_no_trace():
    model = net(KeepsActivations)
    before = state_of(model)
    with pytest.raises(RuntimeError), look(model, training=True, gradients=True):
        model(batch()[0])
        model(torch.ones(2, 3))
    assert differences(before, state_of(model)) == []


def test_objects_that_threads_share_are_left_alone():
    import threading

    class Shared:
        def __init__(self):
            self.lock, self.values = threading.Lock(), []

    model = net(Block)
    model.shared = Shared()
    with look(model):
        model.shared.values.append(1)
    assert model.shared.values == [1]


# --- the user's own modes ---


def test_adapters_that_merge_for_evaluation_are_trained():
    for execution in ("auto", "shared", "stacked", "lean", "sequential"):
        model = net(Merges, frozen=False)
        GKT(model, GKTConfig(execution=execution))(*batch()).loss.backward()
        assert not model[1][0].merged and model[1][0].down.grad is not None


def test_frozen_batch_norm_stays_frozen_in_the_trainer():
    model = net(Block)
    norm, other = model[1][1].norm, model[1][0].norm
    before, others = norm.running_mean.clone(), other.running_mean.clone()
    trainer = GKTTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
    trainer.step(*batch())
    trainer.evaluate([batch()])
    trainer.step(*batch())
    model.eval()  # as for a validation of one's own
    trainer.step(*batch())
    assert torch.equal(norm.running_mean, before) and not norm.training
    assert not torch.equal(other.running_mean, others) and other.training and model.training


def test_a_model_in_evaluation_mode_is_put_into_training_mode_by_the_trainer():
    model = net(Block, training=False, frozen=False)
    GKTTrainer(model, torch.optim.SGD(model.parameters(), 0.1)).step(*batch())
    assert all(module.training for module in model.modules())


# --- inference mode ---


def test_evaluation_and_validation_loss_in_inference_mode():
    model = net(Block)
    expected = evaluate(model, [batch()], (2,))
    gkt = GKT(copy.deepcopy(model)).eval()
    loss = gkt(*batch(), step=3).loss
    with torch.inference_mode():
        assert evaluate(model, [batch()], (2,)) == expected
        assert torch.equal(gkt(*batch(), step=3).loss, loss)
        with active_subnet(model, (1,)):
            model(batch()[0])
        assert torch.is_inference_mode_enabled()


class TwoHalves(nn.Module):
    """Reads the output of the first half again after the second: can be neither stacked nor cut."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*[Block() for _ in range(2)])
        self.second = nn.Sequential(*[Block() for _ in range(2)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.first(x)
        return self.head(x + self.second(x * 0.5))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_a_plan_does_not_depend_on_the_gradient_mode(context):
    x, y = torch.randn(6, 8), torch.randint(CLASSES, (6,))
    gkts = [GKT(TwoHalves()) for _ in range(2)]
    with context():
        gkts[0].eval()(x, y)
    for gkt in gkts:
        gkt.train()(x, y, step=3).loss.backward()
    assert gkts[0].layers() == gkts[1].layers()
    assert any(layer.reads_back_gradient for layer in gkts[0].layers())


# --- lazy modules ---


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def test_lazy_modules_are_refused_until_they_have_weights():
    model = nn.Sequential(
        nn.LazyLinear(8), nn.Sequential(*[Lazy() for _ in range(3)]), nn.LazyLinear(CLASSES)
    )
    with pytest.raises(ValueError, match=r"lazy modules that have no weights yet \('0', '1\.0\.linear'"):
        GKT(model)
    model(batch()[0])
    GKT(model)(*batch()).loss.backward()
