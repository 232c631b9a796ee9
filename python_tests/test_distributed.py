"""Several processes on the CPU (gloo): what the ranks check themselves is in helpers/distributed_checks.py."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.distributed_checks import JOINED_BATCH, data, loader, make_trainer
from helpers.processes import environment
from helpers.reference_step import one_thread  # noqa: F401
from torch import Tensor
from torch.distributed.run import get_args_parser as torchrun_arguments
from torch.utils.data import DataLoader, DistributedSampler

from gkt_fast import GKT, GKTConfig
from gkt_fast.cli import main, train
from gkt_fast.distributed import (
    agree,
    any_rank,
    gather,
    is_distributed,
    parallelize,
    reduce_sum,
    share,
    torchrun_process_group,
)
from gkt_fast.training.checkpoint import load_checkpoint

ENVIRONMENT = environment(OMP_NUM_THREADS="1")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_ranks(ranks: int, folder: Path) -> None:
    """Runs all checks on so many processes."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.distributed_checks", str(rank), str(ranks), str(folder)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, printed[rank]
        failures = json.loads((folder / f"failures-{rank}.json").read_text())
        assert not failures, "\n".join(failures.values())
    assert "check_a_rank_that_hangs" in printed[0], "the checks did not run to their end"


def test_two_ranks_then_three_then_one_train_as_one_process_does(tmp_path):
    """Every number of ranks runs all checks; the last but one trains an epoch where the ranks before stopped."""
    run_ranks(2, tmp_path)
    run_ranks(3, tmp_path)
    resumed = make_trainer("sequential")
    resumed.fit(loader(), epochs=3, output_dir=tmp_path / "run", progress=False)
    assert resumed.gkt.next_step == 9
    for parameter, expected in zip(resumed.model.parameters(), whole_training(epochs=3), strict=True):
        assert (parameter - expected).norm() <= 1e-10 * expected.norm()
    rows = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2"]


def whole_training(epochs: int) -> list[Tensor]:
    """The parameters after a plain loop over the joined batches, in the order of torch's DistributedSampler."""
    made = make_trainer()
    gkt, optimizer, scheduler = GKT(made.model, made.config), made.optimizer, made.scheduler
    dataset = data()
    for epoch in range(epochs):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(7 + epoch))
        for indices in order.split(JOINED_BATCH):
            optimizer.zero_grad()
            gkt(*dataset[indices]).loss.backward()
            optimizer.step()
        scheduler.step()
    return [parameter.detach() for parameter in gkt.model.parameters()]


def test_an_epoch_that_was_begun_in_other_batches_goes_on_at_the_same_sample(tmp_path):
    """Stopped after 4 batches of 6; with batches of 12 two of the three are done."""

    def batches(size: int) -> DataLoader:
        dataset = data()
        return DataLoader(dataset, size, sampler=DistributedSampler(dataset, 1, 0, seed=7))

    stopped = make_trainer()
    step, seen = stopped.step, []

    def interrupted_step(*batch):
        if stopped.gkt.next_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*batch)

    stopped.step = interrupted_step
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(batches(6), epochs=1, output_dir=tmp_path, progress=False)
    resumed = make_trainer()
    step_after = resumed.step

    def recorded_step(images, targets):
        seen.append(images)
        return step_after(images, targets)

    resumed.step = recorded_step
    resumed.fit(batches(12), epochs=1, output_dir=tmp_path, progress=False)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(7))
    assert len(seen) == 1
    assert torch.equal(seen[0], data()[order[24:]][0])


def test_a_rank_that_dies_ends_the_run_with_its_error_and_leaves_the_last_checkpoint(tmp_path):
    started = time.perf_counter()
    result = subprocess.run(
        [*TORCHRUN, "-m", "helpers.dying_rank", str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode != 0
    assert "OSError: the disk of rank 1 is on fire" in result.stderr
    assert time.perf_counter() - started < 100, "torchrun did not end the other rank before its time-out"
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["batches_done"]) == (1, 0)
    trainer = make_trainer()
    trainer.load_checkpoint(tmp_path / "run" / "last.pt")
    assert trainer.gkt.next_step == 3


def test_an_empty_batch_on_one_rank_ends_the_run_in_words():
    started = time.perf_counter()
    result = subprocess.run(
        [*TORCHRUN, "-m", "helpers.empty_rank"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode != 0
    assert "ValueError: the batch has no rows" in result.stderr
    assert time.perf_counter() - started < 100, "torchrun did not end the other rank before its time-out"


def test_ctrl_c_stops_all_ranks_at_one_step_from_which_a_single_process_goes_on(tmp_path, capsys):
    flags = ["train", "--model", "cifar_resnet8", "--train-images", "40", "-b", "5", "--sched", "none"]
    flags += ["--log-interval", "1", "--device", "cpu", "--output", str(tmp_path), "--experiment", "x"]
    flags += ["--loggers", "tensorboard"]
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "gkt_fast", *flags, "--epochs", "100000"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("Train: 2/"):
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    stopped = load_checkpoint(tmp_path / "x" / "last.pt")
    assert len(stopped["random_states"]) == 2
    assert len([*(tmp_path / "x" / "tensorboard").iterdir()]) == 1, "rank 0 alone logs"
    steps, epoch = int(stopped["gkt"][0]), stopped["epoch"]
    assert steps == 4 * epoch + stopped["batches_done"]
    assert main([*flags, "-b", "10", "--epochs", str(epoch + 1)]) == 0
    finished = load_checkpoint(tmp_path / "x" / "last.pt")
    assert finished["epoch"] == epoch + 1
    assert finished["gkt"][0] == 4 * (epoch + 1)
    assert f"Epoch {epoch + 1}/{epoch + 1}" in capsys.readouterr().out


def test_torchrun_passes_every_flag_on():
    """It refuses what could be an abbreviation of several flags of its own, also behind the script's name."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    for flag in flags - {"--log"}:
        arguments = ["--nproc-per-node", "2", "-m", "gkt_fast", "train", flag, "x"]
        assert torchrun_arguments().parse_args(arguments).training_script_args == ["train", flag, "x"]
    assert "--loggers" in flags


def test_a_single_process_needs_no_group():
    assert not is_distributed()
    value = torch.ones(2)
    assert reduce_sum(value) is value
    assert any_rank(True, torch.device("cpu"))
    assert gather("x") == ["x"]
    agree("anything", object())
    dataset = data(4)
    assert share(dataset) is dataset
    gkt = GKT(make_trainer().model, GKTConfig())
    assert parallelize(gkt, torch.device("cpu")) is gkt
    with torchrun_process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
