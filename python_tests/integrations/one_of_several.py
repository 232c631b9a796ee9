"""Trains two optimizer steps in a library's loop; started by test_several_processes.py, by itself or under torchrun.

python one_of_several.py LIBRARY EXECUTION OUTPUT

Two processes take a batch of 2 each. One process takes the same batches one after the other and accumulates them: the
gradients, and with them the weights, must be the same.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from gkt_fast import GKT, GKTConfig
from gkt_fast.models import cifar_resnet

LIBRARY, EXECUTION, OUTPUT = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANKS = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
ACCUMULATED = 2 // RANKS
CONFIG = GKTConfig(groups=2, execution=EXECUTION)
SGD = partial(torch.optim.SGD, lr=0.05)


def network() -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(14, 3, width=4)


def images() -> Subset:
    """In the order in which two ranks' DistributedSampler hands them out, for one process batch by batch."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 3)
    return Subset(data, range(8) if RANKS == 2 else [0, 2, 1, 3, 4, 6, 5, 7])


def with_lightning() -> nn.Module:
    import lightning

    from gkt_fast.integrations.lightning import GKTModule

    module = GKTModule(network(), CONFIG, optimizer=SGD)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp" if RANKS > 1 else "auto",
        accumulate_grad_batches=ACCUMULATED,
        enable_checkpointing=False,
        use_distributed_sampler=False,  # Lightning's own shuffles
        **quiet,
    )
    trainer.fit(module, DataLoader(Subset(images(), range(RANK, 8, RANKS)), 2))
    assert trainer.global_step == 2
    return module.model


def with_accelerate() -> nn.Module:
    from accelerate import Accelerator, DataLoaderConfiguration

    from gkt_fast.integrations.accelerate import GKTStep, unwrap_network

    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATED,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
    )
    gkt = GKT(network(), CONFIG)
    data = images()
    if RANKS == 2:  # Accelerate's ranks take whole batches in turn
        data = Subset(data, [0, 2, 1, 3, 4, 6, 5, 7])
    gkt, optimizer, loader = accelerator.prepare(gkt, SGD(gkt.parameters()), DataLoader(data, 2))
    step = GKTStep(accelerator, gkt)
    for x, y in loader:
        with accelerator.accumulate(gkt):
            accelerator.backward(step(x, y).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.unwrap_model(gkt).next_step == 2
    return unwrap_network(accelerator, gkt)


def with_timm() -> nn.Module:
    from gkt_fast.distributed import torchrun_process_group
    from gkt_fast.integrations.timm import GKTTask

    with torchrun_process_group("cpu"):
        task = GKTTask(network(), config=CONFIG, accumulate=ACCUMULATED)
        if RANKS > 1:
            task.prepare_distributed()
        optimizer = SGD(task.gkt.model.parameters())
        data = images()
        batches = list(DataLoader(Subset(data, range(RANK, 8, RANKS)), 2))
        for number, (x, y) in enumerate(batches):
            (task(x, y)["loss"] / ACCUMULATED).backward()
            if (number + 1) % ACCUMULATED == 0:
                optimizer.step()
                optimizer.zero_grad()
        return task.get_eval_model()


def with_huggingface() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

    from gkt_fast.integrations.huggingface import Trainer

    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 2], "layer_type": "basic"}
    settings = TrainingArguments(
        str(OUTPUT.with_suffix(".run")),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = images()
    if RANKS == 2:
        data = Subset(data, [0, 2, 1, 3, 4, 6, 5, 7])
    trainer = Trainer(
        ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes)),
        settings,
        gkt=CONFIG,
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in data],
    )
    trainer.train()
    return trainer.model


warnings.simplefilter("ignore")
model = globals()[f"with_{LIBRARY}"]()
if RANK == 0:
    torch.save(dict(model.named_parameters()), OUTPUT)
