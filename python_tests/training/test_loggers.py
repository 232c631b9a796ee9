"""TensorBoard, Weights & Biases, and the figure of `python -m gkt_fast plot`."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib.image
import pytest

from gkt_fast.cli import main
from gkt_fast.cli.plot import draw, read_run
from gkt_fast.training.loggers import TensorBoardLogger, WandbLogger

TRAIN = ["train", "--model", "cifar_resnet14", "--train-images", "40", "-b", "20", "--sched", "none"]


def metrics_of(folder: Path) -> list[dict[str, float]]:
    with open(folder / "summary.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_logs_to_tensorboard_and_wandb_what_is_in_its_summary(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = [*TRAIN, "--output", str(tmp_path), "--experiment", "x"]
    flags += ["--track-depths", "1-1-1", "1-2-1", "--log", "tensorboard", "wandb"]
    for epochs in ("1", "2"):  # the second goes on
        assert main([*flags, "--epochs", epochs]) == 0
    rows = metrics_of(tmp_path / "x")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert {"val_accuracy", "val_accuracy_1-1-1", "val_accuracy_1-2-1", "kd_group3"} <= rows[0].keys()

    scalars = tensorboard_scalars(tmp_path / "x" / "tensorboard")
    assert scalars.keys() == rows[0].keys() - {"epoch"}
    for name, points in scalars.items():
        assert [step for step, _ in points] == [0, 1]
        assert [value for _, value in points] == pytest.approx([row[name] for row in rows], rel=1e-6)

    files = sorted((tmp_path / "x" / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "x" / "wandb" / "gkt_fast_run_id").read_text()
    assert len(files) == 2
    for file in files:
        assert file.stem == f"run-{run_id}"
        content = file.read_bytes()
        assert all(name.encode() in content for name in rows[0] if name != "epoch")
        assert b"cifar_resnet14" in content


def test_a_logger_that_logs_nothing_leaves_nothing(tmp_path):
    for logger in (TensorBoardLogger(tmp_path / "a"), WandbLogger(tmp_path / "b")):
        logger.close()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_replaces_later_epochs_in_tensorboard(tmp_path):
    for epochs in ((0, 1, 2), (1, 2)):
        logger = TensorBoardLogger(tmp_path)
        for epoch in epochs:
            logger.log_epoch({"epoch": epoch, "loss": float(epoch * len(epochs))})
        logger.close()
    assert tensorboard_scalars(tmp_path)["loss"] == [(0, 0.0), (1, 2.0), (2, 4.0)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log", "tensorboard"], "log is tensorboard and output is not given"),
        (["--log", "paper"], "argument --log/--loggers: invalid choice: 'paper'"),
        (["--track-depths", "9-1-1"], "val_depths: depths is (9, 1, 1); its entry 0 must be between"),
    ],
)
def test_bad_flags(flags, message, capsys):
    try:
        code = main([*TRAIN, *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def write_run(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "summary.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def epochs(count: int, accuracy: float) -> list[dict[str, object]]:
    return [
        {"epoch": e, "train_loss": 2.0 - e, "kd_group1": 0.5, "kd_group2": 0.25, "val_accuracy": accuracy}
        | {"val_loss": 3.0, "val_accuracy_1-1-1": accuracy / 2, "val_accuracy_ema": 0.75}
        for e in range(count)
    ]


def curves(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_plot_shows_loss_distillation_and_accuracies_of_a_run(tmp_path):
    run = write_run(tmp_path / "run", epochs(2, 0.5))
    loss, distillation, accuracy = draw([read_run(run)]).axes
    assert curves(loss) == {"training": ([1, 2], [2.0, 1.0]), "validation": ([1, 2], [3.0, 3.0])}
    assert curves(distillation) == {"group 1": ([1, 2], [0.5, 0.5]), "group 2": ([1, 2], [0.25, 0.25])}
    assert curves(accuracy) == {
        "full network": ([1, 2], [50, 50]),
        "depths 1-1-1": ([1, 2], [25, 25]),
        "full network, averaged weights": ([1, 2], [75, 75]),
    }
    assert accuracy.get_ylabel() == "accuracy (%)"


def test_plot_of_several_runs(tmp_path, capsys):
    """A run without subnets, one that has them from its second epoch on, and one of the same name."""
    plain = [{"epoch": e, "train_loss": 1.0, "val_accuracy": 0.25} for e in range(3)]
    later = epochs(3, 0.5)
    del later[0]["val_accuracy_1-1-1"]
    for row in later:
        del row["val_accuracy_ema"]
    folders = [write_run(tmp_path / name, rows) for name, rows in (("a", plain), ("b", later))]
    _, _, accuracy = draw([read_run(folder) for folder in folders]).axes
    assert curves(accuracy) == {
        "a: full network": ([1, 2, 3], [25] * 3),
        "b: full network": ([1, 2, 3], [50] * 3),
        "b: depths 1-1-1": ([2, 3], [25] * 2),
    }
    colours = {line.get_label()[0]: line.get_color() for line in accuracy.lines}
    assert colours["a"] != colours["b"]
    same_name = write_run(tmp_path / "other" / "a", plain)
    arguments = [*map(str, [*folders, same_name]), "-o", str(tmp_path / "figure.png")]
    assert main(["plot", *arguments]) == 0
    assert capsys.readouterr().out == f"Written to {tmp_path / 'figure.png'}\n"
    picture = matplotlib.image.imread(tmp_path / "figure.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no summary.csv"),
        ("epoch,train_loss\n", "holds no epochs"),
        ("a,b\n1,2\n", "holds no epochs"),
        ("epoch,train_loss\n0,fast\n", "has 'fast' as train_loss; it must be a number"),
    ],
)
def test_plot_names_what_it_cannot_read(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "summary.csv").write_text(text)
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "figure.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()
