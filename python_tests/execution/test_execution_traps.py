"""What goes wrong where streams share activations: each trap of shared execution, against the plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import (
    MODES,
    ONE_BY_ONE,
    POLICIES,
    assert_modes_agree,
    assert_same,
    block_calls,
    count_calls,
    one_thread,  # noqa: F401
    package_step,
    reference_step,
)
from helpers.small_nets import CLASSES, CONFIG, SOME, STAGES, Block, Net, batch, drops
from torch import nn

from gkt_fast import GKT, GKTConfig
from gkt_fast.network.calls import SharedStateError
from gkt_fast.network.discovery import find_stages


class ReluWritesInput(Block):
    def forward(self, x):
        y = F.relu_(x)
        return y + self.bn(self.conv(y))


class AddWritesInput(Block):
    def forward(self, x):
        y = self.bn(self.conv(x.clone()))
        x += y
        return x


@pytest.mark.parametrize("block", [ReluWritesInput, AddWritesInput])
def test_block_that_writes_into_its_input(block):
    """Dropped first, kept later: the stream that skips the writer must see what the writer saw."""
    model = Net(lambda: block())
    inputs, targets = batch()
    assert_modes_agree(model, inputs, targets, SOME, CONFIG, stages=STAGES)


@pytest.mark.parametrize("block", [ReluWritesInput, AddWritesInput])
def test_block_that_writes_into_its_input_over_several_steps(block):
    """What the first step learns about the blocks holds in the next ones."""
    models = {mode: Net(lambda: block()) for mode in MODES}
    for mode, model in models.items():
        gkt = GKT(model, GKTConfig(groups=3, execution=mode, sampler="stochastic_depth"), stages=["blocks"])
        for step in range(4):
            inputs, targets = batch(seed=step)
            gkt(*inputs, targets, step=step).loss.backward()
    for (name, actual), expected in zip(
        models["shared"].named_parameters(), models["sequential"].parameters(), strict=True
    ):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-13, msg=name)


class BeginsToWrite(Block):
    writes = False

    def forward(self, x):
        if self.writes:
            x = x.mul_(2.0)
        return x + self.bn(self.conv(x))


def test_block_that_begins_to_write_into_its_input_later_is_an_error():
    model = Net(BeginsToWrite)
    gkt = GKT(model, GKTConfig(execution="shared", min_depth=0))
    inputs, targets = batch()
    gkt(*inputs, targets)
    model.blocks[2].writes = True
    with pytest.raises(SharedStateError, match=r"block 'blocks\.2' wrote into its input.*'sequential'"):
        gkt(*inputs, targets)


class InPlaceBetweenBlocks(Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x += 1.0
        return self.head(x.mean((2, 3)))


class InPlaceBeforeBlocks(Net):
    def forward(self, x):
        x = self.stem(x)
        x += 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class InPlaceAfterHead(Net):
    def forward(self, x):
        return super().forward(x).mul_(2.0)


@pytest.mark.parametrize("net", [InPlaceBetweenBlocks, InPlaceBeforeBlocks, InPlaceAfterHead])
def test_in_place_operation_outside_the_blocks_is_a_clear_error(net):
    inputs, targets = batch()
    dropped = drops([0], [0], [1], [])
    with pytest.raises(SharedStateError, match=r"changed an activation in place.*'sequential'"):
        package_step("shared", net(), inputs, targets, dropped, CONFIG)
    assert_modes_agree(net(), inputs, targets, dropped, CONFIG, modes=["sequential"])


def test_in_place_modules_in_the_stem_are_fine():
    model = Net()
    model.stem = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Identity(), nn.ReLU(inplace=True)
    ).double()
    inputs, targets = batch()
    assert_modes_agree(model, inputs, targets, SOME, CONFIG)


class FlatStem(Net):
    """The stem's layers stand in the model itself, as torchvision's ResNets have them."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6).double()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = self.relu(block(x))
        return self.head(x.mean((2, 3)))


def test_one_in_place_module_called_between_all_blocks():
    """Against the network with that module out of place: where a block is dropped it meets its output."""
    inputs, targets = batch()
    for dropped in (SOME, drops([3], [3], [0, 1, 2, 3], [])):
        plain = FlatStem()
        plain.relu = nn.ReLU()
        expected = reference_step(plain, inputs, targets, dropped, CONFIG)
        assert_same(package_step("shared", FlatStem(), inputs, targets, dropped, CONFIG), expected)


def test_weight_tied_blocks_are_positions():
    shared = Block()
    model = Net(lambda: shared)
    inputs, targets = batch()
    for policy in POLICIES:
        assert_modes_agree(model, inputs, targets, SOME, CONFIG.replace(batch_norm=policy))
    with count_calls(model, ["blocks.0"]) as calls:
        package_step("shared", model, inputs, targets, drops([0]), CONFIG.replace(groups=1, loops=1))
    assert calls["blocks.0"] == 4 + 3


class TwoStages(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.first = first
        self.second = second
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x):
        x = F.avg_pool2d(self.first(self.stem(x)), 2)
        return self.head(self.second(x).mean((2, 3)))


def test_blocks_tied_across_stages_under_the_same_name():
    blocks = [Block(), Block()]
    model = TwoStages(nn.Sequential(*blocks), nn.Sequential(*blocks))
    stages = find_stages(model)
    assert [stage.depth for stage in stages] == [2, 2]
    inputs, targets = batch()
    dropped = [frozenset(), *map(frozenset, (["second.1"], ["second.1", "first.0"], ["second.0"], []))]
    assert_modes_agree(model, inputs, targets, dropped, CONFIG, ONE_BY_ONE)


def test_a_container_that_stands_in_two_places_is_an_error():
    container = nn.Sequential(Block(), Block())
    model = TwoStages(container, container)
    with pytest.raises(ValueError, match=r"second\.0.*same place"):
        GKT(model)


class Hidden(Net):
    """Calls its blocks by a list of its own."""

    def __init__(self):
        super().__init__()
        self.calls = [block.forward for block in self.blocks]

    def forward(self, x):
        x = self.stem(x)
        for call in self.calls:
            x = call(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_are_not_called_through_their_place_are_an_error(mode):
    """Otherwise they could not be dropped, and training would go on without subnets."""
    inputs, targets = batch()
    gkt = GKT(Hidden(), GKTConfig(execution=mode))
    with pytest.raises(ValueError, match=r"blocks\.0.*did not call any"):
        gkt(*inputs, targets)


def test_hooks_on_blocks_fire_once_per_state():
    model = Net()
    inputs, targets = batch()
    stages = find_stages(model)
    expected = block_calls(stages, SOME)
    forward, backward = dict.fromkeys(expected, 0), dict.fromkeys(expected, 0)
    for path in expected:
        block = model.get_submodule(path)

        def before(module, args, path=path):
            forward[path] += 1

        def after(module, grad_input, grad_output, path=path):
            backward[path] += 1

        block.register_forward_pre_hook(before)
        block.register_full_backward_hook(after)
    package_step("shared", model, inputs, targets, SOME, CONFIG)
    assert forward == backward == expected


class DropoutBlock(Block):
    def forward(self, x):
        return x + F.dropout(self.bn(self.conv(x)), 0.5, self.training)


def test_streams_share_the_noise_of_a_shared_state():
    """A subnet equal to the full net sees the same draw; one by one they see different ones."""
    inputs, targets = batch()
    config = GKTConfig(groups=1, loops=1)
    torch.manual_seed(1)
    shared = package_step("shared", Net(DropoutBlock), inputs, targets, drops([]), config)
    sequential = package_step("sequential", Net(DropoutBlock), inputs, targets, drops([]), config)
    assert shared.terms[1].abs() < 1e-12
    assert sequential.terms[1] > 1e-4


def test_random_state_does_not_depend_on_the_mode_where_there_is_no_noise():
    inputs, targets = batch()
    states = []
    for mode in MODES:
        torch.manual_seed(2)
        GKT(Net(), GKTConfig(groups=3, loops=2, execution=mode))(*inputs, targets).loss.backward()
        states.append(torch.get_rng_state())
    torch.manual_seed(2)
    Net()
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], torch.get_rng_state())
