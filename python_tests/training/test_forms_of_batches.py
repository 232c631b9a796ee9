"""Batches that are mappings or hold several inputs: trained on, evaluated and calibrated as tensors are."""

from __future__ import annotations

import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn

from gkt_fast import (
    GKT,
    GKTConfig,
    GKTTrainer,
    evaluate,
    evaluate_subnets,
    method_config,
    recalibrate_batch_norm,
)

CLASSES = 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.conv(x)))


class Net(nn.Module):
    """Takes the image and a vector, by position or by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(*[Block() for _ in range(3)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, image, vector):
        return self.head(torch.cat([self.blocks(self.stem(image)).mean((2, 3)), vector], 1))


class FromDict(Net):
    """The same, from one argument."""

    def forward(self, batch):
        return super().forward(batch["image"], batch["vector"])


X, V, Y = torch.randn(8, 3, 8, 8), torch.randn(8, 2), torch.randint(CLASSES, (8,))

BATCHES = {
    "tuple": (Net, ((X, V), Y)),
    "list": (Net, [[X, V], Y]),
    "mapping of arguments": (Net, {"vector": V, "image": X, "labels": Y}),
    "mapping in a pair": (Net, ({"image": X, "vector": V}, Y)),
    "one mapping": (FromDict, {"image": X, "vector": V, "label": Y}),
}


def run(name, mode):
    build, batch = BATCHES[name]
    trainer = GKTTrainer(
        model := build(), torch.optim.SGD(model.parameters(), 0.1), GKTConfig(execution=mode)
    )
    history = trainer.fit([batch, batch], epochs=1, val_loader=[batch], progress=False)
    recalibrate_batch_norm(model, [batch], 6)
    table = evaluate_subnets(model, [batch], [(2,)], calibration_loader=[batch])
    evaluation = evaluate(model, [batch])
    numbers = history[0]["train_loss"], evaluation.loss, evaluation.accuracy, table[0].loss, table[0].flops
    return numbers, trainer.gkt.explain().partition(",")[2]


@pytest.mark.parametrize("mode", ["auto", "shared", "lean", "sequential"])
@pytest.mark.parametrize("name", [*BATCHES][1:])
def test_every_form_trains_and_evaluates_as_a_tuple_does(name, mode):
    expected, actual = run("tuple", mode), run(name, mode)
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert actual[1] == expected[1]


def test_gradients_of_inputs_in_a_mapping():
    found = []
    for mode in ("shared", "lean", "sequential"):
        image = X.clone().requires_grad_()
        GKT(Net(), GKTConfig(execution=mode))({"image": image, "vector": V}, Y).loss.backward()
        found.append(image.grad)
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("inputs", [{"image": X, "vector": V}, (X, V)])
def test_images_are_resized_wherever_they_are(inputs):
    model, seen = Net(), []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    GKT(model, method_config("st++", image_size=8).replace(subnet_resolution=4))(inputs, Y)
    assert seen[0] == 8 and set(seen[1:]) == {4}


def test_inputs_without_images_to_resize_are_refused():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 4), nn.Sequential(Linear(), Linear()), nn.Linear(4, CLASSES)
    )
    gkt = GKT(model, method_config("st++", image_size=8).replace(subnet_resolution=4))
    with pytest.raises(
        ValueError, match=r"floating point tensors \(B, C, H, W\).*\(8, 3\) torch.float32.*=None"
    ):
        gkt(torch.randn(8, 3), Y)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x)


def test_fit_says_what_a_batch_must_be():
    trainer = GKTTrainer(model := Net(), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"a tuple of 3.*it must be a pair"):
        trainer.fit([(X, V, Y)], epochs=1, progress=False)


def test_evaluation_says_what_targets_must_be():
    model = Net()
    with pytest.raises(TypeError, match=r"torch.float32 of shape \(8, 5\).*argmax"):
        evaluate(model, [((X, V), torch.randn(8, CLASSES).softmax(1))])
    with pytest.raises(ValueError, match=r"shape \(8, 1\).*must have shape \(8,\).*squeeze"):
        evaluate(model, [((X, V), Y[:, None])])
    with pytest.raises(TypeError, match="targets is a list"):
        evaluate(model, [((X, V), Y.tolist())])
