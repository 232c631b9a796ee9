"""What goes wrong where streams share activations: each trap of shared execution, against the plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference_step import (
    MODES,
    POLICIES,
    Skip,
    assert_modes_agree,
    assert_same,
    block_calls,
    count_calls,
    one_thread,  # noqa: F401
    outcome_of,
    package_step,
    random_drops,
    reference_step,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from gkt_fast import GKT, GKTConfig, Stage
from gkt_fast.execution.batch_norm import tracking_layers
from gkt_fast.execution.states import SharedStateError
from gkt_fast.models import CifarResNet
from gkt_fast.models.discovery import find_stages

CLASSES = 4
CONFIG = GKTConfig(groups=2, loops=2)


class Block(nn.Module):
    """x + f(x) on (B, C, H, W)."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + F.gelu(self.bn(self.conv(x)))


class Net(nn.Module):
    """Stem, blocks in a list, head."""

    def __init__(self, make_block=Block, depth=4, channels=6):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self.head = nn.Linear(channels, CLASSES)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def batch(size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)
    return (images,), torch.randint(CLASSES, (size,), generator=generator)


def drops(*streams, path="blocks.{}"):
    """The full network, then streams that drop the blocks of the given numbers."""
    return [frozenset(), *(frozenset(path.format(i) for i in stream) for stream in streams)]


SOME = drops([0], [0, 2], [3], [1, 3])


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
    stages = [Stage(tuple(f"blocks.{i}" for i in range(4)), (True,) * 4)]
    inputs, targets = batch()
    assert_modes_agree(model, inputs, targets, SOME, CONFIG, stages=stages)


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
    """Against the same network with that module out of place: with a block dropped it would meet its own output."""
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
    assert_modes_agree(model, inputs, targets, dropped, CONFIG)


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


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("policy", POLICIES)
def test_momentum_and_number_of_batches(policy, momentum):
    model = CifarResNet((2, 2, 2), CLASSES, width=4).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    config = CONFIG.replace(batch_norm=policy)
    expected_model = copy.deepcopy(model)
    stages = find_stages(model)
    for step in range(3):
        images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (4,))
        dropped = random_drops(stages, config.streams, seed=step)
        for mode in MODES:
            actual = package_step(mode, copy.deepcopy(model), (images,), targets, dropped, config)
            assert_same(
                actual, reference_step(copy.deepcopy(expected_model), (images,), targets, dropped, config)
            )
        package_step("shared", model, (images,), targets, dropped, config)
        reference_step(expected_model, (images,), targets, dropped, config)
    streams = 3 * (config.streams if policy == "sequential" else 1)
    assert model.bn1.num_batches_tracked == streams
    assert model.bn1.momentum == momentum


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tracking", [True, False])
def test_frozen_batch_norm_inside_a_training_model(policy, tracking):
    model = CifarResNet((2, 2, 2), CLASSES, width=4).double()
    model(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    for module in (model.bn1, model.layer1[1].bn1, model.layer2[0].bn2):
        module.eval().requires_grad_(False)
    model.layer3[1].bn1 = nn.BatchNorm2d(16, track_running_stats=tracking).double()
    before = model.bn1.running_mean.clone()
    images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (4,))
    dropped = random_drops(find_stages(model), CONFIG.streams, seed=0)
    expected = assert_modes_agree(model, (images,), targets, dropped, CONFIG.replace(batch_norm=policy))
    assert torch.equal(expected.buffers["bn1.running_mean"], before)


class InstanceNormBlock(Block):
    def __init__(self):
        super().__init__()
        self.bn = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_instance_norm_with_running_statistics(policy):
    inputs, targets = batch()
    config = CONFIG.replace(batch_norm=policy)
    assert_modes_agree(Net(InstanceNormBlock), inputs, targets, SOME, config)


def test_sync_batch_norm_counts_as_batch_norm():
    """Its forward needs a GPU in training, so here only that its statistics are looked after."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(CifarResNet((2, 2, 2), CLASSES, width=4))
    assert len(tracking_layers(model)) == sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 13


class CheckpointedBlock(Block):
    reentrant = False

    def forward(self, x):
        return x + checkpoint(self.branch, x, use_reentrant=self.reentrant)

    def branch(self, x):
        return F.gelu(self.bn(self.conv(x)))


class ReentrantBlock(CheckpointedBlock):
    reentrant = True


def checkpointed_stages():
    return [Stage(tuple(f"blocks.{i}" for i in range(4)), (True,) * 4)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_does_not_update_statistics_again(mode, policy):
    """Against the same network without checkpointing."""
    inputs, targets = batch()
    config = CONFIG.replace(batch_norm=policy)
    model = Net(CheckpointedBlock)
    plain = Net(Block)
    plain.load_state_dict(model.state_dict())
    expected = reference_step(plain, inputs, targets, SOME, config)
    actual = package_step(mode, model, inputs, targets, SOME, config, stages=checkpointed_stages())
    assert_same(actual, expected)
    with torch.no_grad():
        before = model.blocks[0].bn.num_batches_tracked.clone()
        model(*inputs)
    assert model.blocks[0].bn.num_batches_tracked == before + 1


@pytest.mark.parametrize("policy", POLICIES)
def test_reentrant_checkpointing_in_shared_execution(policy):
    inputs, targets = batch()
    config = CONFIG.replace(batch_norm=policy)
    model = Net(ReentrantBlock)
    plain = Net(Block)
    plain.load_state_dict(model.state_dict())
    expected = reference_step(plain, inputs, targets, SOME, config)
    assert_same(
        package_step("shared", model, inputs, targets, SOME, config, stages=checkpointed_stages()), expected
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_backward_that_fails_leaves_batch_norm_in_order(mode):
    """An out-of-memory error in backward is often caught, and the step tried again."""
    inputs, targets = batch()
    model = Net()
    expected_model = copy.deepcopy(model)
    fails = True

    def hook(gradient):
        if fails:
            raise RuntimeError("out of memory")

    model.head.weight.register_hook(hook)
    gkt = GKT(model, GKTConfig(groups=2, execution=mode))
    with pytest.raises(RuntimeError, match="out of memory"):
        gkt(*inputs, targets, step=0).loss.backward()
    fails = False
    model.zero_grad()
    out = gkt(*inputs, targets, step=0)
    out.loss.backward()
    dropped = [frozenset(), *(subnet.dropped(gkt.stages) for subnet in out.subnets)]
    reference_step(expected_model, inputs, targets, dropped, gkt.config)
    expected_model.zero_grad()
    expected = reference_step(expected_model, inputs, targets, dropped, gkt.config)
    terms = torch.cat([out.ce.reshape(1), out.kd])
    assert_same(outcome_of(model, inputs, out.loss, terms, out.logits), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_fails_leaves_the_model_in_order(mode):
    inputs, targets = batch()
    model = Net()
    gkt = GKT(model, GKTConfig(groups=2, execution=mode, batch_norm="sequential"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modules = dict(model.named_modules())
    with pytest.raises(RuntimeError):
        gkt(inputs[0][:, :2], targets)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in modules.items()
    }
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert all(not module._forward_hooks for module in model.modules())
    gkt(*inputs, targets).loss.backward()


class PairBlock(Block):
    """Takes and returns (x, attention)."""

    def forward(self, x, attention):
        y = F.gelu(self.bn(self.conv(x))) * attention
        return x + y, attention + y.mean()


class PairNet(Net):
    def forward(self, x):
        x, attention = self.stem(x), x.mean()
        for block in self.blocks:
            x, attention = block(x, attention)
        return self.head(x.mean((2, 3))) * attention


class SkipPair(nn.Module):
    def forward(self, x, attention):
        return x, attention


def test_blocks_that_take_and_return_two_values():
    inputs, targets = batch()
    assert_modes_agree(PairNet(PairBlock), inputs, targets, SOME, CONFIG, skip=SkipPair)


class TupleBlock(Block):
    """Returns (x,), as Hugging Face's blocks do."""

    def forward(self, x, mask=None, *, scale=1.0):
        return (x + scale * F.gelu(self.bn(self.conv(x))) * mask,)


class TupleNet(Net):
    def forward(self, x, mask):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask, scale=0.5)[0]
        return {"logits": self.head(x.mean((2, 3)))}


class LogitsOnly(nn.Module):
    """What the plain loop needs: the logits themselves."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)["logits"]


class SkipTuple(nn.Module):
    def forward(self, x, mask, scale):
        return (x,)


def test_blocks_that_return_a_tuple_of_one_and_take_more_arguments():
    (images,), targets = batch()
    mask = (torch.rand(5, 1, 6, 6, dtype=torch.float64) > 0.3).double()
    wrapped = LogitsOnly(TupleNet(TupleBlock))
    dropped = [frozenset(f"model.{path}" for path in stream) for stream in SOME]
    expected = reference_step(
        copy.deepcopy(wrapped), (images, mask), targets, dropped, CONFIG, skip=SkipTuple
    )
    expected.gradients = {name.removeprefix("model."): g for name, g in expected.gradients.items()}
    expected.buffers = {name.removeprefix("model."): b for name, b in expected.buffers.items()}
    for mode in MODES:
        actual = package_step(mode, copy.deepcopy(wrapped.model), (images, mask), targets, SOME, CONFIG)
        assert_same(actual, expected)


class TupleInBlock(Block):
    """Takes one tuple, writes into its first entry, returns the tuple."""

    def forward(self, pair):
        x, scale = pair
        x += scale * self.bn(self.conv(x.clone()))
        return x, scale


class TupleInNet(Net):
    def forward(self, x):
        pair = (self.stem(x), x.std())
        for block in self.blocks:
            pair = block(pair)
        return self.head(pair[0].mean((2, 3)))


def test_block_that_writes_into_a_tensor_of_a_tuple():
    inputs, targets = batch()
    assert_modes_agree(TupleInNet(TupleInBlock), inputs, targets, SOME, CONFIG, stages=checkpointed_stages())


class ThreeFromOne(Block):
    def forward(self, x):
        y = x + self.bn(self.conv(x))
        return y, y.mean(), y.std()


class ThreeFromOneNet(Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)[0]
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("mode", MODES)
def test_block_that_returns_more_than_it_takes_is_a_clear_error(mode):
    inputs, targets = batch()
    with pytest.raises(ValueError, match=r"block 'blocks\.0' takes 1 values and returns 3"):
        package_step(mode, ThreeFromOneNet(ThreeFromOne), inputs, targets, SOME, CONFIG)


@pytest.mark.parametrize("mode", MODES)
def test_keyword_activations(mode):
    class KeywordNet(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x=x)
            return self.head(x.mean((2, 3)))

    inputs, targets = batch()
    assert_modes_agree(KeywordNet(), inputs, targets, SOME, CONFIG, [mode])


def test_channels_last_is_kept():
    torch.manual_seed(0)
    model = CifarResNet((2, 2, 2), CLASSES, width=4).double().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (4,))
    dropped = random_drops(find_stages(model), CONFIG.streams, seed=0)
    assert_modes_agree(model, (images,), targets, dropped, CONFIG)
    layouts = []

    def hook(module, args, output):
        layouts.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], output))

    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.register_forward_hook(hook)
    package_step("shared", model, (images,), targets, dropped, CONFIG)
    assert layouts and all(layouts)


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
    """Two equal subnets, and a subnet equal to the full net, see one draw; one by one they see different ones."""
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


def test_skip_helper_passes_through():
    x = torch.ones(2)
    assert Skip()(x, "more", mask=None) is x
