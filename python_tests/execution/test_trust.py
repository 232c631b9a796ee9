"""A mode runs only where it is right: layers that mix rows, know their batch or keep things, and checkpointing."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gkt_fast import GKT, GKTConfig
from gkt_fast.execution import choose_execution
from gkt_fast.execution.verification import Verification

CLASSES = 5
CONFIG = GKTConfig(groups=2, loops=2, decay=1.0)
STEP = 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(torch.tanh(self.linear(self.norm(x))))

    def inner(self, x):
        return x


class BatchVariance(Block):
    def inner(self, x):
        return x / (x.var(0, unbiased=False, keepdim=True) + 1e-3).sqrt()


class Routed(Block):
    """The rows of the largest score go through; as many as the capacity allows."""

    def inner(self, x):
        chosen = x[:, 0].topk(x.shape[0] // 2).indices
        return torch.zeros_like(x).index_copy(0, chosen, x[chosen])


class MixesNeighbours(Block):
    def inner(self, x):
        return x + 0.5 * x.roll(1, 0)


class RandomNegatives(Block):
    def inner(self, x):
        return x + 0.1 * x[torch.randperm(len(x), device=x.device)] if self.training else x


class SilentMixing(Block):
    """Mixes rows behind a gain of 0, as layers are initialised that shall begin as the identity."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(8))

    def inner(self, x):
        return self.gain * (x - x.mean(0))


class FaintMixing(SilentMixing):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 1e-6))


class Range(Block):
    """Quantises by a moving range, as observers of quantisation-aware training do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("range", torch.ones(()))

    def inner(self, x):
        if self.training:
            self.range.lerp_(x.detach().abs().max(), 0.1)
        return x.clamp(-self.range, self.range)


class RecordsRange(Range):
    """The range is written and not read in training."""

    def inner(self, x):
        super().inner(x)
        return x


MIXING = [
    BatchVariance,
    Routed,
    MixesNeighbours,
    RandomNegatives,
    SilentMixing,
    FaintMixing,
    Range,
    RecordsRange,
]


class Dropping(Block):
    def inner(self, x):
        return F.dropout(x, 0.3, self.training)


class DropsPaths(Block):
    def inner(self, x):
        return x * x.new_empty(len(x), 1).bernoulli_(0.7) / 0.7 if self.training else x


class GaussianNoise(Block):
    def inner(self, x):
        return x + 0.3 * torch.randn_like(x) if self.training else x


class PythonNoise(Block):
    def inner(self, x):
        return x * (0.5 + random.random()) if self.training else x


class Attends(Block):
    def inner(self, x):
        y = F.scaled_dot_product_attention(*[x.view(-1, 2, 4)] * 3, dropout_p=0.3 if self.training else 0.0)
        return y.flatten(1)


NOISY = [Dropping, DropsPaths, GaussianNoise, PythonNoise, Attends]


class Net(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 8)
        self.first = nn.Sequential(*[block() for _ in range(3)])
        self.blocks = nn.Sequential(*[block() for _ in range(4)])
        self.head = nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x):
        return self.head(self.blocks(self.first(self.stem(x))))


def batch(rows=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (rows,), generator=generator)


def step(model, execution, inputs=None, **options):
    """Gradients and buffers after a step on a copy of the model, and the mode that would run the next."""
    gkt = GKT(
        copy.deepcopy(model) if not isinstance(model, KeepsFeature) else model,
        CONFIG.replace(execution=execution, **options),
    )
    images, targets = batch() if inputs is None else inputs
    torch.manual_seed(1)
    gkt(images, targets, step=STEP).loss.backward()
    values = [p.grad.flatten() for p in gkt.parameters() if p.grad is not None]
    buffers = [b.flatten().double() for b in gkt.buffers()]
    return torch.cat([*values, *buffers]), mode_of(gkt)


def mode_of(gkt):
    return choose_execution(gkt.network, gkt._streams(gkt.sample(STEP), STEP)).mode


def assert_as_the_loop(model, execution="auto", inputs=None, tolerance=1e-11):
    expected, _ = step(model, "sequential", inputs)
    actual, mode = step(model, execution, inputs)
    assert (actual - expected).norm() <= tolerance * expected.norm()
    return mode


# --- layers that mix rows ---


@pytest.mark.parametrize("block", MIXING)
def test_layers_that_mix_rows_are_not_stacked(block, caplog):
    model = Net(block)
    with caplog.at_level(logging.INFO, logger="gkt_fast"):
        gkt = GKT(model, CONFIG)
        for number in range(3):
            gkt(*batch(), step=number)
    told = [r.getMessage() for r in caplog.records if "execution='auto' runs 'shared'" in r.getMessage()]
    assert len(told) == 1 and mode_of(gkt) == "shared"
    with pytest.raises(RuntimeError, match="execution='stacked' can't run this model"):
        step(model, "stacked")
    if block is not RandomNegatives:  # whose draws differ from stream to stream
        assert assert_as_the_loop(model) == "shared"


def test_evonorm_is_not_stacked():
    layers = pytest.importorskip("timm.layers")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "resnetv2_50", num_classes=CLASSES, layers=(2, 2), channels=(8, 16), stem_chs=8,
        norm_layer=layers.EvoNorm2dB0,
    ).double()  # fmt: skip
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    assert assert_as_the_loop(model, inputs=(x, batch(6)[1]), tolerance=1e-8) == "shared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [Block, BatchVariance, SilentMixing])
def test_low_precision_is_told_from_mixing(block, dtype):
    gkt = GKT(Net(block).to(dtype), CONFIG)
    gkt(batch()[0].to(dtype), batch()[1], step=STEP)
    assert mode_of(gkt) == ("stacked" if block is Block else "shared")


@pytest.mark.parametrize("block", NOISY)
def test_noise_gives_no_false_alarm(block):
    gkt = GKT(Net(block), CONFIG)
    gkt(*batch(), step=STEP)
    assert mode_of(gkt) == "stacked"


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_batches_of_any_size_are_stacked(rows):
    assert assert_as_the_loop(Net(), inputs=batch(rows)) == "stacked"


# --- what a model knows of its batch ---


class MaskedMean(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.Sequential(*[Block() for _ in range(4)])
        self.double()

    def forward(self, tokens):
        mask = (tokens != 0).unsqueeze(-1)
        return self.head((self.blocks(self.embed(tokens)) * mask).sum(1) / mask.sum(1))


class LastToken(MaskedMean):
    def forward(self, tokens):
        last = (tokens != 0).sum(1) - 1
        return self.head(self.blocks(self.embed(tokens))[torch.arange(len(tokens)), last])


class RowsByNumber(MaskedMean):
    """Knows how many rows there are, as a number."""

    def forward(self, tokens):
        x = self.blocks(self.embed(tokens))
        return self.head(x.reshape(12, 7, 8).mean(1))


class EndOfText(MaskedMean):
    """Needs a token that a batch of zeros doesn't hold."""

    def forward(self, tokens):
        ends = (tokens == 7).nonzero()[:, 1]
        return self.head(self.blocks(self.embed(tokens))[torch.arange(len(tokens)), ends])


@pytest.mark.parametrize("kind", [MaskedMean, LastToken, RowsByNumber, EndOfText])
def test_models_that_know_their_batch_run_as_the_loop(kind):
    tokens = torch.randint(8, 20, (12, 7), generator=torch.Generator().manual_seed(0))
    tokens[:, 5] = 7
    tokens[:, 6:] = 0
    inputs = (tokens, batch()[1])
    for execution in ("auto", "shared", "lean"):
        assert_as_the_loop(kind(), execution, inputs)
    with pytest.raises(RuntimeError, match="execution='stacked' can't run this model"):
        step(kind(), "stacked", inputs)


def test_plans_see_values_of_the_batch_and_keep_none():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, CLASSES)
            self.blocks = nn.Sequential(*[Block() for _ in range(4)])
            self.double()

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            hidden, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.head(self.blocks(hidden).mean(1))

    x = torch.randn(6, 9, 4, dtype=torch.float64)
    inputs = (x, torch.tensor([9, 8, 7, 5, 4, 9]))
    for execution in ("auto", "lean"):
        assert_as_the_loop(Lengths(), execution, (inputs, batch(6)[1]))
    gkt = GKT(Lengths(), CONFIG)
    gkt(inputs, batch(6)[1])
    kept = [value for value in gkt.network._example if isinstance(value, torch.Tensor)]
    assert gkt.network._batch is None and [value.is_meta for value in kept] == [True, False]
    gkt.cost(gkt.sample(0))


# --- what is kept from one stream to the next ---


class KeepsFeature(Net):
    """A block runs in several states, and the head reads what was kept of it."""

    def __init__(self, by):
        super().__init__()
        self.by, self.kept = by, {}
        if by == "hook":
            kept = self.kept
            self.blocks[1].register_forward_hook(lambda m, a, output: kept.update(feature=output))
        elif by == "detached":
            self.blocks[1].forward = self.keeping(self.blocks[1])

    def keeping(self, block):
        own = block.forward

        def forward(x):
            self.kept["feature"] = own(x)
            return self.kept["feature"]

        return forward

    def forward(self, x):
        x = self.blocks(self.first(self.stem(x)))
        feature = self.kept["feature"]
        return self.head(x + (feature.detach() if self.by == "detached" else feature))


@pytest.mark.parametrize("by", ["hook", "detached"])
def test_kept_features_are_the_loops_or_refused(by):
    options = {"sampler": "fixed", "subnets": ((2, 4), (2, 2), (3, 3), (3, 2)), "min_depth": 1}
    expected, _ = step(KeepsFeature(by), "sequential", **options)
    for execution in ("auto", "shared", "stacked", "lean"):
        try:
            actual, _ = step(KeepsFeature(by), execution, **options)
        except RuntimeError as error:
            assert (execution != "auto" and "reads" in str(error)) or "can't run this model" in str(error)
        else:
            assert (actual - expected).norm() <= 1e-11 * expected.norm()


# --- changes later on ---


class MixesInTraining(Block):
    mixing = False

    def inner(self, x):
        return x - x.mean(0) if self.training and self.linear.training else x


def test_a_mode_that_changes_later_is_noticed_and_going_back_too():
    model = Net(MixesInTraining).eval()
    gkt = GKT(model, CONFIG)
    gkt(*batch(), step=STEP)
    assert mode_of(gkt) == "stacked"
    model.blocks.train()
    gkt(*batch(), step=STEP)
    assert mode_of(gkt) == "shared"
    for block in model.blocks:
        block.linear.eval()
    gkt(*batch(), step=STEP)
    assert mode_of(gkt) == "stacked"


@pytest.mark.parametrize("what", ["hook", "class", "module"])
def test_a_hook_a_class_or_a_module_that_changes_later_is_noticed(what):
    gkt = GKT(Net(), CONFIG)
    gkt(*batch(), step=STEP)
    assert mode_of(gkt) == "stacked"
    if what == "hook":
        gkt.model.blocks[2].linear.register_forward_hook(lambda m, a, y: y - y.mean(0))
    elif what == "class":
        gkt.model.blocks[2].__class__ = BatchVariance
    else:
        gkt.model.blocks[2].norm = nn.Sequential(
            nn.BatchNorm1d(8, affine=False).double(), MixesNeighbours().double()
        )
    gkt(*batch(), step=STEP)
    assert mode_of(gkt) == "shared"


def test_each_setup_is_checked_once(monkeypatch):
    checks = []
    original = Verification.__init__

    def counted(self, *args):
        checks.append(1)
        original(self, *args)

    monkeypatch.setattr(Verification, "__init__", counted)
    gkt = GKT(Net(Dropping), CONFIG)
    for _ in range(3):
        gkt.train()(*batch())
        gkt.eval()(*batch())
    assert len(checks) == 2


# --- running buffers ---


class Spectral(Block):
    def __init__(self):
        super().__init__()
        self.linear = spectral_norm(self.linear)


@pytest.mark.parametrize("block", [Spectral, Range, RecordsRange])
@pytest.mark.parametrize("execution", ["auto", "shared", "lean"])
def test_running_buffers_follow_the_policy_of_batch_norm(block, execution):
    """With "full" they end as in plain training, and all modes agree."""
    model = Net(block)
    assert_as_the_loop(model, execution)
    plain, trained = copy.deepcopy(model), GKT(copy.deepcopy(model), CONFIG.replace(execution=execution))
    plain(batch()[0])
    trained(*batch(), step=STEP)
    for a, b in zip(plain.buffers(), trained.model.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_running_buffers_that_all_streams_write_are_named(caplog):
    with caplog.at_level(logging.WARNING, logger="gkt_fast"):
        GKT(Net(Range), CONFIG.replace(execution="shared", batch_norm="all_streams"))(*batch(), step=STEP)
    assert (
        sum(
            "'blocks.0'" in r.getMessage() and "buffers of their own" in r.getMessage()
            for r in caplog.records
        )
        == 1
    )


# --- activation checkpointing ---


class Checkpointed(Net):
    def __init__(self, how, block=Block):
        super().__init__(block)
        self.how = how

    def forward(self, x):
        x = self.first(self.stem(x))
        if self.how == "none":
            x = self.blocks(x)
        elif self.how == "each":
            for block in self.blocks:
                x = checkpointing.checkpoint(block, x, use_reentrant=False)
        elif self.how == "reentrant":
            for block in self.blocks:
                x = checkpointing.checkpoint(block, x, use_reentrant=True)
        elif self.how == "whole":
            x = checkpointing.checkpoint(self.blocks, x, use_reentrant=False)
        elif self.how == "whole reentrant":
            x = checkpointing.checkpoint(self.blocks, x, use_reentrant=True)
        elif self.how == "segments":
            x = checkpointing.checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)
        elif self.how == "with more":
            for block in self.blocks:
                x = checkpointing.checkpoint(
                    lambda x, block=block: block(x) * x.sigmoid(), x, use_reentrant=False
                )
        return self.head(x)


@pytest.mark.parametrize("sampler", ["inherit_decay", "stochastic_depth"])
@pytest.mark.parametrize("how", ["each", "reentrant", "whole", "whole reentrant", "segments", "with more"])
def test_checkpointing_is_exact_or_refused_before_the_backward(how, sampler):
    images, targets = batch()
    for execution in ("auto", "sequential", "shared", "stacked", "lean"):
        results = []
        for used in ("none" if how != "with more" else how, how):
            config = CONFIG.replace(execution="sequential" if used != how else execution, sampler=sampler)
            gkt = GKT(Checkpointed(used), config)
            try:
                loss = gkt(images.clone().requires_grad_(), targets, step=STEP).loss
            except RuntimeError as error:
                assert execution in ("shared", "stacked", "lean"), error
                break
            loss.backward()
            results.append(torch.cat([p.grad.flatten() for p in gkt.parameters()]))
        if len(results) == 2:
            assert (results[0] - results[1]).norm() <= 1e-11 * results[0].norm(), execution


def test_checkpointing_that_is_turned_on_later_is_noticed():
    gkt = GKT(Checkpointed("none"), CONFIG)
    gkt(*batch(), step=STEP).loss.backward()
    gkt.model.how = "whole"
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        GKT(gkt.model, CONFIG.replace(execution="stacked"))(*batch(), step=STEP)
    gkt.zero_grad()
    gkt(*batch(), step=STEP).loss.backward()
    expected, _ = step(Net(), "sequential")
    actual = torch.cat([p.grad.flatten() for p in gkt.parameters()])
    assert (actual - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.parametrize("execution", ["auto", "shared", "stacked", "lean", "sequential"])
def test_checkpointing_of_timm(execution):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=32, num_heads=2, num_classes=CLASSES
    ).double()
    inputs = torch.randn(4, 3, 32, 32, dtype=torch.float64), batch(4)[1]
    expected, _ = step(model, "sequential", inputs)
    model.set_grad_checkpointing(True)
    actual, mode = step(model, execution, inputs)
    assert (actual - expected).norm() <= 1e-11 * expected.norm()
    assert mode == ("stacked" if execution == "auto" else execution)


@pytest.mark.parametrize("execution", ["auto", "shared", "lean", "sequential"])
def test_checkpointing_of_hugging_face(execution):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=8, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).double().train()
    inputs = torch.randn(4, 3, 16, 16, dtype=torch.float64), batch(4)[1]
    expected, _ = step(model, "sequential", inputs)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    actual, _ = step(model, execution, inputs)
    assert (actual - expected).norm() <= 1e-11 * expected.norm()
