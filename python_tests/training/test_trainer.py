"""GKTTrainer: steps, fit with its files, exact resume, interruption, and what it says when something is wrong."""

from __future__ import annotations

import csv
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gkt_fast import CheckpointError, GKTConfig, GKTTrainer, NonFiniteLossError
from gkt_fast.models import cifar_resnet
from gkt_fast.training.checkpoint import load_checkpoint


def images(samples: int = 60, seed: int = 0) -> TensorDataset:
    """Noise with a class-dependent mean: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(5, (samples,), generator=generator)
    return TensorDataset(
        torch.randn(samples, 3, 8, 8, generator=generator) + targets.view(-1, 1, 1, 1) - 2, targets
    )


def make(
    seed: int = 0, config: GKTConfig | None = None, width: int = 4, epochs: int = 4, **options
) -> tuple[GKTTrainer, DataLoader]:
    torch.manual_seed(seed)
    model = cifar_resnet(14, num_classes=5, width=width)
    model.fc = nn.Sequential(nn.Dropout(0.2), model.fc)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = DataLoader(images(), 20, shuffle=True)
    return GKTTrainer(model, optimizer, config or GKTConfig(), scheduler=scheduler, **options), loader


def states_equal(a: GKTTrainer, b: GKTTrainer) -> bool:
    """Bit equality of weights, buffers and momentum, and equal counters and learning rate."""
    momentum_a, momentum_b = (
        [state["momentum_buffer"] for state in trainer.optimizer.state.values()] for trainer in (a, b)
    )
    pairs = [*zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)]
    pairs += [*zip(momentum_a, momentum_b, strict=True)]
    counters = [
        (t.epoch, t.gkt.next_step, t.best_accuracy, t.optimizer.param_groups[0]["lr"]) for t in (a, b)
    ]
    return all(torch.equal(x, y) for x, y in pairs) and counters[0] == counters[1]


def rows(folder: Path) -> list[dict[str, str]]:
    """summary.csv without the columns that measure time."""
    with open(folder / "summary.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in csv.DictReader(file)
        ]


def test_step_returns_detached_fields_and_trains():
    trainer, loader = make()
    batch = next(iter(loader))
    first = trainer.step(*batch)
    assert not first.loss.requires_grad
    assert first.logits.shape == (20, 5)
    assert first.kd.shape == (3,)
    assert len(first.subnets) == 3
    for _ in range(30):
        last = trainer.step(*batch)
    assert last.ce < 0.5 * first.ce


@pytest.mark.parametrize("execution", ["sequential", "shared"])
def test_fit_learns_and_writes_its_files(tmp_path, execution):
    trainer, loader = make(config=GKTConfig(execution=execution), epochs=8)
    history = trainer.fit(loader, epochs=8, val_loader=loader, output_dir=tmp_path, progress=False)
    assert [row["epoch"] for row in history] == list(range(8))
    assert history[-1]["val_accuracy"] > 0.4  # five classes
    assert history[-1]["train_ce"] < history[0]["train_ce"]
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt", "summary.csv", "config.yaml"}
    assert len(rows(tmp_path)) == 8
    assert GKTConfig.from_yaml(tmp_path / "config.yaml") == trainer.config
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["best_accuracy"] == max(row["val_accuracy"] for row in history)


def test_resume_between_epochs_equals_an_uninterrupted_run(tmp_path):
    whole, loader = make()
    whole.fit(loader, epochs=4, val_loader=loader, output_dir=tmp_path / "whole", progress=False)
    part, loader = make()
    part.fit(loader, epochs=2, val_loader=loader, output_dir=tmp_path / "parts", progress=False)
    resumed, loader = make(seed=99)
    resumed.fit(loader, epochs=4, val_loader=loader, output_dir=tmp_path / "parts", progress=False)
    assert states_equal(whole, resumed)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_resume_with_a_loader_generator_equals_an_uninterrupted_run(tmp_path):
    def loader() -> DataLoader:
        return DataLoader(images(), 20, shuffle=True, generator=torch.Generator().manual_seed(5))

    whole, _ = make()
    whole.fit(loader(), epochs=3, progress=False)
    part, _ = make()
    part.fit(loader(), epochs=1, output_dir=tmp_path, progress=False)
    resumed, _ = make(seed=99)
    resumed.fit(loader(), epochs=3, output_dir=tmp_path, progress=False)
    assert states_equal(whole, resumed)


@pytest.mark.parametrize("interrupt_at", [1, 4, 6])
def test_ctrl_c_leaves_a_checkpoint_from_which_training_goes_on_exactly(tmp_path, interrupt_at):
    whole, loader = make()
    whole.fit(loader, epochs=3, val_loader=loader, output_dir=tmp_path / "whole", progress=False)
    stopped, loader = make()
    step = stopped.step
    calls = 0

    def step_with_interrupt(*batch):
        nonlocal calls
        calls += 1
        if calls == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*batch)

    stopped.step = step_with_interrupt
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(loader, epochs=3, val_loader=loader, output_dir=tmp_path / "parts", progress=False)
    assert stopped.gkt.next_step == interrupt_at
    resumed, loader = make(seed=99)
    resumed.fit(loader, epochs=3, val_loader=loader, output_dir=tmp_path / "parts", progress=False)
    assert states_equal(whole, resumed)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_interrupt_handler_is_restored(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer, loader = make()
    trainer.fit(loader, epochs=1, progress=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_false_starts_anew(tmp_path):
    trainer, loader = make()
    trainer.fit(loader, epochs=1, output_dir=tmp_path, progress=False)
    again, loader = make()
    history = again.fit(loader, epochs=1, output_dir=tmp_path, resume=False, progress=False)
    assert len(history) == 1
    assert states_equal(trainer, again)


def test_cut_off_checkpoint_is_refused_and_the_others_untouched(tmp_path):
    trainer, loader = make()
    trainer.fit(loader, epochs=1, val_loader=loader, output_dir=tmp_path, progress=False)
    good = (tmp_path / "best.pt").read_bytes()
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").unlink()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "last.pt").write_bytes(whole[:size])
        fresh, loader = make(seed=3)
        before = {key: value.clone() for key, value in fresh.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"last\.pt can't be read; it may be cut off or damaged"):
            fresh.fit(loader, epochs=2, output_dir=tmp_path, progress=False)
        assert all(torch.equal(before[key], value) for key, value in fresh.model.state_dict().items())
    assert (tmp_path / "best.pt").read_bytes() == good
    fresh.fit(loader, epochs=2, output_dir=tmp_path, resume=tmp_path / "best.pt", progress=False)
    assert fresh.epoch == 2


def test_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path):
    trainer, loader = make()
    trainer.fit(loader, epochs=1, output_dir=tmp_path, progress=False)
    other, loader = make(width=8)
    before = {key: value.clone() for key, value in other.model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"of another model than CifarResNet: \d+ of another shape \(conv1"
    ):
        other.fit(loader, epochs=2, output_dir=tmp_path, progress=False)
    assert all(torch.equal(before[key], value) for key, value in other.model.state_dict().items())


def test_checkpoint_with_another_optimizer_schedule_or_groups_is_refused(tmp_path):
    trainer, loader = make()
    trainer.fit(loader, epochs=1, output_dir=tmp_path, progress=False)
    model = trainer.model
    split = torch.optim.SGD([{"params": [p]} for p in model.parameters()], 0.05, momentum=0.9)
    with pytest.raises(CheckpointError, match="optimizer parameter groups of sizes"):
        GKTTrainer(model, split).load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="was written with a scheduler; this trainer is without"):
        GKTTrainer(model, trainer.optimizer).load_checkpoint(tmp_path / "last.pt")
    groups, _ = make(config=GKTConfig(groups=2))
    with pytest.raises(CheckpointError, match="was written with groups=3, not 2"):
        groups.load_checkpoint(tmp_path / "last.pt")


def test_missing_checkpoint_and_foreign_files_are_named(tmp_path):
    trainer, _ = make()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere\.pt"):
        trainer.load_checkpoint(tmp_path / "nowhere.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt is not a gkt_fast checkpoint"):
        trainer.load_checkpoint(tmp_path / "foreign.pt")


def test_loading_a_checkpoint_executes_no_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": 1, "model": Malicious()}, tmp_path / "bad.pt")
    trainer, _ = make()
    with pytest.raises(CheckpointError, match="can't be read"):
        trainer.load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


def test_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    trainer, loader = make()
    trainer.fit(loader, epochs=1, output_dir=tmp_path, progress=False)
    good = (tmp_path / "last.pt").read_bytes()
    poisoned = images()
    poisoned.tensors[0][:] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 3 \(epoch 2\)"):
        trainer.fit(DataLoader(poisoned, 20), epochs=2, output_dir=tmp_path, resume=False, progress=False)
    assert (tmp_path / "last.pt").read_bytes() == good


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("execution", ["sequential", "shared"])
def test_mixed_precision_trains(amp, execution):
    trainer, loader = make(amp=amp, config=GKTConfig(execution=execution))
    batch = next(iter(loader))
    losses = [float(trainer.step(*batch).ce) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_modes_agree_under_float16_loss_scaling():
    weights = []
    for execution in ("sequential", "shared"):
        trainer, loader = make(amp="fp16", config=GKTConfig(execution=execution))
        trainer.model.fc[0].p = 0.0  # streams of a shared state share their noise, others don't
        trainer.step(*next(iter(loader)))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(weights[0], weights[1], rtol=2e-2, atol=2e-3)


def test_evaluate_subnet_restores_the_model():
    trainer, loader = make()
    trainer.fit(loader, epochs=1, progress=False)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.gkt.train()
    full = trainer.evaluate(loader)
    subnet = trainer.evaluate(loader, (1, 1, 1), calibration_loader=loader)
    assert full.samples == subnet.samples == 60
    assert 0 <= subnet.accuracy <= 1
    assert trainer.model.training
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())


def test_progress_is_plain_lines_without_a_terminal(capsys):
    trainer, loader = make()
    trainer.fit(loader, epochs=1, val_loader=loader, log_interval=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Train: 1/1 [2/3] train_loss ")
    assert lines[-1].startswith("Epoch 1/1: step 3 train_loss ")
    assert "val_accuracy" in lines[-1]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    trainer, loader = make()
    trainer.fit(loader, epochs=1, log_interval=1)
    captured = capsys.readouterr()
    assert "epoch 1/1" in captured.err
    assert "Train:" not in captured.out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amp": "fp8"}, ValueError, "amp is 'fp8'; it must be None, 'bf16' or 'fp16'"),
        ({"scheduler_interval": "batch"}, ValueError, "scheduler_interval is 'batch'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_bad_fit_arguments_are_named():
    trainer, loader = make()
    with pytest.raises(ValueError, match="epochs is -1; it must be at least 0"):
        trainer.fit(loader, epochs=-1)
    with pytest.raises(ValueError, match="log_interval is 0; it must be at least 1"):
        trainer.fit(loader, epochs=1, log_interval=0)
    with pytest.raises(ValueError, match="train_loader gave no batch"):
        trainer.fit([], epochs=1, progress=False)
    with pytest.raises(TypeError, match="optimizer is str"):
        GKTTrainer(trainer.model, "sgd")
