"""Running statistics where streams share layers: momentum, frozen layers, recomputation, failed steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import (
    MODES,
    ONE_BY_ONE,
    POLICIES,
    assert_modes_agree,
    assert_same,
    one_thread,  # noqa: F401
    outcome_of,
    package_step,
    random_drops,
    reference_step,
)
from helpers.small_nets import CLASSES, CONFIG, SOME, STAGES, Block, Net, batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gkt_fast import GKT, GKTConfig
from gkt_fast.batch_norm.statistics import tracking_layers
from gkt_fast.models import CifarResNet
from gkt_fast.network.discovery import find_stages


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
    streams = 3 * (config.streams if policy == "all_streams" else 1)
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
    expected = assert_modes_agree(
        model, (images,), targets, dropped, CONFIG.replace(batch_norm=policy), ONE_BY_ONE
    )
    assert torch.equal(expected.buffers["bn1.running_mean"], before)


class InstanceNormBlock(Block):
    def __init__(self):
        super().__init__()
        self.bn = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_instance_norm_with_running_statistics(policy):
    inputs, targets = batch()
    config = CONFIG.replace(batch_norm=policy)
    assert_modes_agree(Net(InstanceNormBlock), inputs, targets, SOME, config, ONE_BY_ONE)


@pytest.mark.parametrize("policy", POLICIES)
def test_sync_batch_norm(policy):
    """In one process: with several, its forward needs GPUs."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(CifarResNet((2, 2, 2), CLASSES, width=4).double())
    assert len(tracking_layers(model)) == sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 13
    images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (4,))
    dropped = random_drops(find_stages(model), CONFIG.streams, seed=0)
    assert_modes_agree(model, (images,), targets, dropped, CONFIG.replace(batch_norm=policy))


class CheckpointedBlock(Block):
    reentrant = False

    def forward(self, x):
        return x + checkpoint(self.branch, x, use_reentrant=self.reentrant)

    def branch(self, x):
        return F.gelu(self.bn(self.conv(x)))


class ReentrantBlock(CheckpointedBlock):
    reentrant = True


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ONE_BY_ONE)
def test_activation_checkpointing_does_not_update_statistics_again(mode, policy):
    """Against the same network without checkpointing."""
    inputs, targets = batch()
    config = CONFIG.replace(batch_norm=policy)
    model = Net(CheckpointedBlock)
    plain = Net(Block)
    plain.load_state_dict(model.state_dict())
    expected = reference_step(plain, inputs, targets, SOME, config)
    actual = package_step(mode, model, inputs, targets, SOME, config, stages=STAGES)
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
    assert_same(package_step("shared", model, inputs, targets, SOME, config, stages=STAGES), expected)


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
    gkt = GKT(model, GKTConfig(groups=2, execution=mode, batch_norm="all_streams"))
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
