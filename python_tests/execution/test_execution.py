"""Every execution mode against a plain loop over the streams, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from helpers.reference_step import (
    MODES,
    POLICIES,
    assert_modes_agree,
    assert_same,
    block_calls,
    count_calls,
    droppable_blocks,
    one_thread,  # noqa: F401
    outcome_of,
    package_step,
    random_drops,
    reference_step,
)
from torch import nn
from torchvision.models.resnet import Bottleneck

from gkt_fast import GKT, GKTConfig, Subnet
from gkt_fast.models import CifarResNet
from gkt_fast.network.discovery import find_stages
from gkt_fast.subnets.sampling import sample_subnets

CLASSES = 5


def cifar(blocks=(2, 3, 2), width=4):
    torch.manual_seed(0)
    return CifarResNet(blocks, num_classes=CLASSES, width=width).double()


def resnet18():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=CLASSES).double()


def narrow_resnet50():
    torch.manual_seed(0)
    return torchvision.models.ResNet(
        Bottleneck, [3, 4, 6, 3], num_classes=CLASSES, width_per_group=2
    ).double()


def batch(size=4, pixels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, pixels, pixels, dtype=torch.float64, generator=generator)
    return (images,), torch.randint(CLASSES, (size,), generator=generator)


def dropped_of(model, config, step):
    stages = find_stages(model)
    return [frozenset(), *(subnet.dropped(stages) for subnet in sample_subnets(stages, config, step))]


@pytest.mark.parametrize("sampler", ["inherit_decay", "stochastic_depth", "uniform"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_cifar_resnet_equals_the_plain_loop(groups, loops, policy, sampler):
    config = GKTConfig(groups=groups, loops=loops, batch_norm=policy, sampler=sampler, min_depth=0)
    model, step = cifar(), groups + 4 * loops
    inputs, targets = batch(seed=step)
    assert_modes_agree(model, inputs, targets, dropped_of(model, config, step), config)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_masks_neither_ordered_nor_nested(seed, policy):
    config = GKTConfig(groups=2 + seed % 3, loops=1 + seed % 2, batch_norm=policy)
    model = cifar(blocks=(3, 4, 3))
    dropped = random_drops(find_stages(model), config.streams, seed)
    inputs, targets = batch(seed=seed)
    assert_modes_agree(model, inputs, targets, dropped, config)


@pytest.mark.parametrize(
    "groups, loops, sampler, policy",
    [(3, 1, "inherit_decay", "full"), (2, 2, "stochastic_depth", "all_streams")],
)
@pytest.mark.parametrize("build", [resnet18, narrow_resnet50])
def test_torchvision_resnets_equal_the_plain_loop(build, groups, loops, sampler, policy):
    model = build()
    config = GKTConfig(groups=groups, loops=loops, batch_norm=policy, sampler=sampler)
    inputs, targets = batch(pixels=64)
    dropped = dropped_of(model, config, step=1)
    assert_modes_agree(
        model, inputs, targets, dropped, config, floor=1e-12
    )  # sums of large terms that cancel


OPTIONS = [
    {"normalize_logits": True, "temperature": 2.5},
    {"temperature": 0.5, "ema": 0.9, "kd_weight": 1.7, "ce_weight": 0.3},
    {"ema": 0.0, "subnet_ce_weight": 0.6, "label_smoothing": 0.1},
    {"ema": 1.0, "subnet_ce_weight": 0.6, "ignore_index": 3},
    {"ignore_index": 3, "distill_ignored": False},
    {"ce_weight": 0.0},
    {"kd_weight": 0.0},
    {"kd_weight": 0.0, "subnet_ce_weight": 1.0},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_loss_options(options, mode):
    config = GKTConfig(groups=2, loops=2, **options)
    model = cifar()
    inputs, targets = batch(size=6)
    targets[:2] = 3
    dropped = random_drops(find_stages(model), config.streams, seed=3)
    assert_modes_agree(model, inputs, targets, dropped, config, modes=[mode])


@pytest.mark.parametrize("mode", MODES)
def test_probability_targets(mode):
    config = GKTConfig(groups=2, subnet_ce_weight=0.5, label_smoothing=0.1)
    model = cifar()
    inputs, _ = batch()
    targets = torch.rand(4, CLASSES, dtype=torch.float64).softmax(1)
    assert_modes_agree(model, inputs, targets, dropped_of(model, config, 2), config, modes=[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_term_of_weight_zero_is_left_out_even_where_it_is_not_a_number(mode):
    """All rows ignored: the cross entropy is nan, as torch's; with weight 0 the distillation still trains."""
    config = GKTConfig(groups=2, ce_weight=0.0, ignore_index=0)
    model = cifar()
    inputs, targets = batch()
    targets = torch.zeros_like(targets)
    outcome = package_step(mode, model, inputs, targets, dropped_of(model, config, 1), config)
    assert outcome.terms[0].isnan()
    assert outcome.loss.isfinite() and torch.equal(outcome.loss, outcome.terms[1:].sum())
    assert all(gradient.isfinite().all() for gradient in outcome.gradients.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_shared_runs_every_block_once_per_state(seed, policy):
    config = GKTConfig(groups=4, loops=1 + seed % 2, batch_norm=policy)
    model = cifar(blocks=(3, 3, 3))
    stages = find_stages(model)
    dropped = random_drops(stages, config.streams, seed) if seed % 2 else dropped_of(model, config, seed)
    inputs, targets = batch()
    expected = block_calls(stages, dropped)
    with count_calls(model, [*expected, "conv1", "bn1", "fc"]) as calls:
        package_step("shared", model, inputs, targets, dropped, config)
    assert calls.pop("conv1") == calls.pop("bn1") == 1
    assert calls.pop("fc") == len(set(dropped))
    assert calls == expected


def test_sequential_runs_every_kept_block_of_every_stream():
    config = GKTConfig(groups=3, loops=2)
    model = cifar()
    stages = find_stages(model)
    dropped = random_drops(stages, config.streams, seed=0)
    inputs, targets = batch()
    paths = [path for stage in stages for path in stage.blocks]
    with count_calls(model, [*paths, "fc"]) as calls:
        package_step("sequential", model, inputs, targets, dropped, config)
    assert calls.pop("fc") == config.streams
    assert calls == {path: sum(path not in drop for drop in dropped) for path in paths}


@pytest.mark.parametrize("mode", MODES)
def test_no_groups_is_plain_training_bit_for_bit(mode):
    torch.manual_seed(0)
    plain = CifarResNet((2, 2, 2), num_classes=CLASSES, width=4)
    wrapped = copy.deepcopy(plain)
    gkt = GKT(wrapped, GKTConfig(groups=0, execution=mode, label_smoothing=0.1))
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4) for m in (plain, wrapped)
    ]
    for step in range(3):
        (images,), targets = batch(size=8, seed=step)
        images = images.float()
        expected = nn.functional.cross_entropy(plain(images), targets, label_smoothing=0.1)
        out = gkt(images, targets)
        for optimizer, loss in zip(optimizers, (expected, out.loss), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.equal(out.loss, expected) and torch.equal(out.ce, expected)
        assert out.kd.shape == (0,) and out.subnets == []
    for (name, actual), expected in zip(
        wrapped.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate_over_two_calls(mode):
    config = GKTConfig(groups=2, batch_norm="all_streams")
    model = cifar()
    expected_model = copy.deepcopy(model)
    for step in range(2):
        inputs, targets = batch(seed=step)
        dropped = dropped_of(model, config, step)
        actual = package_step(mode, model, inputs, targets, dropped, config)
        expected = reference_step(expected_model, inputs, targets, dropped, config)
    assert_same(actual, expected)


@pytest.mark.parametrize("mode", MODES)
def test_two_losses_in_one_backward(mode):
    config = GKTConfig(groups=2)
    model = cifar()
    expected_model = copy.deepcopy(model)
    gkt = GKT(model, config.replace(execution=mode))
    buffers = dict(model.named_buffers())
    losses = []
    for step in range(2):
        inputs, targets = batch(seed=step)
        losses.append(gkt(*inputs, targets, step=step).loss)
        expected = reference_step(
            expected_model, inputs, targets, dropped_of(model, config, step), config, grad_output=0.5
        )
    (0.5 * losses[0] + 0.5 * losses[1]).backward()
    actual = outcome_of(model, inputs, expected.loss, expected.terms, expected.logits)
    assert_same(actual, expected)
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    before = model.bn1.num_batches_tracked.clone()
    gkt(*inputs, targets)
    assert model.bn1.num_batches_tracked == before + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad_output", [3.5, -0.25])
def test_grad_output_other_than_one(grad_output, mode):
    config = GKTConfig(groups=3)
    model = cifar()
    inputs, targets = batch()
    dropped = dropped_of(model, config, 0)
    assert_modes_agree(model, inputs, targets, dropped, config, [mode], grad_output=grad_output)


@pytest.mark.parametrize("mode", MODES)
def test_input_that_requires_grad(mode):
    config = GKTConfig(groups=3)
    model = cifar()
    inputs, targets = batch()
    inputs[0].requires_grad_()
    expected = assert_modes_agree(model, inputs, targets, dropped_of(model, config, 0), config, [mode])
    assert expected.input_gradient is not None


@pytest.mark.parametrize("mode", MODES)
def test_input_with_a_graph_behind_it(mode):
    """The gradient goes on through whatever made the input."""
    config = GKTConfig(groups=2)
    (images,), targets = batch()
    found = []
    for run in (reference_step, lambda *args: package_step(mode, *args)):
        model = cifar()
        scale = torch.linspace(0.5, 1.5, 8, dtype=torch.float64).requires_grad_()
        run(model, (images * scale,), targets, dropped_of(model, config, 0), config)
        found.append(scale.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_no_grad(mode):
    config = GKTConfig(groups=2, loops=2)
    model = cifar()
    inputs, targets = batch()
    with torch.no_grad():
        expected = assert_modes_agree(model, inputs, targets, dropped_of(model, config, 0), config, [mode])
        out = GKT(model, config.replace(execution=mode))(*inputs, targets)
    assert not out.loss.requires_grad
    assert all(gradient is None for gradient in expected.gradients.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_eval_mode_uses_running_statistics_and_leaves_them(mode, policy):
    config = GKTConfig(groups=2, batch_norm=policy)
    model = cifar()
    model(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    model.eval()
    inputs, targets = batch()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = assert_modes_agree(model, inputs, targets, dropped_of(model, config, 0), config, [mode])
    for name, buffer in before.items():
        assert torch.equal(expected.buffers[name], buffer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["conv1", "layer1", "layer2.1", "layer3", "fc", ""])
def test_frozen_parameters(frozen, mode):
    config = GKTConfig(groups=3, loops=2)
    model = cifar()
    model.get_submodule(frozen).requires_grad_(False)
    inputs, targets = batch()
    expected = assert_modes_agree(model, inputs, targets, dropped_of(model, config, 1), config, [mode])
    for name, parameter in model.named_parameters():
        assert (expected.gradients[name] is None) == (not parameter.requires_grad)


def test_parameter_hooks_fire_once_with_the_same_values():
    config = GKTConfig(groups=3, loops=2)
    inputs, targets = batch()
    seen = {}
    for mode in MODES:
        model = cifar()
        seen[mode] = {name: [] for name, _ in model.named_parameters()}
        accumulated = dict.fromkeys(seen[mode], 0)
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, calls=seen[mode][name]: calls.append(gradient.clone()))

            def count(_, name=name, accumulated=accumulated):
                accumulated[name] += 1

            parameter.register_post_accumulate_grad_hook(count)
        package_step(mode, model, inputs, targets, dropped_of(model, config, 0), config)
        assert set(accumulated.values()) == {1}
    for name, calls in seen["sequential"].items():
        assert len(calls) == len(seen["shared"][name]) == 1, name
        torch.testing.assert_close(calls[0], seen["shared"][name][0], rtol=1e-11, atol=1e-14)


def test_a_hook_that_changes_the_gradient_works_in_both_modes():
    config = GKTConfig(groups=2)
    inputs, targets = batch()
    for mode in MODES:
        model = cifar()
        dropped = dropped_of(model, config, 0)
        plain = package_step(mode, copy.deepcopy(model), inputs, targets, dropped, config)
        model.fc.weight.register_hook(lambda gradient: 2 * gradient)
        hooked = package_step(mode, model, inputs, targets, dropped, config)
        assert torch.equal(hooked.gradients["fc.weight"], 2 * plain.gradients["fc.weight"])


def test_autograd_grad_with_respect_to_some_parameters():
    config = GKTConfig(groups=2)
    inputs, targets = batch()
    found = {}
    for mode in MODES:
        model = cifar()
        out = GKT(model, config.replace(execution=mode))(*inputs, targets, step=0)
        found[mode] = torch.autograd.grad(out.loss, [model.fc.weight, model.conv1.weight])
    for actual, expected in zip(found["shared"], found["sequential"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gkt_runs_the_subnets_it_samples(mode):
    model = cifar(blocks=(3, 3, 3))
    config = GKTConfig(groups=3, loops=2, execution=mode, seed=5)
    inputs, targets = batch()
    reference = copy.deepcopy(model)
    gkt = GKT(model, config)
    out = gkt(*inputs, targets, step=7)
    out.loss.backward()
    assert out.subnets == gkt.sample(7)
    dropped = [frozenset(), *(subnet.dropped(gkt.stages) for subnet in out.subnets)]
    expected = reference_step(reference, inputs, targets, dropped, config)
    terms = torch.cat([out.ce.reshape(1), out.kd])
    assert_same(outcome_of(model, inputs, out.loss, terms, out.logits), expected)
    assert not out.ce.requires_grad and not out.kd.requires_grad and not out.logits.requires_grad
    assert out.ce.shape == () and out.kd.shape == (6,)


@pytest.mark.parametrize("mode", MODES)
def test_equal_subnets_and_a_subnet_equal_to_the_full_net(mode):
    model = cifar()
    stages = find_stages(model)
    full, small = frozenset(), Subnet.ordered((1, 2, 1), stages).dropped(stages)
    config = GKTConfig(groups=2, loops=2)
    inputs, targets = batch()
    dropped = [full, full, small, full, small]
    expected = assert_modes_agree(model, inputs, targets, dropped, config, [mode])
    assert expected.terms[1].abs() < 1e-12 and expected.terms[3].abs() < 1e-12
    assert expected.terms[2] > 1e-6
    if mode == "shared":
        with count_calls(model, ["fc", *droppable_blocks(stages)]) as calls:
            package_step(mode, model, inputs, targets, dropped, config)
        assert calls["fc"] == 2


@pytest.mark.parametrize("mode", MODES)
def test_all_subnets_equal_to_the_full_net_give_plain_gradients(mode):
    model = cifar()
    plain = copy.deepcopy(model)
    inputs, targets = batch()
    nn.functional.cross_entropy(plain(*inputs), targets).backward()
    outcome = package_step(mode, model, inputs, targets, [frozenset()] * 4, GKTConfig(groups=3))
    for name, parameter in plain.named_parameters():
        difference = (outcome.gradients[name] - parameter.grad).norm()
        assert difference <= 1e-12 * parameter.grad.norm() + 1e-15, name


@pytest.mark.parametrize("policy", POLICIES)
def test_several_optimizer_steps_keep_the_modes_together(policy):
    models = {mode: cifar(blocks=(3, 3, 3)) for mode in MODES}
    for mode, model in models.items():
        gkt = GKT(model, GKTConfig(groups=3, loops=1, execution=mode, batch_norm=policy))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(5):
            inputs, targets = batch(seed=step)
            optimizer.zero_grad()
            gkt(*inputs, targets).loss.backward()
            optimizer.step()
    expected = models.pop("sequential").state_dict()
    for mode, model in models.items():
        for name, actual in model.state_dict().items():
            torch.testing.assert_close(actual, expected[name], rtol=1e-9, atol=1e-11, msg=f"{mode}: {name}")
