"""gkt_fast.integrations.timm against the real library."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import (
    BinaryCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
    create_classification_loss,
)
from timm.task import ClassificationTask
from torch import nn

from gkt_fast import GKTConfig
from gkt_fast.integrations.timm import GKTTask

IMAGES, TARGETS = torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 2])
SOFT = torch.softmax(torch.randn(4, 3), 1)


def network(name: str = "resnet10t", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options)


def vit() -> nn.Module:
    return network("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    "criterion, targets",
    [
        (nn.CrossEntropyLoss(), TARGETS),
        (nn.CrossEntropyLoss(label_smoothing=0.2), TARGETS),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), TARGETS),
        (LabelSmoothingCrossEntropy(0.1), TARGETS),
        (SoftTargetCrossEntropy(), SOFT),
        (BinaryCrossEntropy(0.1), TARGETS),
        (BinaryCrossEntropy(target_threshold=0.3), SOFT),
        (create_classification_loss("asl"), TARGETS),
        (create_classification_loss("poly"), TARGETS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_criterion_is_that_of_timms_own_task(criterion, targets):
    config = GKTConfig(groups=2)
    task = GKTTask(network(), criterion, config)
    result = task.train()(IMAGES, targets)
    plain = ClassificationTask(network(), criterion).train()(IMAGES, targets)
    torch.testing.assert_close(result["output"], plain["output"].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["ce_loss"], plain["loss"].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["loss"].detach(), result["ce_loss"] + result["kd_loss"])


def test_without_a_criterion_it_is_made_as_timm_makes_it():
    task = GKTTask(network(), criterion_kwargs={"smoothing": 0.1}, config=GKTConfig(groups=2))
    assert isinstance(task.criterion, LabelSmoothingCrossEntropy)
    assert task.gkt.config.label_smoothing == 0.1
    with pytest.raises(
        ValueError, match=r"label_smoothing is 0\.2 in the configuration and 0\.1 in the criterion"
    ):
        GKTTask(network(), LabelSmoothingCrossEntropy(0.1), GKTConfig(label_smoothing=0.2))
    with pytest.raises(ValueError, match="label_smoothing"):
        GKTTask(network(), BinaryCrossEntropy(), GKTConfig(label_smoothing=0.2))


def test_checkpoints_hold_the_network_the_step_and_averages(tmp_path):
    task = GKTTask(network(), config=GKTConfig(groups=2))
    task.setup_ema(decay=0.5)
    for _ in range(2):
        task(IMAGES, TARGETS)["loss"].backward()
        task.update_ema()
    torch.save(task.get_checkpoint_state() | task.get_checkpoint_state(ema=True), tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state["state_dict"].keys() == network().state_dict().keys() == state["state_dict_ema"].keys()
    again = GKTTask(network(), config=GKTConfig(groups=2))
    again.setup_ema(decay=0.5)
    again.load_checkpoint_state(state["state_dict"], state["task_state"])
    again.load_checkpoint_state(state["state_dict_ema"], state["task_state_ema"], ema=True)
    assert again.gkt.next_step == 2
    for ema in (False, True):
        here, there = (t.get_eval_model(ema=ema).state_dict().values() for t in (task, again))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_checkpoint_of_another_task_is_said_to_restart_the_steps(caplog):
    plain = ClassificationTask(network())
    task = GKTTask(network(), config=GKTConfig(groups=2))
    task.load_checkpoint_state(plain.get_checkpoint_state()["state_dict"])
    assert "subnets are drawn from step 0 on" in caplog.text


def test_grad_checkpointing_gives_the_same_gradients():
    results = []
    for checkpointing in (False, True):
        model = vit()
        model.set_grad_checkpointing(checkpointing)
        task = GKTTask(model, config=GKTConfig(groups=2)).train()
        task(IMAGES, TARGETS)["loss"].backward()
        results.append(gradients(model))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
def test_torchcompile_compiles_the_blocks():
    model = vit()
    task = GKTTask(model, config=GKTConfig(groups=2))
    assert task.compile(backend="eager") is model
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert model._compiled_call_impl is None
    expected = GKTTask(vit(), config=GKTConfig(groups=2))
    for t in (task, expected):
        t.train()(IMAGES, TARGETS)["loss"].backward()
    for compiled, eager in zip(gradients(model), gradients(expected.gkt.model), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_accumulated_batches_share_one_set_of_subnets():
    task = GKTTask(network(), config=GKTConfig(groups=2), accumulate=2)
    steps, run = [], task.gkt.forward
    task.gkt.forward = lambda *args, step: steps.append(step) or run(*args, step=step)
    for _ in range(2):  # epochs of three batches: train.py steps after the last one
        task.train()
        for _ in range(3):
            task(IMAGES, TARGETS)
    assert steps == [0, 0, 1, 2, 2, 3]


def test_validation_is_of_the_network_alone():
    task = GKTTask(network(), config=GKTConfig(groups=2))
    model = task.get_eval_model().eval()
    assert model is task.gkt.model
    assert model(IMAGES).shape == (4, 3)
    evaluator = task.create_evaluator()
    evaluator.update(model(IMAGES), TARGETS)
    assert evaluator.compute()["loss"] == pytest.approx(
        F.cross_entropy(model(IMAGES), TARGETS).item(), rel=1e-5
    )
