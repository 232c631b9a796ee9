"""`python -m gkt_fast env` and `train`: what they print and write, the configuration file, data sets, bad values."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gkt_fast import METHODS, GKTConfig, GKTTrainer, __version__, method_config
from gkt_fast.cli import main
from gkt_fast.ops import BackendError, build_info, explain, registry
from gkt_fast.training.checkpoint import load_checkpoint

TINY = ["train", "--model", "cifar_resnet14", "--train-images", "40", "-b", "20", "--epochs", "1"]


@pytest.fixture
def run(capsys):
    """Runs the command line in this process; returns the exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        return (code, *capsys.readouterr())

    return run


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def image_folder(path: Path, classes: str = "abc", images: int = 4, splits: tuple = ("train", "val")) -> Path:
    """PNGs of noise, 40x30 pixels."""
    random = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    return path


def cifar10(path: Path) -> dict[str, str]:
    """The files of CIFAR-10 with 4 images each; returns their MD5 sums."""
    folder = path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    batch = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 3, 9, 9]}
    contents = {f"data_batch_{i}": batch for i in range(1, 6)}
    contents |= {"test_batch": batch, "batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}


def test_env_prints_versions_build_flags_and_backends(run):
    code, out, err = run("env")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"gkt_fast {__version__}" in lines
    assert f"torch {torch.__version__.partition('+')[0]}" in lines
    for name, value in build_info().items():
        assert f"native {name}: {value}" in lines
    for row in explain():
        assert f"{row['op']} {row['backend']} {row['devices']} {row['status']}" in lines


def test_env_gives_the_reason_against_a_backend(run):
    def load():
        raise BackendError("it needs a machine that is not here")

    probe = registry.Implementation("probe", "nowhere", ("cpu",), (torch.float32,), load)
    with registry.isolated():
        registry.register(probe)
        _, out, _ = run("env")
    assert "probe nowhere cpu it needs a machine that is not here" in " ".join(out.split())


def test_train_learns_writes_its_files_and_evaluates_subnets(run, tmp_path):
    code, out, err = run(
        *("train", "--model", "cifar_resnet14", "--train-images", 200, "-b", 20, "--epochs", 4, "--lr", 0.05),
        *("--warmup-epochs", 1, "--output", tmp_path, "--experiment", "digits"),
        *("--evaluate-depths", "1-1-1", "2-1-2"),
    )
    assert (code, err) == (0, "")
    folder = tmp_path / "digits"
    assert {path.name for path in folder.iterdir()} == {
        "last.pt",
        "best.pt",
        "summary.csv",
        "config.yaml",
        "args.yaml",
    }
    rates = [float(row["lr"]) for row in summary(folder)]
    assert rates[0] < rates[1]
    assert rates[1] == 0.05
    assert rates[1] > rates[2] > rates[3]
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[-4:-1]] == [
        "Test",
        "Test of depths 1-1-1",
        "Test of depths 2-1-2",
    ]
    assert float(lines[-4].split()[2]) > 30  # ten classes
    assert lines[-1] == f"Written to {folder}"


def test_train_without_output_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_goes_on_where_the_first_ended(run, tmp_path):
    flags = [*TINY, "--sched", "none", "--experiment", "x", "--output"]
    for epochs in (1, 2):
        assert run(*flags, tmp_path / "parts", "--epochs", epochs)[0] == 0
    assert run(*flags, tmp_path / "whole", "--epochs", 2)[0] == 0
    parts, whole = (load_checkpoint(tmp_path / name / "x" / "last.pt") for name in ("parts", "whole"))
    assert parts["epoch"] == 2
    assert all(torch.equal(value, whole["model"][key]) for key, value in parts["model"].items())
    assert len(summary(tmp_path / "parts" / "x")) == 2


def test_resume_from_a_named_checkpoint_or_not_at_all(run, tmp_path):
    flags = [*TINY, "--sched", "none", "--experiment", "x", "--output"]
    assert run(*flags, tmp_path / "a")[0] == 0
    checkpoint = tmp_path / "a" / "x" / "last.pt"
    assert run(*flags, tmp_path / "b", "--epochs", 2, "--resume", checkpoint)[0] == 0
    assert [row["epoch"] for row in summary(tmp_path / "b" / "x")] == ["1"]
    assert run(*flags, tmp_path / "b", "--resume", "")[0] == 0
    assert [row["epoch"] for row in summary(tmp_path / "b" / "x")] == ["0"]


@pytest.mark.parametrize("method", METHODS)
def test_one_command_trains_by_any_method(run, tmp_path, method):
    code, _, err = run(*TINY, "--method", method, "--kd-weight", 0.5, "--output", tmp_path)
    assert (code, err) == (0, "")
    folder = tmp_path / f"cifar_resnet14-{method}"
    assert GKTConfig.from_yaml(folder / "config.yaml") == method_config(method, 8, kd_weight=0.5)
    assert len(summary(folder)) == 1


RECIPE = [
    *("--accumulate", 2, "--clip-grad-norm", 1.0, "--ema-decay", 0.9, "--mixup", 0.2, "--cutmix", 1.0),
    *("--label-smoothing", 0.1, "--kd-warmup-epochs", 1, "--skip-nonfinite", "--channels-last", "--amp"),
    *(
        "--track-depths",
        "0-1-1",
        "1-1-1",
        "--evaluate-depths",
        "1-1-1",
        "--warmup-epochs",
        1,
        "--min-depth",
        0,
    ),
]


def test_a_whole_recipe_trains_and_its_arguments_give_the_same_run(run, tmp_path):
    """`args.yaml` goes into a second run; the numbers of both agree to the last bit."""
    first = [*TINY, *RECIPE, "--epochs", 2, "--output", tmp_path]
    code, out, err = run(*first, "--experiment", "first")
    assert (code, err) == (0, "")
    assert "Test of averaged weights: accuracy" in out
    rows = summary(tmp_path / "first")
    assert {"val_accuracy", "val_accuracy_ema", "val_accuracy_0-1-1", "skipped_steps"} <= rows[0].keys()
    arguments = yaml.safe_load((tmp_path / "first" / "args.yaml").read_text())
    assert arguments["mixup"] == 0.2
    assert arguments["track_depths"] == [[0, 1, 1], [1, 1, 1]]
    assert arguments["decay"] == 0.5  # no flag was given
    assert not {"command", "config", "run"} & arguments.keys()
    assert run("train", "-c", tmp_path / "first" / "args.yaml", "--experiment", "second")[0] == 0
    again = yaml.safe_load((tmp_path / "second" / "args.yaml").read_text())
    assert again == arguments | {"experiment": "second"}
    times = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in times} for row in summary(tmp_path / "second")] == [
        {k: v for k, v in row.items() if k not in times} for row in rows
    ]


def test_the_arguments_of_every_method_give_the_same_configuration(run, tmp_path):
    for method in METHODS:
        flags = [*TINY, "--epochs", 0, "--method", method, "--output", tmp_path]
        assert run(*flags)[0] == 0
        written = tmp_path / f"cifar_resnet14-{method}"
        assert run("train", "-c", written / "args.yaml", "--experiment", "again")[0] == 0
        assert (tmp_path / "again" / "config.yaml").read_text() == (written / "config.yaml").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_mixed_images_resume_exactly(run, tmp_path, workers):
    flags = [*TINY, "--mixup", 0.5, "-j", workers, "--sched", "none", "--experiment", "x", "--output"]
    for epochs in (1, 2):
        assert run(*flags, tmp_path / "parts", "--epochs", epochs)[0] == 0
    assert run(*flags, tmp_path / "whole", "--epochs", 2)[0] == 0
    parts, whole = (load_checkpoint(tmp_path / name / "x" / "last.pt") for name in ("parts", "whole"))
    assert all(torch.equal(value, whole["model"][key]) for key, value in parts["model"].items())


def test_deterministic_and_compiled_blocks_reach_the_trainer(run, monkeypatch):
    seen = {}

    class Trainer(GKTTrainer):
        def __init__(self, *args, compile_blocks, deterministic, **options):
            seen.update(compile_blocks=compile_blocks, deterministic=deterministic)
            super().__init__(*args, **options)

    monkeypatch.setattr("gkt_fast.cli.training_run.GKTTrainer", Trainer)
    assert run(*TINY, "--epochs", 0, "--compile-blocks", "--deterministic")[0] == 0
    assert seen == {"compile_blocks": True, "deterministic": True}


def test_configuration_file_with_the_names_of_flags(run, tmp_path):
    values = {"model": "cifar_resnet14", "train_images": 40, "batch_size": 20, "epochs": 7, "lr": "1e-2",
              "sched": "none", "channels_last": True, "groups": 2, "min_depth": [0, 1, 1], "experiment": "x",
              "evaluate_depths": [[0, 1, 1], "1-1-1"], "resume": "", "device": None}  # fmt: skip
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    code, out, _ = run("train", "-c", path, "--epochs", 1, "--output", tmp_path)
    assert code == 0
    rows = summary(tmp_path / "x")
    assert [(row["epoch"], float(row["lr"])) for row in rows] == [("0", 0.01)]
    assert "Test of depths 0-1-1" in out
    assert "Test of depths 1-1-1" in out
    assert GKTConfig.from_yaml(tmp_path / "x" / "config.yaml") == GKTConfig(groups=2, min_depth=(0, 1, 1))


@pytest.mark.parametrize(
    "config",
    [
        GKTConfig(
            groups=2,
            loops=2,
            decay=0.25,
            min_depth=(0, 1, 1),
            ema=0.75,
            temperature=2.0,
            normalize_logits=True,
            ce_weight=0.5,
            kd_weight=2.0,
            subnet_ce_weight=0.1,
            sampler="uniform",
            drop_rate=0.25,
            fuse_blocks=False,
            batch_norm="all_streams",
            execution="sequential",
            label_smoothing=0.1,
            ignore_index=7,
            distill_ignored=False,
            seed=3,
        ),
        GKTConfig(groups=2, sampler="fixed", subnets=((1, 1, 1), (0, 1, 1)), execution="lean"),
        GKTConfig(budget=1.5, min_depth=0),
        GKTConfig(groups=1, subnet_resolution=(4, 6)),
        GKTConfig(groups=1, sampler="stochastic_depth", train_full=False),
    ],
)
def test_every_hyper_parameter_has_a_flag(run, tmp_path, config):
    """Through the file that a run leaves behind, which `-c` takes again."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    code, _, err = run(*TINY, "--epochs", 0, "-c", path, "--output", tmp_path, "--experiment", "x")
    assert (code, err) == (0, "")
    assert GKTConfig.from_yaml(tmp_path / "x" / "config.yaml") == config


@pytest.mark.parametrize(
    "model, size", [("cifar_resnet14", 16), ("resnet18", 72), ("timm:resnet18", 32)], ids=str
)
def test_image_folder(run, tmp_path, model, size):
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    data = image_folder(tmp_path)
    code, out, err = run(
        *("train", "--data", f"imagefolder:{data}", "--image-size", size, "--model", model, "-b", 6),
        *("--epochs", 1, "--workers", 1, "--opt", "adamw", "--lr", 1e-3),
    )
    assert (code, err) == (0, "")
    assert "(12 images)" in out


def test_cifar10(run, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    sums = cifar10(tmp_path)
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    code, out, err = run(
        "train", "--data", f"cifar10:{tmp_path}", "--model", "cifar_resnet14", "-b", 10, "--epochs", 1
    )
    assert (code, err) == (0, "")
    assert "(4 images)" in out


def test_data_that_is_not_what_it_must_be(run, tmp_path):
    cifar10(tmp_path)  # of other checksums than the real one
    code, _, err = run("train", "--data", f"cifar10:{tmp_path}")
    assert code == 2
    assert f"{tmp_path} doesn't hold CIFAR-10" in err
    code, _, err = run("train", "--data", f"imagefolder:{image_folder(tmp_path, splits=('train',))}")
    assert code == 2
    assert "must hold a folder train, and a folder val or test" in err
    image_folder(tmp_path, "abd", splits=("test",))
    code, _, err = run("train", "--data", f"imagefolder:{tmp_path}")
    assert code == 2
    assert "hold different classes" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "mnist"], "data is 'mnist'; it must be digits, imagefolder:PATH or cifar10:PATH"),
        (["--data", "imagefolder:"], "data is 'imagefolder:'"),
        (["--train-images", "3"], "train_images is 3; it must be between"),
        (["--train-images", "x"], "argument --train-images: 'x' must be an integer"),
        (["--model", "cifar_resnet9"], "depth is 9; it must be 6n + 2"),
        (["--model", "resnet19"], "model is 'resnet19'; it must be"),
        (["--model", "resnet18"], "model is 'resnet18', which takes images of 3 channels; these have 1"),
        (["-b", "0"], "argument -b/--batch-size: '0' must be an integer of at least 1"),
        (["-j", "-1"], "argument -j/--workers: '-1' must be an integer of at least 0"),
        (["--epochs", "-1"], "argument --epochs: '-1' must be an integer of at least 0"),
        (["--epochs", "1.5"], "argument --epochs: '1.5' must be an integer of at least 0"),
        (["--lr", "nan"], "argument --lr: 'nan' must be a number of at least 0"),
        (["--lr", "fast"], "argument --lr: 'fast' must be a number of at least 0"),
        (["--momentum", "inf"], "argument --momentum: 'inf' must be a number of at least 0"),
        (["--weight-decay", "-1"], "argument --weight-decay: '-1' must be a number of at least 0"),
        (["--opt", "lion"], "argument --opt: invalid choice: 'lion'"),
        (["--sched", "step"], "argument --sched: invalid choice: 'step'"),
        (["--amp-dtype", "int8"], "argument --amp-dtype: invalid choice: 'int8'"),
        (["--device", "abacus"], "argument --device: 'abacus' can't be used"),
        (["--log-interval", "0"], "argument --log-interval: '0' must be an integer of at least 1"),
        (["--evaluate-depths", "1-x"], "argument --evaluate-depths: '1-x' must be numbers joined by '-'"),
        (
            ["--evaluate-depths", "3-1-1"],
            "evaluate_depths: depths is (3, 1, 1); its entry 0 must be between 0",
        ),
        (["--resume", "gone.pt"], "there is no checkpoint at gone.pt"),
        (["--output", "/dev/null/runs"], "/dev/null/runs"),
        (["--min-depth", "1-1"], "min_depth is (1, 1); it must have one entry for each of 3 stages"),
        (["--subnets", "1-1-1"], "the sampler 'fixed' needs subnets, and no other takes them"),
        (["--sampler", "all"], "argument --sampler: invalid choice: 'all'"),
        (["--accumulate", "0"], "argument --accumulate: '0' must be an integer of at least 1"),
        (["--clip-grad-norm", "0"], "clip_grad_norm is 0.0; it must be a positive number or None"),
        (["--ema-decay", "2"], "ema_decay is 2.0; it must be in [0, 1]"),
        (["--mixup", "-1"], "argument --mixup: '-1' must be a number of at least 0"),
        (["--method", "sgd"], "argument --method: invalid choice: 'sgd'"),
        (["--subnet-resolution", "8-"], "argument --subnet-resolution: '8-' must be a number of pixels"),
        (["--subnet-resolution", "8-6"], "subnet_resolution is (8, 6); its lowest must be at most"),
        (["--budget", "0.5"], "budget is 0.5; it must be"),
        (["--kd-weight", "-1"], "kd_weight is -1.0; it must be in [0, inf)"),
        (["--groups", "x"], "argument --groups: invalid int value: 'x'"),
        (["--epoch", "1"], "unrecognized arguments: --epoch"),
        (["--conf", "x.yaml"], "unrecognized arguments: --conf"),
        (["-c", "gone.yaml"], "gone.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_end_with_code_2_and_a_message(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*TINY, *flags)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert "Epoch" not in out, "it trained before it complained"


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n", "holds list; it must be a mapping of flags to values"),
        ("lr: [1\n", 'bad.yaml", line 2'),
        ("learning_rate: 1\n", "unrecognized arguments: --learning-rate=1"),
        ("epochs: many\n", "argument --epochs: 'many' must be an integer"),
        ("epochs: true\n", "argument --epochs: expected one argument"),
        ("1: 2\n", "unrecognized arguments: --1=2"),
    ],
)
def test_bad_configuration_files(run, tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    code, _, err = run(*TINY[:-2], "-c", path)
    assert code == 2
    assert message in err


def test_a_network_of_an_unknown_name_or_without_its_library(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run(*TINY, "--model", "timm:resnet18")
    assert code == 2
    assert "timm" in err
    monkeypatch.undo()
    pytest.importorskip("timm")
    code, _, err = run(*TINY, "--model", "timm:resnet19")
    assert code == 2
    assert "model is 'timm:resnet19'; timm has no network of that name" in err


def test_help_lists_every_flag(run):
    code, out, _ = run("train", "--help")
    assert code == 0
    for field in dataclasses.fields(GKTConfig):
        assert f"--{field.name.replace('_', '-')}" in out
    assert "digits, imagefolder:PATH or cifar10:PATH" in out


def test_a_command_is_needed(run):
    code, _, err = run()
    assert code == 2
    assert "command" in err


@pytest.mark.skipif(os.name != "posix", reason="signals to a process group")
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_leaves_a_checkpoint_from_which_a_second_run_goes_on(run, tmp_path, workers):
    """As a terminal does it: the signal goes to the whole process group, the loader's workers included."""
    flags = [*TINY, "-j", str(workers), "--sched", "none", "--log-interval", "1", "--experiment", "x"]
    flags += ["--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gkt_fast", *flags, "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("Train: 2/"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "gkt-fast: interrupted\n"
    stopped = load_checkpoint(tmp_path / "x" / "last.pt")
    epochs = stopped["epoch"] + 1
    assert run(*flags, "--epochs", epochs)[0] == 0
    finished = load_checkpoint(tmp_path / "x" / "last.pt")
    assert finished["epoch"] == epochs
    assert finished["gkt"][0] == 2 * epochs
    assert [row["epoch"] for row in summary(tmp_path / "x")] == [str(epoch) for epoch in range(epochs)]
