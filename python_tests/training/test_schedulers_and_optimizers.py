"""Schedulers and optimizers that want something in their step: they get it, or are refused where they are given."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)  # fmt: skip

from gkt_fast import GKTTrainer
from gkt_fast.models import cifar_resnet
from gkt_fast.training.checkpoint import load_checkpoint

BATCHES = [(torch.randn(6, 3, 8, 8), torch.randint(5, (6,)))]


def parts(lr=0.1):
    model = cifar_resnet(8, num_classes=5, width=4)
    return model, torch.optim.SGD(model.parameters(), lr)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_watches_the_validation(mode, tmp_path):
    """A threshold that nothing passes: the rate falls after `patience` epochs without improvement, and so on resume."""
    model, optimizer = parts()

    seen = []

    class Recorded(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics, epoch)

    scheduler = Recorded(optimizer, mode=mode, patience=0, threshold=1e9, threshold_mode="abs", factor=0.5)
    trainer = GKTTrainer(model, optimizer, scheduler=scheduler)
    history = trainer.fit(BATCHES, epochs=3, val_loader=BATCHES, progress=False, output_dir=tmp_path)
    name = {"min": "val_loss", "max": "val_accuracy"}[mode]
    assert seen == [metrics[name] for metrics in history]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)

    again, fresh = parts()
    resumed = GKTTrainer(again, fresh, scheduler=ReduceLROnPlateau(fresh, mode=mode))
    resumed.load_checkpoint(tmp_path / "last.pt")
    assert resumed.scheduler.best == scheduler.best and fresh.param_groups[0]["lr"] == pytest.approx(0.025)


def test_plateau_without_a_validation_is_refused_before_training():
    model, optimizer = parts()
    trainer = GKTTrainer(model, optimizer, scheduler=ReduceLROnPlateau(optimizer))
    with pytest.raises(
        ValueError, match="ReduceLROnPlateau, which watches the validation; pass a val_loader"
    ):
        trainer.fit(BATCHES, epochs=1, progress=False)
    assert trainer.gkt.next_step == 0


def test_plateau_by_steps_is_refused():
    model, optimizer = parts()
    with pytest.raises(ValueError, match=r"scheduler_interval is 'step'.*after every epoch"):
        GKTTrainer(model, optimizer, scheduler=ReduceLROnPlateau(optimizer), scheduler_interval="step")


class WantsTheEpoch:
    """As timm's schedulers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, epoch, metric=None):
        raise AssertionError


def test_steps_that_need_an_argument_are_refused_where_they_are_given():
    model, optimizer = parts()
    with pytest.raises(TypeError, match=r"scheduler is WantsTheEpoch, whose step\(\) needs epoch;"):
        GKTTrainer(model, optimizer, scheduler=WantsTheEpoch(optimizer))
    trainer = GKTTrainer(model, optimizer)
    with pytest.raises(TypeError, match="WantsTheEpoch"):
        trainer.scheduler = WantsTheEpoch(optimizer)
    with pytest.raises(TypeError, match=r"optimizer is LBFGS, whose step\(\) needs closure"):
        GKTTrainer(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10),
        lambda optimizer: SequentialLR(
            optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, 3)], milestones=[1]
        ),
        lambda optimizer: ChainedScheduler([LinearLR(optimizer), CosineAnnealingLR(optimizer, 3)]),
    ],
)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_other_schedulers_of_torch_work(make, interval):
    """They put a function of their own in place of the optimizer's `step`."""
    model, optimizer = parts()
    trainer = GKTTrainer(model, optimizer, scheduler=make(optimizer), scheduler_interval=interval)
    trainer.fit(BATCHES, epochs=1, progress=False)


def test_checkpoints_of_a_zero_redundancy_optimizer(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:

        def trainer():
            model, _ = parts()
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
            return GKTTrainer(model, optimizer)

        first = trainer()
        first.fit(BATCHES, epochs=1, progress=False, output_dir=tmp_path)
        momenta = load_checkpoint(tmp_path / "last.pt")["optimizer"]["state"]
        assert len(momenta) == len([*first.model.parameters()])
        second = trainer()
        second.load_checkpoint(tmp_path / "last.pt")
        second.optimizer.consolidate_state_dict(to=0)
        loaded = second.optimizer.state_dict()["state"]
        for index, state in momenta.items():
            assert torch.equal(loaded[index]["momentum_buffer"], state["momentum_buffer"])
        with pytest.raises(
            ValueError, match="skip_nonfinite is True, and the optimizer is ZeroRedundancyOptimizer"
        ):
            GKTTrainer(first.model, first.optimizer, skip_nonfinite=True)
    finally:
        dist.destroy_process_group()
