"""A second call of `train` on a run: what it goes on with and says; what it refuses, without writing anything."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml

from gkt_fast import CheckpointError, GKTConfig, GKTTrainer
from gkt_fast.cli import main
from gkt_fast.models import cifar_resnet
from gkt_fast.training.checkpoint import load_checkpoint, save_checkpoint

TINY = ["train", "--model", "cifar_resnet14", "--train-images", "40", "-b", "20", "--warmup-epochs", "0"]


@pytest.fixture
def run(capsys, tmp_path):
    """Runs `train` in this process on the run `x`; returns the exit code, standard output and standard error."""

    def run(*flags: object) -> tuple[int, str, str]:
        arguments = [*TINY, "--output", tmp_path, "--experiment", "x", *flags]
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        return (code, *capsys.readouterr())

    return run


def rates(folder: Path) -> list[float]:
    with open(folder / "summary.csv", newline="") as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cosine(epochs: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    found = []
    for _ in range(epochs):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_an_extended_run_has_the_schedule_of_all_epochs_from_there_on(run, tmp_path):
    assert run("--epochs", 2, "--lr", 0.1)[0] == 0
    code, out, err = run("--epochs", 5, "--lr", 0.1)
    assert (code, err) == (0, "")
    assert rates(tmp_path / "x") == pytest.approx([*cosine(2), *cosine(5)[2:]], rel=1e-6)
    lines = out.splitlines()
    assert lines[0] == f"Resumed at epoch 3 of 5 from {tmp_path / 'x' / 'last.pt'}"
    assert lines[1] == "  --epochs was 2, is 5 from here on"
    assert yaml.safe_load((tmp_path / "x" / "args.yaml").read_text())["epochs"] == 5


def test_an_extended_run_with_a_warm_up(run, tmp_path):
    flags = ["--lr", 0.1, "--warmup-epochs", 1]
    assert run("--epochs", 2, *flags)[0] == 0
    assert run("--epochs", 4, *flags)[0] == 0
    whole = tmp_path / "whole"
    assert main([*TINY, "--output", str(whole), "--experiment", "x", "--epochs", "4", *map(str, flags)]) == 0
    assert rates(tmp_path / "x")[2:] == pytest.approx(rates(whole / "x")[2:], rel=1e-6)


def test_another_learning_rate_holds_from_there_on_and_is_said(run, tmp_path):
    assert run("--epochs", 1, "--sched", "none", "--lr", 0.1)[0] == 0
    code, _, err = run("--epochs", 2, "--sched", "cosine", "--lr", 0.1)
    assert code == 2
    assert "without a scheduler; this trainer is with" in err
    assert run("--resume", "", "--epochs", 1, "--lr", 0.1)[0] == 0
    code, out, _ = run("--epochs", 2, "--lr", 0.02)
    assert code == 0
    assert "  --lr was 0.1, is 0.02 from here on" in out.splitlines()
    assert rates(tmp_path / "x") == pytest.approx([0.1, cosine(2, 0.02)[1]])


def test_a_finished_run_says_so_and_writes_nothing(run, tmp_path):
    assert run("--epochs", 1)[0] == 0
    before = contents(tmp_path / "x")
    code, out, err = run("--epochs", 1)
    assert (code, err) == (0, "")
    assert out == "Already finished: 1 of 1 epochs are done; nothing to train\n"
    assert contents(tmp_path / "x") == before
    code, out, _ = run("--epochs", 1, "--evaluate-depths", "1-1-1")
    assert out.splitlines()[0].startswith("Already finished")
    assert "Test of depths 1-1-1" in out


@pytest.mark.parametrize(
    "flags, there, here",
    [
        (["--opt", "adamw"], "--opt sgd", "--opt adamw"),
        (["--model", "cifar_resnet20"], "--model cifar_resnet14", "--model cifar_resnet20"),
        (["--seed", 1], "--seed 0", "--seed 1"),
        (["--groups", 2], "--groups 3", "--groups 2"),
        (["--train-images", 60], "--train-images 40", "--train-images 60"),
        (["--mixup", 0.2], "--mixup 0", "--mixup 0.2"),
        (["--weight-decay", 0.01], "--weight-decay 0.0005", "--weight-decay 0.01"),
        (["--method", "st"], "--method gkt", "--method st"),
        (["--normalize-ce"], "--normalize-ce off", "--normalize-ce on"),
    ],
)
def test_what_cannot_change_is_refused_and_nothing_is_written(run, tmp_path, flags, there, here):
    assert run("--epochs", 1)[0] == 0
    before = contents(tmp_path / "x")
    code, out, err = run("--epochs", 2, *flags)
    assert code == 2
    assert there in err
    assert here in err
    assert "another --experiment, or --resume '' to start anew" in err
    assert "Epoch" not in out
    assert contents(tmp_path / "x") == before


def test_what_an_older_version_did_not_know_was_as_by_default(run, tmp_path):
    assert run("--epochs", 1)[0] == 0
    path = tmp_path / "x" / "args.yaml"
    values = yaml.safe_load(path.read_text())
    del values["subnet_share"]
    path.write_text(yaml.safe_dump(values))
    code, _, err = run("--epochs", 2, "--subnet-share", 0.5)
    assert code == 2 and "--subnet-share 1.0" in err and "--subnet-share 0.5" in err


def test_a_checkpoint_that_cannot_be_loaded_leaves_no_trace(run, tmp_path):
    code, _, err = run("--epochs", 1, "--resume", tmp_path / "gone.pt")
    assert code == 2
    assert "there is no checkpoint at" in err
    assert list(tmp_path.iterdir()) == []


def test_a_named_checkpoint_is_compared_with_the_run_it_is_of(run, tmp_path):
    assert run("--epochs", 1)[0] == 0
    checkpoint = tmp_path / "x" / "last.pt"
    code, _, err = run("--epochs", 2, "--experiment", "y", "--resume", checkpoint, "--seed", 3)
    assert code == 2
    assert "--seed 0" in err
    code, out, _ = run("--epochs", 2, "--experiment", "y", "--resume", checkpoint)
    assert code == 0
    assert out.startswith("Resumed at epoch 2 of 2")


def trainer(optimizer: type = torch.optim.SGD) -> GKTTrainer:
    torch.manual_seed(0)
    model = cifar_resnet(14, 3, width=4)
    return GKTTrainer(model, optimizer(model.parameters(), lr=0.1), GKTConfig(groups=1))


def test_another_optimizer_is_a_checkpoint_error_that_names_both(tmp_path):
    save_checkpoint(tmp_path / "x.pt", trainer().state_dict())
    with pytest.raises(CheckpointError, match="with the optimizer SGD; this trainer has AdamW"):
        trainer(torch.optim.AdamW).load_checkpoint(tmp_path / "x.pt")
    state = load_checkpoint(tmp_path / "x.pt")
    del state["optimizer_class"]  # as 0.1 wrote it
    save_checkpoint(tmp_path / "old.pt", state)
    with pytest.raises(CheckpointError, match="with the optimizer SGD; this trainer has AdamW"):
        trainer(torch.optim.AdamW).load_checkpoint(tmp_path / "old.pt")
    trainer().load_checkpoint(tmp_path / "old.pt")


def test_a_checkpoint_of_the_stimulative_training_code_is_said_not_to_load(tmp_path):
    torch.save({"epoch": 3, "state_dict": {}, "best_acc1": 0.5, "optimizer": {}}, tmp_path / "st.pt")
    with pytest.raises(CheckpointError, match=r"other code wrote it \(it holds epoch, state_dict"):
        trainer().load_checkpoint(tmp_path / "st.pt")


SCHEDULES = {
    "cosine": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n),
    "one cycle": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=2 * n),
    "steps": lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [n // 2]),
    "polynomial": lambda o, n: torch.optim.lr_scheduler.PolynomialLR(o, n, 0.9),
    "lambda": lambda o, n: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / n),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_schedule_is_that_of_the_new_arguments(name, tmp_path, caplog):
    def make(epochs: int) -> GKTTrainer:
        torch.manual_seed(0)
        model = cifar_resnet(14, 3, width=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULES[name](optimizer, epochs)
        return GKTTrainer(model, optimizer, GKTConfig(groups=0), scheduler=scheduler)

    loader = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 2]))]
    whole = make(6).fit(loader, epochs=6, progress=False)
    make(2).fit(loader, epochs=2, output_dir=tmp_path, progress=False)
    with caplog.at_level("INFO", "gkt_fast"):
        rest = make(6).fit(loader, epochs=6, output_dir=tmp_path, progress=False)
    assert [m["lr"] for m in rest] == pytest.approx([m["lr"] for m in whole[2:]])
    assert "the learning-rate schedule differs" in caplog.text
    caplog.clear()
    make(6).fit(loader, epochs=7, output_dir=tmp_path, progress=False)
    assert "schedule" not in caplog.text
