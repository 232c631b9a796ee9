"""The command line itself: help, suggestions, missing packages, data sets, and that nothing of it waits for torch."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gkt_fast
from gkt_fast.cli import COMMANDS, command_parser, main
from gkt_fast.cli.plot import Run, draw
from gkt_fast.cli.recipe import BatchTransforms
from gkt_fast.cli.requirements import EXTRAS
from gkt_fast.cli.train import AMP_DTYPES as AMP_NAMES
from gkt_fast.data import load_data
from gkt_fast.training.placement import AMP_DTYPES

ROOT = Path(__file__).parents[2]


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


def image_folder(path: Path, classes: str = "ab", size: tuple[int, int] = (40, 30)) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    return path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["trian"], *([command, "--help"] for command in COMMANDS)]
)
def test_help_and_slips_need_no_torch(arguments):
    code = (
        "import sys; sys.modules['torch'] = None; from gkt_fast.cli import main\n"
        "sys.argv[0] = 'gkt-fast'; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == (2 if arguments == ["trian"] else 0), result.stderr
    assert "Traceback" not in result.stderr


def test_importing_gkt_leaves_out_what_takes_long():
    """torch.compile's machinery took most of the time of `from gkt_fast import GKT`."""
    code = "import sys; from gkt_fast import GKT; print([m for m in sys.modules if m.startswith('torch._dynamo')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_lazy_names_are_those_that_type_checkers_see():
    assert {*gkt_fast._HOME, "__version__"} == set(gkt_fast.__all__)
    source = Path(gkt_fast.__file__).read_text()
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__ =")]
    imported = {
        name.strip(): module
        for module, names in re.findall(r"from \.([\w.]+) import (?:\(([^)]*)\)|(?:[^(\n]+))", block)
        for name in names.split(",")
        if name.strip()
    }
    for module, names in re.findall(r"from \.([\w.]+) import ([^(\n]+)", block):
        imported |= {name.strip(): module for name in names.split(",")}
    assert imported == gkt_fast._HOME
    namespace: dict[str, object] = {}
    exec("from gkt_fast import *", namespace)
    for name, module in gkt_fast._HOME.items():
        value = getattr(importlib.import_module(f"gkt_fast.{module}"), name)
        assert namespace[name] is value is getattr(gkt_fast, name)
    assert set(gkt_fast.__all__) <= set(dir(gkt_fast))
    assert gkt_fast.data.digits is importlib.import_module("gkt_fast.data").digits
    with pytest.raises(AttributeError, match="no attribute 'GTK'"):
        _ = gkt_fast.GTK


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_sentence_and_a_default(command):
    parser = command_parser(command)
    text = parser.format_help()
    for action in parser._actions:
        assert action.help, action.option_strings
        if not action.option_strings or action.dest == "help":
            continue
        shown = parser._get_formatter()._expand_help(action)
        by_method = action.default is argparse.SUPPRESS and (
            "(gkt: " in shown or command in ("subnets", "elastic")
        )
        switch = isinstance(action, argparse._StoreTrueAction)
        assert "default" in shown or by_method or switch or action.required, (
            f"{action.option_strings} has no default: {shown}"
        )
    assert "see gkt_fast.GKTConfig" not in text
    assert len(text.split("\n\n")[0].splitlines()) == 1, "usage is in the way"


def test_version(run):
    assert run("--version") == (0, f"gkt_fast {gkt_fast.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["trian"], "did you mean train?"),
        (["train", "--epoch", 3], "did you mean --epochs?"),
        (["train", "--learning-rates=1", "--bath-size", 3], "did you mean --batch-size?"),
        (["train", "--opt", "adamv"], "did you mean adamw?"),
        (["train", "--sampler", "unifrom"], "did you mean uniform?"),
        (["train", "--model", "restnet18"], "did you mean resnet18?"),
        (["train", "--model", "timm:restnet18"], "did you mean resnet18?"),
        (["subnets", "x", "--exportonnx", "y"], "did you mean --export-onnx?"),
    ],
)
def test_slips_are_met_with_what_was_meant_in_few_lines(run, arguments, hint):
    code, out, err = run(*arguments)
    assert code == 2
    assert hint in err
    assert out == ""
    assert len(err.splitlines()) <= 2


def test_amp_dtypes_are_those_of_the_trainer():
    assert [*AMP_NAMES] == [*AMP_DTYPES]


@pytest.mark.parametrize(
    "module, arguments, extra",
    [
        ("sklearn", ["train"], "vision"),
        ("torchvision", ["train", "--model", "resnet18"], "vision"),
        ("torchvision", ["train", "--mixup", 1], "vision"),
        ("timm", ["train", "--model", "timm:resnet18"], "vision"),
        ("wandb", ["train", "--log", "wandb", "--output", "runs"], "logging"),
        ("matplotlib", ["plot", "runs/x"], "vision"),
        ("matplotlib", ["subnets", "runs/x"], "vision"),
        ("onnxscript", ["subnets", "runs/x", "--export-onnx", "x.onnx"], "export"),
        ("onnxscript", ["elastic", "runs/x", "-o", "x.pt", "--export-onnx", "x"], "export"),
        ("torchvision", ["predict", "x.pt", "x.png"], "vision"),
    ],
)
def test_missing_packages_are_found_before_work_begins(run, monkeypatch, tmp_path, module, arguments, extra):
    monkeypatch.chdir(tmp_path)
    for place in ("training_run", "trained_run"):
        monkeypatch.setattr(f"gkt_fast.cli.{place}.load_data", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run(*arguments)
    assert code == 2
    assert module in err
    assert f'pip install "gkt_fast[{extra}]"' in err
    assert list(tmp_path.iterdir()) == []


def test_extras_install_what_they_are_named_for():
    text = (ROOT / "pyproject.toml").read_text()
    for module, extra in EXTRAS.items():
        (packages,) = re.findall(rf"^{extra} = (\[.*\])$", text, flags=re.M)
        assert {"sklearn": "scikit-learn"}.get(module, module) in packages


def test_one_class_is_refused(run, tmp_path):
    code, _, err = run("train", "--data", f"imagefolder:{image_folder(tmp_path, 'a')}")
    assert code == 2
    assert "holds one class, a; there must be two or more" in err


def test_training_images_can_be_smaller_and_augmented(tmp_path):
    folder = f"imagefolder:{image_folder(tmp_path)}"
    data = load_data(folder, 80, train_crop=64, augment="trivial", random_erasing=1.0)
    assert data.train[0][0].shape == (3, 64, 64)
    assert data.test[0][0].shape == (3, 80, 80)
    names = [type(step).__name__ for step in data.train.transform.transforms]
    assert names.index("TrivialAugmentWide") < names.index("ToTensor") < names.index("RandomErasing")
    assert "RandAugment" in str(load_data(folder, 32, augment="rand").train.transform)
    assert str(load_data(folder, 32).train.transform).count("\n") == 6, "nothing is added unasked"
    with pytest.raises(ValueError, match="augment is 'auto'"):
        load_data(folder, augment="auto")
    with pytest.raises(ValueError, match="not for digits"):
        load_data("digits", augment="rand")


def test_batches_of_several_sizes(run, tmp_path):
    torch.manual_seed(0)
    collate = BatchTransforms(0, 0, 3, sizes=(6, 8, 12))
    batches = [collate([(torch.randn(3, 8, 8), 0), (torch.randn(3, 8, 8), 1)])[0] for _ in range(20)]
    assert {tuple(batch.shape[2:]) for batch in batches} == {(6, 6), (8, 8), (12, 12)}
    code, out, err = run(
        *("train", "--model", "cifar_resnet14", "--train-images", 40, "-b", 20, "--epochs", 2),
        *("--multi-scale", "8,12", "--normalize-ce", "--label-smoothing", 0.1, "--calibrate-full"),
        *("--output", tmp_path, "--experiment", "x"),
    )
    assert (code, err) == (0, "")
    assert "Test: accuracy" in out
    text = (tmp_path / "x" / "args.yaml").read_text()
    assert "label_smoothing: 0.1" in text
    code, out, err = run("train", "-c", tmp_path / "x" / "args.yaml")
    assert (code, err) == (0, "")
    assert "Already finished" in out


def test_calibrated_validation_is_of_reestimated_statistics(tmp_path):
    from gkt_fast import GKTConfig, GKTTrainer
    from gkt_fast.models import cifar_resnet

    torch.manual_seed(0)
    model = cifar_resnet(14, 3, width=4)
    trainer = GKTTrainer(model, torch.optim.SGD(model.parameters(), 0.01), GKTConfig(groups=1), ema_decay=0.5)
    loader = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)]
    for calibrated in (False, True):
        trainer.state.batches.epoch = 0
        (metrics,) = trainer.fit(
            loader, epochs=1, val_loader=loader, calibrate_full=calibrated, progress=False
        )
        options = {"calibration_loader": loader} if calibrated else {}
        assert metrics["val_loss"] == pytest.approx(trainer.evaluate(loader, **options).loss)
        assert metrics["val_loss_ema"] == pytest.approx(trainer.evaluate(loader, ema=True, **options).loss)
        other = {} if calibrated else {"calibration_loader": loader}
        assert metrics["val_loss"] != pytest.approx(trainer.evaluate(loader, **other).loss)


def test_one_outlier_does_not_flatten_a_panel():
    values = [25000.0, 3.0, 2.5, 2.2, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5]
    for outlier in (True, False):
        shown = values if outlier else values[1:]
        figure = draw([Run("x", {"train_loss": [(i + 1, value) for i, value in enumerate(shown)]})])
        axes = figure.axes[0]
        top = axes.get_ylim()[1]
        notes = [text.get_text() for text in axes.texts]
        assert 3.0 <= top < 4.0
        assert notes == (["1 values above, up to 2.5e+04"] if outlier else [])
