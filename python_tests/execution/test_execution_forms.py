"""Blocks of many forms in the execution modes: tuples, more arguments, keywords, channels_last."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import (
    ONE_BY_ONE,
    assert_modes_agree,
    assert_same,
    one_thread,  # noqa: F401
    package_step,
    random_drops,
    reference_step,
)
from helpers.small_nets import CLASSES, CONFIG, SOME, STAGES, Block, Net, batch
from torch import nn

from gkt_fast.models import CifarResNet
from gkt_fast.network.discovery import find_stages


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
    assert_modes_agree(PairNet(PairBlock), inputs, targets, SOME, CONFIG, ONE_BY_ONE, skip=SkipPair)


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
    for mode in ONE_BY_ONE:
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
    assert_modes_agree(TupleInNet(TupleInBlock), inputs, targets, SOME, CONFIG, ONE_BY_ONE, stages=STAGES)


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


@pytest.mark.parametrize("mode", ONE_BY_ONE)
def test_block_that_returns_more_than_it_takes_is_a_clear_error(mode):
    inputs, targets = batch()
    with pytest.raises(ValueError, match=r"block 'blocks\.0' takes 1 values and returns 3"):
        package_step(mode, ThreeFromOneNet(ThreeFromOne), inputs, targets, SOME, CONFIG)


@pytest.mark.parametrize("mode", ONE_BY_ONE)
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
