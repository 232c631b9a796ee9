"""Knowledge kept by sample, in loops that don't say which samples a batch holds: refused before anything runs."""

from __future__ import annotations

import pytest
import torch

from gkt_fast import GKTConfig
from gkt_fast.integrations.knowledge import refuse_knowledge_by_sample
from gkt_fast.models import cifar_resnet

CONFIG = GKTConfig(knowledge="dataset")


def test_what_is_refused():
    refuse_knowledge_by_sample(GKTConfig(chain="steps"), "a loop")
    with pytest.raises(ValueError, match=r"needs the indices of a batch's samples, and a loop has none; use"):
        refuse_knowledge_by_sample(CONFIG, "a loop")


def test_lightning_refuses():
    pytest.importorskip("lightning", reason="needs lightning")
    from gkt_fast.integrations.lightning import GKTModule

    with pytest.raises(ValueError, match="Lightning's training step has none"):
        GKTModule(cifar_resnet(14, 5, width=4), CONFIG)


def test_timm_refuses():
    pytest.importorskip("timm", reason="needs timm")
    from gkt_fast.integrations.timm import GKTTask

    with pytest.raises(ValueError, match="timm's task has none"):
        GKTTask(cifar_resnet(14, 5, width=4), torch.nn.CrossEntropyLoss(), CONFIG)


def test_transformers_refuses(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from gkt_fast.integrations.huggingface import Trainer

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], num_labels=3)
    with pytest.raises(ValueError, match="transformers' Trainer has none"):
        Trainer(
            transformers.ResNetForImageClassification(config),
            transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            gkt=CONFIG,
        )
