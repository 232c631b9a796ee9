"""gkt_fast.integrations.huggingface against the real library."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from gkt_fast import GKTConfig
from gkt_fast.integrations.huggingface import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


class Images(Dataset):
    def __init__(self, count: int = 8, multi_label: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 16, 16, generator=generator)
        self.labels = torch.arange(count) % 3
        if multi_label:
            self.labels = torch.rand(count, 3, generator=generator).round()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def resnet(**options) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes, **options))


def vit(**options) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(
        ViTConfig(num_labels=3, image_size=16, patch_size=8, **sizes, **dropout, **options)
    )


def arguments(folder, **options) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": "none", "disable_tqdm": True,
                "use_cpu": True, "learning_rate": 0.05, "optim": "sgd", "save_strategy": "no", "seed": 0,
                "lr_scheduler_type": "constant", "max_grad_norm": 0}  # fmt: skip
    return TrainingArguments(str(folder), **defaults | options)


def train(folder, model, config=None, **options):
    resume = options.pop("resume_from_checkpoint", None)
    trainer_options = {name: options.pop(name) for name in ("criterion", "train_dataset") if name in options}
    trainer_options.setdefault("train_dataset", Images())
    trainer = Trainer(
        model, arguments(folder, **options), gkt=config or GKTConfig(groups=2), **trainer_options
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_saved_folders_load_from_pretrained(tmp_path):
    trainer = train(tmp_path, resnet(), save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "model", tmp_path / "checkpoint-2"):
        assert json.loads((folder / "config.json").read_text())["architectures"] == [
            "ResNetForImageClassification"
        ]
        again = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(weights(again), weights(trainer.model))
    assert trainer.model.config.num_labels == 3


def test_a_step_is_gkts(tmp_path):
    """One optimizer step of SGD by hand, with the same batch."""
    from gkt_fast import GKT

    trainer = train(tmp_path, resnet(), max_steps=1, per_device_train_batch_size=8)
    model = resnet().train()
    gkt = GKT(model, GKTConfig(groups=2))
    data = Images()
    gkt(data.images, data.labels, step=0).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    torch.testing.assert_close(weights(trainer.model), weights(model), rtol=1e-4, atol=1e-5)


def test_accumulated_batches_share_one_set_of_subnets(tmp_path):
    trainer = Trainer(
        resnet(),
        arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        gkt=GKTConfig(groups=2),
        train_dataset=Images(),
    )
    steps, run = [], trainer.gkt.forward
    trainer.gkt.forward = lambda *args, step, **options: (
        steps.append(step) or run(*args, step=step, **options)
    )
    trainer.train()
    assert steps == [0, 0, 1, 1]


def test_a_resumed_run_goes_on_with_the_trainers_step(tmp_path):
    whole = train(tmp_path / "whole", resnet(), max_steps=4)
    train(tmp_path / "parts", resnet(), save_strategy="steps", save_steps=2)
    parts = train(
        tmp_path / "parts",
        resnet(),
        max_steps=4,
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"),
    )
    assert parts.gkt.next_step == 4
    torch.testing.assert_close(weights(parts.model), weights(whole.model))


def test_label_smoothing_factor_is_gkts(tmp_path):
    smoothed = train(tmp_path, resnet(), label_smoothing_factor=0.2)
    assert smoothed.gkt.config.label_smoothing == 0.2
    same = train(tmp_path, resnet(), GKTConfig(groups=2, label_smoothing=0.2))
    torch.testing.assert_close(weights(smoothed.model), weights(same.model))
    with pytest.raises(ValueError, match="label_smoothing_factor is"):
        Trainer(resnet(), arguments(tmp_path, label_smoothing_factor=0.2), gkt=GKTConfig(label_smoothing=0.1))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    plain = train(tmp_path, vit())
    checkpointed = train(tmp_path, vit(), gradient_checkpointing=True)
    torch.testing.assert_close(weights(checkpointed.model), weights(plain.model), rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_models_own(tmp_path):
    trainer = train(tmp_path, resnet(), label_smoothing_factor=0.0, max_steps=1)
    data = Images()
    loss = trainer.evaluate(data)["eval_loss"]
    with torch.no_grad():
        expected = trainer.model.eval()(data.images, labels=data.labels).loss
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.predict(data).predictions.shape == (8, 3)


def test_multi_label_models_train_on_binary_cross_entropy(tmp_path):
    model = resnet(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="it must be 'sigmoid'"):
        Trainer(model, arguments(tmp_path), gkt=GKTConfig(groups=2))
    data = Images(multi_label=True)
    trainer = train(tmp_path, model, GKTConfig(groups=2, distillation="sigmoid"), train_dataset=data)
    assert trainer.gkt.criterion is F.binary_cross_entropy_with_logits
    assert trainer.evaluate(data)["eval_loss"] > 0


@pytest.mark.parametrize(
    "options, model_options, message",
    [
        ({"torch_compile": True}, {}, "torch_compile"),
        ({}, {"problem_type": "regression"}, "problem_type is 'regression'"),
    ],
)
def test_what_gkt_cannot_do_is_refused(tmp_path, options, model_options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(resnet(**model_options), arguments(tmp_path, **options), gkt=GKTConfig(groups=2))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    settings = arguments(tmp_path)
    settings._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel"):
        Trainer(resnet(), settings, gkt=GKTConfig(groups=2))


def test_batches_without_labels_and_unknown_inputs(tmp_path):
    class Unlabelled(Images):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"pixel_values": self.images[index]}

    with pytest.raises(ValueError, match="the batch has no labels; it has pixel_values"):
        train(tmp_path, resnet(), train_dataset=Unlabelled())
