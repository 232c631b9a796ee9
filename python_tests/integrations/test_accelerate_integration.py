"""gkt_fast.integrations.accelerate against the real library."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from gkt_fast import GKT, GKTConfig
from gkt_fast.integrations.accelerate import GKTStep, unwrap_network
from gkt_fast.models import cifar_resnet


def prepared(accelerator: Accelerator, batch: int):
    torch.manual_seed(0)
    gkt = GKT(cifar_resnet(14, 3, width=4), GKTConfig(groups=2))
    optimizer = torch.optim.SGD(gkt.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 3)
    return accelerator.prepare(gkt, optimizer, DataLoader(data, batch))


def run(accelerator: Accelerator, gkt, optimizer, loader) -> list[int]:
    """One epoch; returns the step that each batch's subnets were drawn by."""
    step, steps = GKTStep(accelerator, gkt), []
    inner = accelerator.unwrap_model(gkt)
    gkt.train()
    for images, targets in loader:
        with accelerator.accumulate(gkt):
            output = step(images, targets)
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
        steps.append(inner.next_step - 1)
        assert output.subnets == inner.sample(steps[-1])
    return steps


def test_accumulated_batches_share_one_set_of_subnets():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert run(accelerator, *prepared(accelerator, 2)) == [0, 0, 1, 1]


def test_a_last_step_of_fewer_batches_ends_its_set():
    """Accelerate steps at the end of the loader even where batches are missing."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    parts = prepared(accelerator, 2)
    assert run(accelerator, *parts) == [0, 0, 0, 1]
    assert run(accelerator, *parts) == [2, 2, 2, 3]


def test_saved_states_hold_the_step(tmp_path):
    accelerator = Accelerator(cpu=True)
    gkt, optimizer, loader = prepared(accelerator, 4)
    run(accelerator, gkt, optimizer, loader)
    accelerator.save_state(str(tmp_path))
    run(accelerator, gkt, optimizer, loader)
    accelerator.load_state(str(tmp_path))
    assert accelerator.unwrap_model(gkt).next_step == 2
    assert run(accelerator, gkt, optimizer, loader) == [2, 3]
    assert unwrap_network(accelerator, gkt) is accelerator.unwrap_model(gkt).model


def test_only_a_prepared_gkt_is_taken():
    with pytest.raises(TypeError, match="gkt is CifarResNet; it must be the prepared"):
        GKTStep(Accelerator(cpu=True), cifar_resnet(14, 3, width=4))
