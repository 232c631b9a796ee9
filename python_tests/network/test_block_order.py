"""Models that decide by themselves which blocks run are refused, with what was found and how to name stages by hand."""

from __future__ import annotations

import random

import pytest
from helpers.reference_step import MODES, one_thread  # noqa: F401
from helpers.small_nets import Net, batch
from torch import nn

from gkt_fast import GKT, GKTConfig
from gkt_fast.execution import EXECUTION_MODES, StackingError

NAME_BY_HAND = r"The blocks found are 'blocks\.0', 'blocks\.1', 'blocks\.2', 'blocks\.3'\. .*stages=\[\["
FIXED = GKTConfig(groups=1, sampler="fixed", subnets=((2,),))


class OwnStochasticDepth(Net):
    """Skips blocks in training, by Python's generator."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if self.training and random.random() < 0.5:
                continue
            x = block(x)
        return self.head(x.mean((2, 3)))


class DependsOnData(Net):
    """The last block runs where the activation that comes to it is large."""

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if i < 3 or x.abs().mean() > self.bound:
                x = block(x)
        return self.head(x.mean((2, 3)))

    bound = 0.0


class UnusedBranch(Net):
    """Two of its blocks stand in a branch that never runs."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks[:2]:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_own_stochastic_depth(mode):
    inputs, targets = batch()
    random.seed(1)  # the first and the last block are skipped
    with pytest.raises((ValueError, RuntimeError), match=NAME_BY_HAND):
        GKT(OwnStochasticDepth(), FIXED.replace(execution=mode))(*inputs, targets)


def test_own_stochastic_depth_says_which_block_is_skipped():
    inputs, targets = batch()
    random.seed(1)
    with pytest.raises(
        ValueError, match=r"called 2 of its 4 blocks, but not 'blocks\.0', 'blocks\.3': it skips blocks by"
    ):
        GKT(OwnStochasticDepth(), FIXED.replace(execution="shared"))(*inputs, targets)


@pytest.mark.parametrize("mode", ["auto", "sequential", "shared"])
def test_blocks_that_depend_on_the_data(mode):
    """A dropped block changes what the condition sees."""
    inputs, targets = batch()
    model = DependsOnData()
    sizes = {}
    model.blocks[2].register_forward_hook(lambda module, args, output: sizes.update(full=output.abs().mean()))
    model.blocks[1].register_forward_hook(
        lambda module, args, output: sizes.update(subnet=output.abs().mean())
    )
    model(*inputs)
    model.bound = (sizes["full"] + sizes["subnet"]) / 2
    assert sizes["subnet"] < model.bound < sizes["full"]
    message = r"called the blocks 'blocks\.0', 'blocks\.1', 'blocks\.2' for a subnet and .* 'blocks\.3' for the full "
    with pytest.raises(ValueError, match=message + "network.*" + NAME_BY_HAND):
        GKT(model, FIXED.replace(execution=mode))(*inputs, targets)


def test_stacked_does_not_let_a_model_decide_by_several_states_at_once():
    inputs, targets = batch()
    with pytest.raises(StackingError, match=r"reads a value of a tensor \(__bool__\)"):
        GKT(DependsOnData(), FIXED.replace(execution="stacked"))(*inputs, targets)


@pytest.mark.parametrize("mode", ["auto", *EXECUTION_MODES])
def test_blocks_in_a_branch_that_does_not_run(mode):
    inputs, targets = batch()
    with pytest.raises(ValueError, match=r"but not 'blocks\.2', 'blocks\.3'.*" + NAME_BY_HAND):
        GKT(UnusedBranch(), FIXED.replace(execution=mode))(*inputs, targets)
    named = GKT(
        UnusedBranch(), FIXED.replace(execution=mode, subnets=((1,),)), stages=[["blocks.0", "blocks.1"]]
    )
    named(*inputs, targets).loss.backward()


def test_a_block_whose_forward_cannot_be_traced_is_named_with_the_reason():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.layer(x) if x.sum() > 0 else x

    model = nn.Sequential(nn.Sequential(Untraceable(), Untraceable()), nn.Linear(4, 2))
    reason = r"their forward can't be traced: its control flow depends on its input"
    with pytest.raises(ValueError, match=rf"0: 2 x Untraceable \({reason}\).*stages=\[\["):
        GKT(model)


def test_a_block_with_stochastic_depth_of_its_own_is_found_whatever_it_draws():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            if self.training and random.random() < 0.5:
                return x
            return x + self.layer(x)

    model = nn.Sequential(nn.Sequential(*(Block() for _ in range(20))), nn.Linear(4, 2))
    (stage,) = GKT(model).stages
    assert all(stage.droppable) and stage.depth == 20
