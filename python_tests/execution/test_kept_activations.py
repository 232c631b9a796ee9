"""Models that use an activation again after later blocks: `shared` is exact, `stacked` and `lean` refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.reference_step import (
    assert_modes_agree,
    assert_same,
    one_thread,  # noqa: F401
    outcome_of,
    package_step,
    random_drops,
    reference_step,
)
from helpers.small_nets import CLASSES, CONFIG, Block, batch
from torch import nn

from gkt_fast import GKT, GKTConfig
from gkt_fast.network.calls import SharedStateError
from gkt_fast.network.discovery import find_stages


class TwoStages(nn.Module):
    """Two stages with a module between them, BatchNorm in the head, and something kept; subclasses say what."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.ModuleList(Block() for _ in range(3))
        self.between = nn.Conv2d(6, 6, 1)
        self.second = nn.ModuleList(Block() for _ in range(3))
        self.join = nn.Sequential(nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6))
        self.auxiliary = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, CLASSES, 1))
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def run(self, blocks, x):
        for block in blocks:
            x = block(x)
        return x


class AroundAStage(TwoStages):
    """As cross-stage partial networks do."""

    def forward(self, x):
        kept = self.stem(x)
        x = self.between(self.run(self.first, kept))
        x = self.join(torch.cat([kept, self.run(self.second, x)], 1))
        return self.head(x.mean((2, 3)))


class BetweenStages(TwoStages):
    """As decoders with features of several depths do."""

    def forward(self, x):
        kept = self.between(self.run(self.first, self.stem(x)))
        x = self.join(torch.cat([kept, self.run(self.second, kept)], 1))
        return self.head(x.mean((2, 3)))


class Auxiliary(TwoStages):
    """A head on the first stage runs last; nothing but its BatchNorm shows it."""

    def forward(self, x):
        kept = self.run(self.first, self.stem(x))
        x = self.head(self.run(self.second, self.between(kept)).mean((2, 3)))
        self.auxiliary(kept)
        return x


class SideBySide(TwoStages):
    """Both stages start from the stem."""

    def forward(self, x):
        x = self.stem(x)
        x = self.join(torch.cat([self.run(self.first, x), self.run(self.second, x)], 1))
        return self.head(x.mean((2, 3)))


NETS = [AroundAStage, BetweenStages, Auxiliary, SideBySide]


@pytest.mark.parametrize("net", NETS)
def test_shared_is_exact_and_stacked_and_lean_refuse(net):
    model = net()
    inputs, targets = batch()
    config = CONFIG.replace(batch_norm="all_streams")
    dropped = random_drops(find_stages(model), config.streams, seed=0)
    modes = ("sequential", "shared")
    assert_modes_agree(model, inputs, targets, dropped, config, modes, floor=1e-14)
    for mode in ("stacked", "lean"):
        with pytest.raises(SharedStateError, match=r"reads .* again, after layers in between"):
            package_step(mode, copy.deepcopy(model), inputs, targets, dropped, config)


@pytest.mark.parametrize("net", NETS)
def test_auto_runs_shared(net):
    inputs, targets = batch()
    model = net()
    plain = copy.deepcopy(model)
    gkt = GKT(model, GKTConfig(groups=2, sampler="fixed", subnets=((3, 2), (3, 1))))
    output = gkt(*inputs, targets)
    output.loss.backward()
    assert "execution: shared (states can't be stacked" in gkt.explain()
    dropped = [frozenset(), *(subnet.dropped(gkt.stages) for subnet in output.subnets)]
    terms = torch.cat([output.ce.reshape(1), output.kd])
    actual = outcome_of(model, inputs, output.loss, terms, output.logits)
    assert_same(actual, reference_step(plain, inputs, targets, dropped, gkt.config), 1e-12, 1e-14)
