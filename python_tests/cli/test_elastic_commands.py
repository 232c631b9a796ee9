"""`elastic` and `predict`, and training that starts from a trained network."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401
from PIL import Image

from gkt_fast import load_elastic
from gkt_fast.cli import main
from gkt_fast.data import digits, load_image
from gkt_fast.models import cifar_resnet
from gkt_fast.training.checkpoint import load_checkpoint

TRAIN = ["train", "--data", "digits", "--train-images", "200", "--model", "cifar_resnet14", "-b", "50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, its elastic network, and some digits as images."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, "--epochs", "6", "--output", str(folder), "--experiment", "run"]) == 0
    assert main(["elastic", str(folder / "run"), "-o", str(folder / "net.pt"), "--max-drop", "1"]) == 0
    pixels = 6.02 * digits(200).test.tensors[0][:5, 0] + 4.88
    for i, image in enumerate(pixels):
        Image.fromarray(np.uint8(np.round(image.numpy() * 255 / 16))).save(folder / f"{i}.png")
    return folder


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_file_is_the_run_at_every_depth(folder):
    elastic = load_elastic(folder / "net.pt", cifar_resnet(14, in_channels=1))
    assert [str(subnet) for subnet in elastic.subnets] == ["1-1-1", "1-1-2", "1-2-2", "2-2-2"] or (
        elastic.subnets[-1].depths == (2, 2, 2) and elastic.subnets[0].depths == (1, 1, 1)
    )
    weights = load_checkpoint(folder / "run" / "best.pt")["model"]
    assert torch.equal(elastic.at().conv1.weight, weights["conv1.weight"])
    assert elastic.metadata["classes"] == [str(i) for i in range(10)]
    assert set(elastic.metadata["accuracies"]) == set(map(str, elastic.subnets))
    assert (
        0 < elastic.metadata["cascade"]["thresholds"][0] <= 1
        or len(elastic.metadata["cascade"]["order"]) == 1
    )


def test_an_image_file_is_what_the_data_set_gives(folder):
    image = load_image(folder / "3.png", "digits", 32)
    torch.testing.assert_close(image[0], digits(200).test[3][0], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "flags, depths",
    [([], "2-2-2"), (["--depths", "1-1-1"], "1-1-1"), (["--max-ms", "1e9"], None), (["--cascade"], None)],
    ids=["default", "depths", "max-ms", "cascade"],
)
def test_predictions(folder, capsys, flags, depths):
    capsys.readouterr()
    images = [str(folder / f"{i}.png") for i in range(5)]
    assert main(["predict", str(folder / "net.pt"), *images, *flags]) == 0
    header, *rows = lines(capsys)
    assert header.split() == ["image", "class", "confidence", "depths", "ms"] and len(rows) == 5
    elastic = load_elastic(folder / "net.pt", cifar_resnet(14, in_channels=1))
    for path, row in zip(images, rows, strict=True):
        name, kind, confidence, _, used, milliseconds = row.split()
        with torch.no_grad():
            logits = elastic(load_image(path, "digits", 32), depths=tuple(map(int, used.split("-"))))
        assert name == path and int(kind) == int(logits.argmax())
        assert float(confidence) == pytest.approx(100 * float(logits.softmax(1).max()), abs=0.02)
        assert float(milliseconds) > 0 and depths in (None, used)


def test_predictions_that_cannot_be(folder, tmp_path, capsys):
    def message(*arguments):
        capsys.readouterr()
        assert main(["predict", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    net, image = folder / "net.pt", folder / "0.png"
    assert re.search(
        r"max_ms is 1e-06; the fastest depths, [\d-]+, take", message(net, image, "--max-ms", "1e-6")
    )
    assert "this network was made for" in message(net, image, "--depths", "9-9-9")
    assert "there is no image at" in message(net, folder / "none.png")
    assert "can't be read as an image" in message(net, net)
    assert "is no file of ElasticNetwork.save" in message(folder / "run" / "last.pt", image)
    elastic = load_elastic(net, cifar_resnet(14, in_channels=1))
    elastic.metadata["cascade"] = None
    elastic.save(tmp_path / "single.pt")
    assert "holds no cascade" in message(tmp_path / "single.pt", image, "--cascade")
    del elastic.metadata["model"]
    elastic.save(tmp_path / "unknown.pt")
    assert "doesn't say which network it is of (no 'model')" in message(tmp_path / "unknown.pt", image)


def test_depths_that_are_not_nested_have_no_cascade(folder, tmp_path, capsys):
    flags = ["-o", str(tmp_path / "net.pt"), "--depths", "2-1-1", "1-2-2"]
    assert main(["elastic", str(folder / "run"), *flags]) == 0
    assert "no cascade: these depths aren't nested" in capsys.readouterr().out


def test_training_starts_from_a_checkpoint(folder, tmp_path, capsys):
    """Of train, or a state_dict; a head for other classes starts anew, and that is said."""
    weights = load_checkpoint(folder / "run" / "last.pt")["model"]
    run = [
        *TRAIN,
        "--epochs",
        "1",
        "--lr",
        "0",
        "--momentum",
        "0",
        "--weight-decay",
        "0",
        "--method",
        "plain",
    ]
    torch.save(cifar_resnet(14, 7, in_channels=1).state_dict(), tmp_path / "seven.pt")
    for start in (folder / "run" / "last.pt", tmp_path / "seven.pt"):
        capsys.readouterr()
        flags = ["--initial-checkpoint", str(start), "--output", str(tmp_path), "--experiment", start.stem]
        assert main([*run, *flags]) == 0
        found = load_checkpoint(tmp_path / start.stem / "last.pt")["model"]
        expected = weights if start.stem == "last" else torch.load(start)
        assert torch.equal(found["conv1.weight"], expected["conv1.weight"])
        anew = "Start anew, for other classes: fc.weight, fc.bias" in capsys.readouterr().out
        assert anew == (start.stem == "seven")
        assert found["fc.weight"].shape == (10, 64)


def test_the_trunk_learns_at_another_rate(folder, tmp_path):
    weights = load_checkpoint(folder / "run" / "last.pt")["model"]
    flags = ["--epochs", "1", "--trunk-lr-factor", "0", "--weight-decay", "0", "--output", str(tmp_path)]
    assert (
        main([*TRAIN, *flags, "--experiment", "a", "--initial-checkpoint", str(folder / "run" / "last.pt")])
        == 0
    )
    found = load_checkpoint(tmp_path / "a" / "last.pt")["model"]
    assert torch.equal(found["layer3.1.conv2.weight"], weights["layer3.1.conv2.weight"])
    assert not torch.equal(found["fc.weight"], weights["fc.weight"])


def test_pretrained_weights_of_timm(tmp_path, capsys, monkeypatch):
    import timm

    asked = []
    create = timm.create_model

    def record(name, pretrained=False, **options):
        asked.append((name, pretrained))
        torch.manual_seed(5)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", record)
    flags = ["--model", "timm:resnet10t", "--epochs", "0", "--train-images", "20", "--pretrained"]
    assert main(["train", "--data", "digits", *flags]) == 0
    assert asked == [("resnet10t", False), ("resnet10t", True)]
    assert main([*TRAIN, "--pretrained"]) == 2
    assert "pretrained is given with model 'cifar_resnet14'; it takes timm:NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no checkpoint at"),
        (b"nothing", "can't be read; it may be cut off or damaged"),
        ({"a": 1}, "holds no state_dict of a network"),
        (cifar_resnet(20, in_channels=1).state_dict(), "is of another network than cifar_resnet14"),
        (cifar_resnet(8, in_channels=1).state_dict(), "is of another network than cifar_resnet14"),
    ],
    ids=["none", "damaged", "something else", "deeper", "shallower"],
)
def test_initial_checkpoints_that_do_not_fit(tmp_path, capsys, content, message):
    path = tmp_path / "start.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main([*TRAIN, "--epochs", "0", "--initial-checkpoint", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main([*TRAIN, "--pretrained", "--initial-checkpoint", str(path)]) == 2
    assert "are both given" in capsys.readouterr().err
