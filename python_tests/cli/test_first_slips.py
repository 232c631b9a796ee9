"""What goes wrong when somebody tries the commands on images of their own ends in a sentence that says what to do."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from gkt_fast.cli import main
from gkt_fast.data import load_data
from gkt_fast.network.discovery import find_stages

pytest.importorskip("torchvision")

CLASSES = ("cat", "dog")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six training and two test images of each class, of different sizes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = random.integers(9, 60, 2)
                pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def message(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What a command says that can't be carried out."""
    capsys.readouterr()
    try:
        code = main(list(arguments))
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2
    assert "Epoch" not in out and "Traceback" not in err
    return err


def train(*flags: str) -> list[str]:
    return ["train", "--data", "imagefolder:photos", "--model", "cifar_resnet14", "--epochs", "1", *flags]


def test_images_of_any_kind_and_size_train(photos, capsys):
    image = Image.open(photos / "train" / "cat" / "0.jpg")
    image.convert("L").save(photos / "train" / "cat" / "grey.jpg")
    image.convert("CMYK").save(photos / "train" / "cat" / "cmyk.jpg")
    for mode in ("RGBA", "LA", "P", "1"):
        image.convert(mode).save(photos / "train" / "cat" / f"{mode}.png")
    (photos / "train" / ".hidden").mkdir()
    (photos / "train" / "cat" / ".DS_Store").write_text("")
    assert main(train("-b", "6")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "18 training and 4 test images of 32x32, 2 classes" in out
    assert "cifar_resnet14" in out and "3 subnets in each step" in out


def test_a_folder_that_is_not_there(photos, capsys):
    err = message(capsys, "train", "--data", "imagefolder:fotos")
    assert f"there is no folder {photos.parent / 'fotos'}" in err
    assert "did you mean imagefolder:photos?" in message(capsys, "train", "--data", "photos")


def test_folders_that_are_not_as_they_must_be(photos, capsys):
    shutil.move(photos / "val", photos / "evaluation")
    assert "it holds evaluation, train" in message(capsys, *train())
    shutil.move(photos / "evaluation", photos / "val")
    shutil.move(photos / "val" / "cat", photos / "val" / "cats")
    err = message(capsys, *train())
    assert "different classes: cat only in photos/train; cats only in photos/val" in err
    for image in (photos / "val" / "cats").iterdir():
        image.unlink()
    assert "photos/val has no images of cats; put images there, or remove the folder" in message(
        capsys, *train()
    )
    for name in ("cats", "dog"):
        shutil.rmtree(photos / "val" / name)
    assert "photos/val holds no folders; it must hold one for each class" in message(capsys, *train())


def test_files_that_are_left_out_are_counted(photos, capsys, caplog):
    load_data("imagefolder:photos")
    assert caplog.text == ""
    for name in ("1.jpg", "2.jpg"):
        (photos / "train" / "dog" / name).rename(photos / "train" / "dog" / f"{name}.heic")
    assert len(load_data("imagefolder:photos").train) == 10
    assert "2 of the files in photos/train are left out, such as photos/train/dog/1.jpg.heic" in caplog.text
    for image in (photos / "train" / "dog").glob("*.jpg"):
        image.unlink()
    assert "no images of dog, but files such as photos/train/dog/1.jpg.heic" in message(capsys, *train())


def test_damaged_images_are_named(photos, capsys):
    whole = (photos / "train" / "cat" / "0.jpg").read_bytes()
    (photos / "train" / "cat" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    err = message(capsys, *train())
    assert "photos/train/cat/0.jpg can't be read as an image: replace it or remove it" in err
    (photos / "val" / "cat" / "0.jpg").write_text("not an image")
    err = message(capsys, *train())
    assert err.strip().endswith("photos/val/cat/0.jpg can't be read as an image: replace it or remove it")


def test_train_images_is_for_digits(photos, capsys):
    assert "train_images is 5; it is for digits" in message(capsys, *train("--train-images", "5"))


def test_a_network_that_takes_another_size(photos, capsys):
    err = message(capsys, *train("--model", "vit_b_16"))
    assert "model is 'vit_b_16', which can't run on images of 32x32" in err and "--image-size" in err


def test_a_network_without_residual_blocks(photos, capsys):
    err = message(capsys, *train("--model", "squeezenet1_1"))
    assert "no run of residual blocks that can be dropped" in err and "as in ResNet, ConvNeXt or ViT" in err
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(8)))
    with pytest.raises(ValueError, match=r"4: 2 x Linear and \d more\. Name the stages"):
        find_stages(model)


def test_another_python_than_the_one_installed_for(monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("gkt_fast.cli.train.train", run)
    assert f"{sys.executable} has no torch. Activate the virtual environment" in message(capsys, "train")


def test_files_that_are_not_there(photos, capsys):
    assert "there is no checkpoint at runs/mine" in message(capsys, "subnets", "runs/mine")
    assert "there is no file elastic.pt" in message(capsys, "predict", "elastic.pt", "photos/val/cat/0.jpg")
    assert "Without --device it is" in message(capsys, *train("--device", "abacus"))
