"""gkt_fast.integrations.lightning against the real library."""

from __future__ import annotations

from functools import partial

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from gkt_fast import GKTConfig
from gkt_fast.integrations.lightning import GKTModule, network_state
from gkt_fast.models import cifar_resnet

pytestmark = pytest.mark.filterwarnings("ignore")

SGD = partial(torch.optim.SGD, lr=0.05)


def images(count: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 3)


def module(config: GKTConfig | None = None, **options) -> GKTModule:
    torch.manual_seed(0)
    return GKTModule(cifar_resnet(14, 3, width=4), config or GKTConfig(groups=2), optimizer=SGD, **options)


def fit(
    gkt_module: GKTModule, folder, *, batch: int = 4, val=None, ckpt_path=None, **options
) -> lightning.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    options = {"enable_checkpointing": False, "max_epochs": 1} | options
    trainer = lightning.Trainer(default_root_dir=folder, **quiet, **options)
    trainer.fit(gkt_module, DataLoader(images(), batch), val, ckpt_path=ckpt_path)
    return trainer


def weights(gkt_module: GKTModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in gkt_module.model.parameters()])


def test_accumulated_batches_share_one_set_of_subnets(tmp_path):
    gkt_module = module()
    steps, run = [], gkt_module.gkt.forward
    gkt_module.gkt.forward = lambda *args, step, **options: (
        steps.append(step) or run(*args, step=step, **options)
    )
    fit(gkt_module, tmp_path, batch=2, accumulate_grad_batches=2)
    assert steps == [0, 0, 1, 1]


def test_a_resumed_run_goes_on_with_the_next_step(tmp_path):
    whole, first, parts = module(), module(), module()
    fit(whole, tmp_path, max_epochs=2)
    trainer = fit(first, tmp_path)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(parts, tmp_path, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert parts.gkt.next_step == 4
    torch.testing.assert_close(weights(parts), weights(whole))
    state = network_state(torch.load(tmp_path / "x.ckpt", weights_only=True))
    assert state.keys() == cifar_resnet(14, 3, width=4).state_dict().keys()
    with pytest.raises(ValueError, match="holds no network of a GKTModule"):
        network_state({"state_dict": {"weight": 0}})


def test_logged_losses_and_accuracy(tmp_path):
    gkt_module = module(criterion=partial(F.cross_entropy, label_smoothing=0.1))
    trainer = fit(gkt_module, tmp_path, val=DataLoader(images(), 8))
    metrics = trainer.callback_metrics
    assert metrics["train_loss"] == pytest.approx(
        metrics["train_ce"].item() + metrics["train_kd"].item(), rel=1e-5
    )
    logits = gkt_module.eval()(images().tensors[0])
    targets = images().tensors[1]
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    assert metrics["val_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["val_accuracy"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())


def test_an_optimizer_is_wanted(tmp_path):
    with pytest.raises(NotImplementedError, match="give GKTModule an optimizer"):
        fit(GKTModule(cifar_resnet(14, 3, width=4)), tmp_path)
