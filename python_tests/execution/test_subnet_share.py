"""Subnets on a share of the batch: modes against a plain loop that cuts where a subnet leaves the full network."""

from __future__ import annotations

import copy
import logging

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
from helpers.small_nets import CLASSES, SOME, STAGES, Block, Net, drops
from torch import nn
from torch.utils.checkpoint import checkpoint

from gkt_fast import GKT, GKTConfig, method_config
from gkt_fast.execution import StackingError
from gkt_fast.execution.partition import Rows, lead_and_kept
from gkt_fast.execution.sequential import resize_images
from gkt_fast.execution.share import Share
from gkt_fast.models import CifarResNet
from gkt_fast.network.calls import SharedStateError
from gkt_fast.network.discovery import find_stages
from gkt_fast.subnets.sampling import sample_subnets

CONFIG = GKTConfig(groups=2, loops=2, subnet_share=0.5)
NOISY = GKTConfig(
    groups=2,
    sampler="fixed",
    subnets=((3,), (2,)),
    independent_noise=True,
    batch_norm="all_streams",
    subnet_share=0.5,
)
NOISY_DROPS = drops([3], [2, 3])


def cifar(blocks=(2, 3, 2), width=4):
    torch.manual_seed(0)
    return CifarResNet(blocks, num_classes=CLASSES, width=width).double()


def batch(size=6, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, dtype=torch.float64, generator=generator)
    return (images,), torch.randint(CLASSES, (size,), generator=generator)


def dropped_of(model, config, step):
    stages = find_stages(model)
    return [frozenset(), *(subnet.dropped(stages) for subnet in sample_subnets(stages, config, step))]


def outcome(gkt, inputs, targets, step=0):
    out = gkt(inputs if len(inputs) > 1 else inputs[0], targets, step=step)
    out.loss.backward()
    return outcome_of(gkt.model, inputs, out.loss, torch.cat([out.ce.reshape(1), out.kd]), out.logits)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampler, loops", [("inherit_decay", 1), ("uniform", 2), ("stochastic_depth", 1)])
@pytest.mark.parametrize("share, size", [(0.5, 6), (0.25, 7), (0.1, 5), (0.9, 3), (0.3, 2)])
def test_equals_the_plain_loop(share, size, sampler, loops, policy):
    config = GKTConfig(
        groups=3, loops=loops, batch_norm=policy, sampler=sampler, min_depth=0, subnet_share=share
    )
    model = cifar()
    inputs, targets = batch(size, seed=size)
    assert_modes_agree(model, inputs, targets, dropped_of(model, config, size), config)


@pytest.mark.parametrize("seed", range(6))
def test_masks_neither_ordered_nor_nested(seed):
    policy = POLICIES[seed % 2]
    config = GKTConfig(groups=2 + seed % 3, loops=1 + seed % 2, batch_norm=policy, subnet_share=0.4)
    model = cifar(blocks=(3, 4, 3))
    dropped = random_drops(find_stages(model), config.streams, seed)
    inputs, targets = batch(7, seed=seed)
    inputs[0].requires_grad_(seed % 2 == 0)
    assert_modes_agree(model, inputs, targets, dropped, config, grad_output=1.0 + seed)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_logits": True, "temperature": 2.5, "ema": 0.9},
        {"subnet_ce_weight": 0.6, "label_smoothing": 0.1, "ce_weight": 0.0},
        {"subnet_ce_weight": 0.6, "ignore_index": 3, "distill_ignored": False},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("probabilities", [False, True])
def test_loss_options_and_mixed_targets(options, probabilities):
    if probabilities:
        options = {name: value for name, value in options.items() if name != "ignore_index"}
    config = CONFIG.replace(**options)
    model = cifar()
    inputs, targets = batch()
    targets[1] = 3
    if probabilities:
        targets = torch.rand(6, CLASSES, dtype=torch.float64).softmax(1)
    dropped = random_drops(find_stages(model), config.streams, seed=3)
    assert_modes_agree(model, inputs, targets, dropped, config)


def test_equal_subnets_and_a_subnet_equal_to_the_full_network():
    model = cifar()
    inputs, targets = batch()
    small = dropped_of(model, GKTConfig(groups=1, sampler="fixed", subnets=((1, 2, 1),)), 0)[1]
    dropped = [frozenset(), frozenset(), small, frozenset(), small]
    expected = assert_modes_agree(model, inputs, targets, dropped, CONFIG)
    assert expected.terms[1].abs() < 1e-12 and expected.terms[2] > 1e-6
    assert_modes_agree(model, inputs, targets, [frozenset()] * 5, CONFIG)


@pytest.mark.parametrize("momentum", [0.37, None])
def test_momentum_of_running_statistics(momentum):
    model = cifar()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    inputs, targets = batch(5)
    dropped = random_drops(find_stages(model), 5, seed=1)
    assert_modes_agree(model, inputs, targets, dropped, CONFIG.replace(batch_norm="all_streams"))


@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize("fused", [False, True])
def test_gkt_verifies_and_runs_every_mode(mode, fused, caplog):
    model = cifar(blocks=(3, 3, 3))
    config = CONFIG.replace(execution=mode, fuse_blocks=fused)
    gkt = GKT(copy.deepcopy(model), config)
    inputs, targets = batch(9)
    with caplog.at_level(logging.INFO, "gkt_fast"):
        actual = outcome(gkt, inputs, targets, step=3)
    assert "execution='auto'" not in caplog.text  # no mode was found wrong
    assert_same(actual, reference_step(model, inputs, targets, dropped_of(model, config, 3), config), 1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_batches_are_each_cut_by_themselves(mode):
    model = cifar()
    expected_model = copy.deepcopy(model)
    gkt = GKT(model, CONFIG.replace(execution=mode))
    for step in range(2):
        inputs, targets = batch(seed=step)
        actual = outcome(gkt, inputs, targets, step=0)
        expected = reference_step(expected_model, inputs, targets, dropped_of(model, CONFIG, 0), CONFIG)
    assert_same(actual, expected, 1e-11)


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


class NoisyNet(Net):
    """Some blocks, or the layer before the head, draw noise."""

    def __init__(self, *noisy, head=False, norm=None):
        super().__init__()
        for i in noisy:
            self.blocks[i].bn = nn.Sequential(self.blocks[i].bn, Noise())
        self.norm = (norm or nn.Identity)(6).double()
        self.dropout = Noise() if head else nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.norm(x).mean((2, 3))))


NOISY_NETS = {
    "blocks": (lambda: NoisyNet(1, 2), ["blocks.1", "blocks.2"]),
    "head": (lambda: NoisyNet(head=True), ["dropout"]),
    "behind a norm": (lambda: NoisyNet(head=True, norm=nn.BatchNorm2d), ["dropout"]),
}


@pytest.mark.parametrize("mode", ONE_BY_ONE)
@pytest.mark.parametrize("name", NOISY_NETS)
def test_a_subnet_leaves_the_full_network_where_it_draws_noise_of_its_own(name, mode):
    build, noisy = NOISY_NETS[name]
    (inputs, targets), model = batch(side=6), build()
    gkt = GKT(copy.deepcopy(model), NOISY.replace(execution=mode))
    gkt.layers(*inputs)
    torch.manual_seed(5)
    expected = reference_step(model, inputs, targets, NOISY_DROPS, NOISY, noisy=noisy)
    torch.manual_seed(5)
    assert_same(outcome(gkt, inputs, targets), expected)


def test_a_stacked_step_equals_the_plain_loop_with_the_same_noise():
    (inputs, targets), model = batch(side=6), NoisyNet(1, 2, 3)
    gkt = GKT(copy.deepcopy(model), NOISY.replace(execution="stacked"))
    gkt.layers(*inputs)
    for block in gkt.model.blocks[1:]:
        block.bn[1].record.clear()
    actual = outcome(gkt, inputs, targets)
    for block, mine, streams in zip(model.blocks[1:], gkt.model.blocks[1:], (3, 2, 1), strict=True):
        (factors,) = mine.bn[1].record
        block.bn[1].replay = list(factors.split([6, *[3] * (streams - 1)]))
    noisy = ["blocks.1", "blocks.2", "blocks.3"]
    assert_same(actual, reference_step(model, inputs, targets, NOISY_DROPS, NOISY, noisy=noisy), 1e-11)


def test_stacked_refuses_a_norm_and_noise_behind_the_same_block():
    (inputs, targets), model = batch(side=6), NoisyNet(head=True, norm=nn.BatchNorm2d)
    with pytest.raises(StackingError, match="'norm' normalises over the batch and 'dropout' draws"):
        GKT(model, NOISY.replace(execution="stacked"))(*inputs, targets)
    GKT(model, NOISY.replace(execution="stacked", subnet_share=1.0))(*inputs, targets)


class MaskedPool(nn.Module):
    def forward(self, x, mask):
        return (x * mask).sum((2, 3)) / mask.sum((2, 3))


class MaskedBlock(Block):
    def forward(self, x, mask, *, scale):
        return x + scale * F.gelu(self.bn(self.conv(x))) * mask


class MaskedNet(Net):
    """Hands a mask to its blocks, and reads it in its own code again at the end."""

    def __init__(self, in_code):
        super().__init__(MaskedBlock)
        self.pool = MaskedPool()
        self.in_code = in_code

    def forward(self, image, mask, *, scale=0.5):
        x = self.stem(image)
        for block in self.blocks:
            x = block(x, mask, scale=scale)
        pooled = (x * mask).sum((2, 3)) / mask.sum((2, 3)) if self.in_code else self.pool(x, mask)
        return self.head(pooled)


@pytest.mark.parametrize("mode", ["auto", *ONE_BY_ONE])
def test_inputs_by_name_that_the_models_own_code_reads_again(mode):
    (images,), targets = batch(side=6)
    mask = (torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    expected = reference_step(MaskedNet(False), (images, mask), targets, SOME, CONFIG)
    gkt = GKT(MaskedNet(True), CONFIG.replace(execution=mode), stages=STAGES)
    named = GKT(MaskedNet(True), gkt.config, stages=STAGES)
    network, streams = gkt.network, gkt._streams([], 0)
    assert not streams.criterion
    network.remember((images, mask))
    if mode != "auto":
        actual = package_step(mode, MaskedNet(True), (images, mask), targets, SOME, CONFIG, stages=STAGES)
        assert_same(actual, expected)
    inputs = {"image": images, "mask": mask, "scale": 0.5}
    found = named(inputs, targets, step=1)
    other = gkt((images, mask), targets, step=1)
    assert torch.equal(found.loss, other.loss) and torch.equal(found.kd, other.kd)
    assert named._choice().mode == ("shared" if mode == "auto" else mode)


class Segmenter(Net):
    def __init__(self, lateral):
        super().__init__()
        self.lateral = nn.Conv2d(6, 6, 1).double() if lateral else None
        self.head = nn.Conv2d(6, CLASSES, 1).double()

    def forward(self, x):
        x = self.stem(x)
        early = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            early = x if i == 1 else early
        return self.head(x if self.lateral is None else x + self.lateral(early))


@pytest.mark.parametrize("lateral", [False, True])
def test_dense_prediction(lateral):
    (images,), _ = batch(5, side=6)
    targets = torch.randint(CLASSES, (5, 6, 6), generator=torch.Generator().manual_seed(2))
    targets[targets == 0] = -100
    config = CONFIG.replace(distill_ignored=False, subnet_ce_weight=0.5)
    modes = ("sequential", "shared") if lateral else MODES
    assert_modes_agree(Segmenter(lateral), (images,), targets, SOME, config, modes, stages=STAGES)


class InPlaceNet(Net):
    """Writes into what a block returned, in its own code."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).add_(0.1) if self.in_place else block(x) + 0.1
        return self.head(x.mean((2, 3)))


def test_sequential_takes_models_that_write_into_activations():
    inputs, targets = batch(side=6)
    expected = reference_step(InPlaceNet(False), inputs, targets, SOME, CONFIG)
    actual = package_step("sequential", InPlaceNet(True), inputs, targets, SOME, CONFIG)
    assert_same(actual, expected)


class CheckpointedNet(Net):
    """Recomputes its blocks in backward, so many at a time."""

    def __init__(self, together, reentrant=False):
        super().__init__()
        self.together, self.reentrant = together, reentrant

    def forward(self, x):
        x = self.stem(x)
        for start in range(0, 4, self.together):
            x = checkpoint(self.some, x, start, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))

    def some(self, x, start):
        for i in range(start, start + self.together):
            x = self.blocks[i](x)
        return x


@pytest.mark.parametrize("mode", ONE_BY_ONE)
def test_activation_checkpointing(mode):
    inputs, targets = batch(side=6)
    config = CONFIG.replace(batch_norm="all_streams")
    expected = reference_step(Net(), inputs, targets, SOME, config)
    assert_same(
        package_step(mode, CheckpointedNet(1), inputs, targets, SOME, config, stages=STAGES), expected
    )


@pytest.mark.parametrize("together, reentrant", [(2, False), (1, True)])
def test_what_a_backward_would_recompute_on_other_rows_is_refused(together, reentrant):
    inputs, targets = batch(side=6)
    model = CheckpointedNet(together, reentrant)
    with pytest.raises(SharedStateError, match=r"set subnet_share=1"):
        package_step("sequential", model, inputs, targets, drops([1], [3]), CONFIG, stages=STAGES)


class RowsLast(Net):
    """Its blocks take and return (C, B, H, W)."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean((2, 3)))


class RowsLastBlock(Block):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_blocks_whose_first_dimension_is_not_the_batch_are_refused(mode):
    inputs, targets = batch(5, side=6)
    gkt = GKT(RowsLast(RowsLastBlock), CONFIG.replace(execution=mode), stages=STAGES)
    with pytest.raises((ValueError, SharedStateError), match=r"subnet_share below 1"):
        gkt(*inputs, targets)
    GKT(RowsLast(RowsLastBlock), CONFIG.replace(subnet_share=1.0), stages=STAGES)(*inputs, targets)


class MixRows(nn.Module):
    def forward(self, x):
        return x + x.mean(0, keepdim=True)


def test_layers_that_mix_rows_are_found_and_run_one_state_at_a_time(caplog):
    inputs, targets = batch(12)
    model = cifar()
    model.fc = nn.Sequential(MixRows(), model.fc)
    gkt = GKT(copy.deepcopy(model), CONFIG)
    with caplog.at_level(logging.INFO, "gkt_fast"):
        actual = outcome(gkt, inputs, targets, step=1)
    assert "execution='auto' runs 'shared'" in caplog.text and "mixes the rows" in caplog.text
    assert_same(actual, reference_step(model, inputs, targets, dropped_of(model, CONFIG, 1), CONFIG), 1e-11)


def test_smaller_images_have_nothing_in_common_with_the_full_network():
    config = CONFIG.replace(subnet_resolution=6)
    (images,), targets = batch()
    model = cifar()
    gkt = GKT(copy.deepcopy(model), config)
    out = gkt(images, targets, step=1)
    full = model(images)
    knowledge = full[:3].detach()
    for kd, dropped in zip(out.kd[:1], dropped_of(model, config, 1)[1:2], strict=True):
        for path in dropped:
            model.set_submodule(path, nn.Identity())
        p, q = knowledge.softmax(1), model(resize_images(images[:3], 6)).softmax(1)
        torch.testing.assert_close(kd, (p * (p / q).log()).sum(1).mean(), rtol=1e-9, atol=1e-12)


def bce(logits, targets):
    return F.binary_cross_entropy_with_logits(logits, targets["labels"]["all"])


@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_gets_the_targets_of_the_subnets_rows(mode):
    (images,), _ = batch()
    labels = (torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(3)) > 0.5).double()
    config = CONFIG.replace(execution=mode, subnet_ce_weight=0.3, distillation="sigmoid")
    seen = []

    def criterion(logits, targets):
        seen.append((logits.shape[0], len(targets["labels"]["all"]), targets["names"]))
        return bce(logits, targets)

    gkt = GKT(cifar(), config, criterion=criterion)
    out = gkt(images, {"labels": {"all": labels}, "names": [*"abcdef"]}, step=2)
    assert sorted(seen) == [(3, 3, [*"abc"])] * 4 + [(6, 6, [*"abcdef"])]
    reference = cifar()
    full = reference(images)
    torch.testing.assert_close(out.ce, bce(full, {"labels": {"all": labels}}), rtol=1e-10, atol=0)
    z = gkt(images, {"labels": {"all": labels}, "names": [*"abcdef"]}, step=2)
    torch.testing.assert_close(z.loss, out.loss, rtol=1e-10, atol=0)


def test_nested_targets_are_cut():
    share = Share(4, 2)
    a, b = torch.arange(8).view(4, 2), torch.ones(3)
    cut = share.cut_targets({"x": (a, b), "boxes": [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}], "names": "abcd"})
    assert torch.equal(cut["x"][0], a[:2]) and torch.equal(cut["x"][1], b)
    assert cut["boxes"] == [{"n": 1}, {"n": 2}] and cut["names"] == "abcd"
    with pytest.raises(ValueError, match="nothing has the batch's 4 rows"):
        share.cut_targets({"x": b})


def test_explain_and_cost_count_the_share():
    whole = GKT(cifar(), CONFIG.replace(subnet_share=1.0))
    half = GKT(cifar(), CONFIG)
    (images,), _ = batch()
    whole.layers(images), half.layers(images)
    subnets = half.sample(3)
    ratios = [gkt.cost(subnets).shared_ratio for gkt in (whole, half)]
    assert ratios[1] == pytest.approx(1 + 0.5 * (ratios[0] - 1), abs=1e-3) and ratios[0] > 1.1
    assert half.expected_cost() == pytest.approx(1 + 0.5 * (whole.expected_cost() - 1), rel=0.02)
    text = half.explain(3)
    assert "subnets see 0.5 of a batch's rows" in text and f"shared {ratios[1]:.2f} x" in text
    assert "of a batch's rows" not in whole.explain(3)


def test_published_methods_take_a_share():
    assert method_config("st").subnet_share == 1.0
    assert method_config("st", subnet_share=0.5).subnet_share == 0.5
    with pytest.raises(ValueError, match="with train_full=False"):
        method_config("stochastic_depth", subnet_share=0.5)


def test_bfloat16_autocast():
    inputs, targets = batch(8)
    logits, losses = [], []
    for mode in MODES:
        gkt = GKT(cifar().float(), CONFIG.replace(execution=mode))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = gkt(inputs[0].float(), targets, step=1)
        out.loss.backward()
        logits.append(out.logits.float())
        losses.append(out.loss.detach())
        assert all(p.grad.isfinite().all() for p in gkt.parameters())
    for other, loss in zip(logits, losses, strict=True):
        torch.testing.assert_close(other, logits[0], rtol=0.05, atol=0.05)
        torch.testing.assert_close(loss, losses[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("lead", [0, 1, 2, 3])
@pytest.mark.parametrize("kept", [(), (0,), (2,), (0, 0, 2)])
def test_gradients_of_unequal_ghost_batches_taken_apart(lead, kept):
    torch.manual_seed(0)
    x = torch.randn(9, 3, 4, 5, dtype=torch.double)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    rows, starts = Rows(5, 2), (0, 5, 7, 9)
    leading, parts = lead_and_kept(mine, rows, lead, kept)
    expected = [other[: starts[lead]], *(other[starts[i] : starts[i] + 2] for i in kept)]
    weights = [torch.randn_like(e) for e in expected]
    for a, b in zip([leading, *parts], expected, strict=True):
        assert torch.equal(a, b)
    for tensors in ([leading, *parts], expected):
        sum((t * w).sum() for t, w in zip(tensors, weights, strict=True)).backward()
    torch.testing.assert_close(mine.grad, other.grad)
