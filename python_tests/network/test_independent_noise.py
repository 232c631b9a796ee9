"""Dropout and stochastic depth where streams share states: noise that is shared, and noise that is drawn per stream."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import (
    MODES,
    assert_same,
    block_calls,
    count_calls,
    one_thread,  # noqa: F401
    outcome_of,
    reference_step,
)
from helpers.small_nets import CLASSES, Block, batch, drops
from torch import nn

from gkt_fast import GKT, GKTConfig
from gkt_fast.execution import StackingError
from gkt_fast.network.noise import UnexpectedNoiseError, noisy_layers

SHARING = tuple(mode for mode in MODES if mode != "sequential")
CONFIG = GKTConfig(
    groups=2, sampler="fixed", subnets=((3,), (2,)), independent_noise=True, batch_norm="all_streams"
)
DROPPED = drops([3], [2, 3])
"""The streams of `CONFIG`."""


class Noise(nn.Module):
    """Multiplies by random numbers: drawn, and put on record, or replayed."""

    def __init__(self):
        super().__init__()
        self.record, self.replay = [], []

    def forward(self, x):
        if not self.training:
            return x
        factors = self.replay.pop(0) if self.replay else torch.rand_like(x)
        self.record.append(factors)
        return x * factors


class NoisyBlock(Block):
    """Noise of a module, of a function or of Python's generator."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.noise = Noise() if kind == "module" else None
        self.rate = 0.3

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.kind == "module":
            y = self.noise(y)
        elif self.kind == "function":
            y = F.dropout(y, self.rate, self.training)
        elif self.kind == "python" and self.training:
            y = y * random.random()
        return x + y


class Net(nn.Module):
    """Stem, four blocks, dropout and a head; only some draw noise."""

    def __init__(self, *kinds, stem=0.0, head=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Dropout(stem))
        self.blocks = nn.ModuleList(map(NoisyBlock, kinds))
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(head)
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.norm(x.mean((2, 3)))))


QUIET = ("none",) * 4
NETS = {
    "module": lambda: Net("none", "module", "module", "none", head=0.2),
    "function": lambda: Net("none", "none", "function", "function"),
    "python": lambda: Net("python", "none", "python", "none"),
    "head": lambda: Net(*QUIET, head=0.5),
    "stem": lambda: Net(*QUIET, stem=0.5),
    "everywhere": lambda: Net(*["function"] * 4, stem=0.1, head=0.1),
}


def seed():
    torch.manual_seed(5)
    random.seed(5)


def gkt_outcome(gkt, inputs, targets):
    output = gkt(*inputs, targets, step=0)
    output.loss.backward()
    terms = torch.cat([output.ce.reshape(1), output.kd])
    return outcome_of(gkt.model, inputs, output.loss, terms, output.logits)


@pytest.mark.parametrize("mode", ["sequential", "shared", "lean"])
@pytest.mark.parametrize("net", NETS)
def test_a_seeded_step_draws_what_the_plain_loop_draws(net, mode):
    """Each stream draws in the order in which it runs alone, and only layers before all noise are shared."""
    inputs, targets = batch()
    model = NETS[net]()
    gkt = GKT(copy.deepcopy(model), CONFIG.replace(execution=mode))
    gkt.layers(*inputs)
    seed()
    expected = reference_step(model, inputs, targets, DROPPED, CONFIG)
    seed()
    assert_same(gkt_outcome(gkt, inputs, targets), expected)


def test_a_stacked_step_equals_the_plain_loop_with_the_same_noise():
    inputs, targets = batch()
    model = Net("none", "module", "module", "module", head=0.0)
    gkt = GKT(copy.deepcopy(model), CONFIG.replace(execution="stacked"))
    gkt.layers(*inputs)
    for block in gkt.model.blocks[1:]:
        block.noise.record.clear()
    actual = gkt_outcome(gkt, inputs, targets)
    for block, mine, streams in zip(model.blocks[1:], gkt.model.blocks[1:], (3, 2, 1), strict=True):
        (factors,) = mine.noise.record
        block.noise.replay = list(factors.chunk(streams))
        assert len(factors) == streams * len(targets)
    assert_same(actual, reference_step(model, inputs, targets, DROPPED, CONFIG), 1e-11)
    assert not any(block.noise.replay for block in model.blocks[1:])


@pytest.mark.parametrize("mode", SHARING)
@pytest.mark.parametrize("net", ["module", "function", "head"])
@pytest.mark.parametrize("independent", [False, True])
def test_equal_subnets_differ_by_their_noise_alone(net, mode, independent):
    inputs, targets = batch()
    full = GKTConfig(
        groups=1, sampler="fixed", subnets=((4,),), execution=mode, independent_noise=independent
    )
    kd = GKT(NETS[net](), full)(*inputs, targets).kd
    assert kd > 1e-4 if independent else kd.abs() < 1e-12


@pytest.mark.parametrize("mode", ["shared", "lean"])
def test_states_are_shared_up_to_the_first_noise(mode):
    inputs, targets = batch()
    gkt = GKT(NETS["function"](), CONFIG.replace(execution=mode))
    gkt.layers(*inputs)
    paths = ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "dropout", "head"]
    with count_calls(gkt.model, paths) as calls:
        gkt(*inputs, targets)
    assert list(calls.values()) == [1, 1, 1, 2, 1, 3, 3, 3]
    quiet = GKT(Net(*QUIET), CONFIG.replace(execution=mode))
    quiet.layers(*inputs)
    with count_calls(quiet.model, paths) as calls:
        quiet(*inputs, targets)
    assert {p: n for p, n in calls.items() if p.startswith("blocks")} == block_calls(quiet.stages, DROPPED)


def test_costs_count_what_is_not_shared():
    (images,), _ = batch()
    nested = GKTConfig(groups=2)
    costs = {}
    for net in ("quiet", "head", "stem"):
        gkt = GKT(
            Net(*QUIET) if net == "quiet" else NETS[net](), nested.replace(independent_noise=net != "quiet")
        )
        cost = gkt.cost(gkt.sample(0), images)
        costs[net] = cost.shared_ratio
        assert gkt.expected_cost() >= 1.0
    assert costs["quiet"] < costs["head"] < costs["stem"] == pytest.approx(cost.sequential_ratio)
    with pytest.raises(ValueError, match="the least possible for this model"):
        gkt = GKT(NETS["stem"](), nested.replace(independent_noise=True, budget=1.5))
        gkt.layers(images)
        gkt.sample(0)


def test_stacked_refuses_noise_before_the_first_block_and_auto_shares():
    inputs, targets = batch()
    with pytest.raises(StackingError, match=r"layer 'stem' draws random numbers before the first block"):
        GKT(NETS["stem"](), CONFIG.replace(execution="stacked"))(*inputs, targets)
    gkt = GKT(NETS["stem"](), CONFIG)
    gkt(*inputs, targets).loss.backward()
    assert "execution: shared" in gkt.explain()


@pytest.mark.parametrize("mode", MODES)
def test_shared_noise_is_told_once(mode, caplog):
    inputs, targets = batch()

    def messages(model, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="gkt_fast"):
            gkt = GKT(model, GKTConfig(groups=1, execution=mode, **options))
            for _ in range(2):
                gkt(*inputs, targets)
        return [record.getMessage() for record in caplog.records]

    expected = 0 if mode == "sequential" else 1
    told = messages(NETS["function"]())
    assert len(told) == expected and all("independent_noise=True" in message for message in told)
    assert messages(Net(*QUIET)) == []
    assert messages(NETS["function"]().eval()) == []
    assert messages(NETS["function"](), independent_noise=True) == []


@pytest.mark.parametrize("mode", SHARING)
def test_noise_that_begins_later_is_an_error(mode):
    inputs, targets = batch()
    model = NETS["function"]()
    for block in model.blocks:
        block.rate = 0.0
    gkt = GKT(model, CONFIG.replace(execution=mode))
    gkt(*inputs, targets)
    model.blocks[2].rate = 0.5
    with pytest.raises(
        UnexpectedNoiseError, match=r"layer 'blocks\.2' drew random numbers, which it did not"
    ):
        gkt(*inputs, targets)


def test_noise_is_looked_for_again_when_a_layer_changes_its_mode():
    inputs, targets = batch()
    equal = CONFIG.replace(subnets=((4,), (4,)), execution="shared")
    gkt = GKT(NETS["head"](), equal)
    for training, streams in ((True, 3), (False, 1), (True, 3)):
        gkt.model.dropout.train(training)
        gkt.layers(*inputs)
        with count_calls(gkt.model, ["norm", "dropout"]) as calls:
            gkt(*inputs, targets)
        assert calls == {"norm": 1, "dropout": streams}
        assert ("noise of its own in dropout" in gkt.explain()) == training


def test_looking_for_noise_leaves_everything_as_it_was():
    (images,), _ = batch()
    model = NETS["everywhere"]()
    model.blocks[1].bn.eval()
    gkt = GKT(model, CONFIG)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    found = noisy_layers(model, gkt.network.sites, (images[:1],))
    assert found == {"stem", *(f"blocks.{i}" for i in range(4)), "dropout"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert noisy_layers(model.eval(), gkt.network.sites, (images[:1],)) == found and not model.training
