"""What is extracted computes what `active_subnet` computes, or is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from helpers.processes import environment
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn
from torch.nn.utils import prune

from gkt_fast import GKT, GKTConfig, GKTTrainer, Subnet, active_subnet, evaluate_subnets, extract_subnet

X, Y = torch.randn(3, 4), torch.randint(5, (3,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def masked(model, subnet, *inputs, stages=None):
    with torch.no_grad(), active_subnet(model, subnet, stages):
        return model(*inputs)


def named(names, container=nn.Sequential):
    torch.manual_seed(0)
    blocks = OrderedDict((name, Block()) for name in names)
    if container is nn.ModuleList:
        inner = nn.ModuleList()
        inner._modules.update(blocks)
        return Loop(inner)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(blocks), nn.Linear(8, 5)).eval()


class Loop(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, 8), blocks, nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("mask", ["x.xx", "xx..", ".xxx", "x..x", "...x"])
@pytest.mark.parametrize(
    "names", [["1", "2", "3", "4"], ["0", "1", "2", "3"], ["3", "1", "0", "2"], ["a", "2", "b", "0"]]
)
def test_names_are_names(names, mask):
    model = named(names)
    subnet = Subnet((tuple(letter == "x" for letter in mask),))
    expected = masked(model, subnet, X)
    extracted = extract_subnet(model, subnet, example_inputs=X)
    assert torch.equal(extracted(X), expected)
    kept = [name for name, letter in zip(names, mask, strict=True) if letter == "x"]
    assert list(extracted[1]._modules) == (list("0123")[: len(kept)] if names == list("0123") else kept)
    assert list(model[1]._modules) == names


def test_a_list_counts_from_zero_again():
    model = named(list("0123"), nn.ModuleList)
    subnet = Subnet(((True, False, True, False),))
    extracted = extract_subnet(model, subnet, example_inputs=X)
    assert list(extracted.blocks._modules) == ["0", "1"] and len(extracted.blocks) == 2
    torch.testing.assert_close(extracted(X), masked(model, subnet, X), rtol=0, atol=0)


class TwoArguments(Block):
    def forward(self, x, mask, *, scale=1.0):
        return x + torch.tanh(self.linear(x)) * mask * scale


class ReturnsTuple(Block):
    def forward(self, x, mask):
        return (x + torch.tanh(self.linear(x)) * mask,)


class ReturnsBoth(Block):
    def forward(self, x, mask):
        return x + torch.tanh(self.linear(x)) * mask, mask


class Attributes(nn.Module):
    """Blocks as attributes, called with two arguments."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 5)
        self.block1, self.block2, self.block3 = block(), block(), block()

    def forward(self, x):
        mask = (x.sum(-1, keepdim=True) > 0).to(x.dtype)
        x = self.stem(x)
        for block in (self.block1, self.block2, self.block3):
            y = block(x, mask, scale=2.0) if isinstance(self.block1, TwoArguments) else block(x, mask)
            x = y[0] if isinstance(y, tuple) else y
        return self.head(x)


@pytest.mark.parametrize("block", [TwoArguments, ReturnsTuple, ReturnsBoth])
def test_what_stands_for_a_block_takes_and_returns_what_it_did(block, tmp_path):
    model = Attributes(block).eval()
    expected = masked(model, (1,), X)
    extracted = extract_subnet(model, (1,), example_inputs=X)
    assert torch.equal(extracted(X), expected)
    torch.save({"stand_in": extracted.block2, "x": X}, tmp_path / "stand_in.pt")
    program = (
        "import sys, torch; d = torch.load(sys.argv[1], weights_only=False); y = d['stand_in'](d['x'], d['x'] + 1); "
        "y = y if isinstance(y, tuple) else (y,); assert torch.equal(y[0], d['x']); "
        "assert len(y) == 1 or torch.equal(y[1], d['x'] + 1); assert 'gkt_fast' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "stand_in.pt")], check=True, env=environment()
    )


class LooksAtItsBlocks(Loop):
    """Weighs what its blocks return by their number."""

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x) * (1 + i)
        return self.head(x)


class NumbersItsBlocks(Loop):
    def forward(self, x):
        x = self.stem(x)
        for i in range(4):
            x = self.blocks[i](x)
        return self.head(x)


def test_a_model_that_looks_at_its_blocks_is_refused_with_the_reason():
    torch.manual_seed(0)
    stages = ["blocks"]
    looks = LooksAtItsBlocks(nn.ModuleList(Block() for _ in range(4))).eval()
    subnet = Subnet(((True, False, True, True),))
    with pytest.raises(
        ValueError, match=r"extracted as x\.xx, LooksAtItsBlocks computes other logits \(largest"
    ):
        extract_subnet(looks, subnet, stages, example_inputs=X)
    numbers = NumbersItsBlocks(nn.ModuleList(Block() for _ in range(4))).eval()
    with pytest.raises(ValueError, match=r"NumbersItsBlocks fails with IndexError.*use active_subnet"):
        extract_subnet(numbers, (2,), stages, example_inputs=X)
    with pytest.raises(ValueError, match="NumbersItsBlocks fails"):
        evaluate_subnets(numbers, [(X, Y)], [(2,)], stages=stages)


def with_hooks(kind):
    """A network whose weights are computed by torch's hooks before every forward."""
    model = named(list("0123"))
    for block in model[1]:
        if kind == "weight_norm":
            torch.nn.utils.weight_norm(block.linear)
        elif kind == "spectral_norm":
            torch.nn.utils.spectral_norm(block.linear)
        else:
            prune.l1_unstructured(block.linear, "weight", 0.5)
    return model.train()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_weights_computed_by_hooks_are_copied(kind):
    model = with_hooks(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X)  # leaves computed weights
    trainer = GKTTrainer(model, optimizer, GKTConfig(execution="shared"), ema_decay=0.0)
    trainer.step(X, Y)
    trainer.step(X, Y)
    model.eval(), trainer.ema_model.eval()
    torch.testing.assert_close(trainer.ema_model(X), model(X))
    extracted = extract_subnet(model, (2,), example_inputs=X)
    torch.testing.assert_close(extracted(X), masked(model, (2,), X))
    GKT(extracted)(X, Y).loss.backward()


def test_configurations_that_count_layers_in_several_places_come_out_consistent(tmp_path):
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2, num_labels=5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = ModernBertForSequenceClassification(config).eval()
    kinds = list(config.layer_types)
    inputs = {"input_ids": torch.randint(3, 30, (2, 7))}
    subnet = Subnet(((True, False, True, True, False, True),))
    extracted = extract_subnet(model, subnet, example_inputs=inputs)
    assert extracted.config.num_hidden_layers == 4
    assert extracted.config.layer_types == [kinds[i] for i in (0, 2, 3, 5)]
    assert model.config.num_hidden_layers == 6 and model.config.layer_types == kinds
    extracted.save_pretrained(tmp_path)
    loaded = ModernBertForSequenceClassification.from_pretrained(tmp_path).eval()
    with active_subnet(model, subnet):
        expected = model(**inputs).logits
    torch.testing.assert_close(loaded(**inputs).logits, expected)
