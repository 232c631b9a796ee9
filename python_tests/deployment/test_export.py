"""Export to ONNX: what is written computes the same, and nothing half-written is left."""

from __future__ import annotations

import os

import onnx
import onnxruntime
import pytest
import torch
from helpers.deployable_nets import NETS, logits
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn

from gkt_fast import ExportError, active_subnet, export_onnx, extract_subnet, fuse_blocks
from gkt_fast.models import cifar_resnet


def run(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: v.numpy() for n, v in zip(names, inputs, strict=True)})[0])


def small_net():
    torch.manual_seed(0)
    model = cifar_resnet(14, num_classes=5, width=4)
    model(torch.randn(8, 3, 12, 12))
    return model


@pytest.mark.parametrize(
    "name",
    ["torchvision ResNet", "torchvision FCN", "timm ConvNeXt", "transformers ViT"],
)
def test_subnets_of_each_library(tmp_path, capfd, recwarn, name):
    """Also of models that return dicts and objects. Nothing is printed, no warning gets out."""
    build, full, depths, stages = NETS[name]
    torch.manual_seed(0)
    model = build(full).eval()
    capfd.readouterr()
    recwarn.clear()
    export_onnx(model, tmp_path / "net.onnx", depths, inputs=torch.zeros(1, 3, 16, 16), stages=stages)
    assert (capfd.readouterr(), [str(warning.message) for warning in recwarn]) == (("", ""), [])
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad(), active_subnet(model, depths, stages):
        expected = logits(model(x))
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), expected, rtol=1e-3, atol=1e-4)


def test_the_file_says_what_it_takes_and_gives(tmp_path):
    path = tmp_path / "net.onnx"
    export_onnx(small_net(), str(path), inputs=torch.zeros(4, 3, 12, 12), opset_version=18)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert graph.opset_import[0].version == 18
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("input", ["batch", 3, 12, 12])]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["batch", 5])]


def test_a_batch_of_fixed_size(tmp_path):
    path = tmp_path / "net.onnx"
    export_onnx(small_net(), path, inputs=torch.zeros(4, 3, 12, 12), dynamic_batch=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, 3, 12, 12]


def test_the_model_is_left_as_it_was(tmp_path):
    """Fused, in training mode, in another dtype."""
    model = small_net().double().train()
    fuse_blocks(model)
    kinds = [type(module) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "net.onnx", inputs=torch.zeros(2, 3, 12, 12, dtype=torch.float64))
    assert [type(module) for module in model.modules()] == kinds and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(3, 3, 12, 12)
    expected = model.eval()(x.double()).float().detach()
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), expected, rtol=1e-3, atol=1e-4)


class Tokens(nn.Module):
    """Two inputs, one of them of integers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens, scale):
        return self.head(self.embed(tokens).mean(1) * scale)


def test_several_inputs(tmp_path):
    torch.manual_seed(0)
    model = Tokens()
    tokens, scale = torch.tensor([[1, 2, 6], [0, 3, 3]]), torch.tensor([[2.0], [-1.0]])
    export_onnx(model, tmp_path / "net.onnx", inputs=(tokens, scale))
    torch.testing.assert_close(run(tmp_path / "net.onnx", tokens, scale), model(tokens, scale).detach())


@pytest.mark.parametrize("place, reason", [("gone/net.onnx", "No such file"), ("folder", "it is a folder")])
def test_a_path_that_cannot_be_written_is_found_at_once(tmp_path, monkeypatch, place, reason):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(
        torch.onnx, "export", lambda *_, **__: pytest.fail("it exported before it complained")
    )
    with pytest.raises(OSError, match=f"path is '.*{place}', which can't be written: {reason}"):
        export_onnx(small_net(), tmp_path / place, inputs=torch.zeros(1, 3, 12, 12))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_path_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="which can't be written: Not a directory"):
        export_onnx(small_net(), tmp_path / "file" / "net.onnx", inputs=torch.zeros(1, 3, 12, 12))


class Wrong(nn.Module):
    """What torch.export sees is not what runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + (1.0 if torch.compiler.is_exporting() else 0.0)


class Looks(nn.Module):
    """Its control flow depends on values."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    "model, message",
    [
        (Wrong(), "onnxruntime's logits differ from torch's by 1; the tolerance allows"),
        (Looks(), "torch can't export Looks: .*try dynamic_batch=False"),
    ],
    ids=["wrong", "control flow"],
)
def test_what_was_there_stays_when_the_export_fails(tmp_path, model, message):
    (tmp_path / "net.onnx").write_text("an older file")
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "net.onnx", inputs=torch.zeros(1, 4))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.onnx", "an older file")]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def save(self, path, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(Tokens().embed, tmp_path / "net.onnx", inputs=torch.zeros(2, 3, dtype=torch.int64))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"depths": (9, 1, 1)}, ValueError, r"depths is \(9, 1, 1\); its entry 0 must be between 0 and 2"),
        ({"depths": (1, 1)}, ValueError, r"depths is \(1, 1\); it must have one entry for each of 3 stages"),
        ({"inputs": [torch.zeros(1, 3, 12, 12)]}, TypeError, r"inputs holds \(list\); it must be a tensor"),
        ({"inputs": ()}, TypeError, r"inputs holds \(\); it must be a tensor"),
        ({"inputs": torch.tensor(1.0)}, TypeError, "it must be a tensor with a batch dimension"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, change, kind, message):
    arguments = {"inputs": torch.zeros(1, 3, 12, 12)} | change
    with pytest.raises(kind, match=message):
        export_onnx(small_net(), tmp_path / "net.onnx", **arguments)
    assert os.listdir(tmp_path) == []


def test_an_extracted_subnet_is_exported_as_it_is(tmp_path):
    model = small_net()
    subnet = extract_subnet(model, (1, 1, 1)).eval()
    export_onnx(subnet, tmp_path / "net.onnx", inputs=torch.zeros(1, 3, 12, 12))
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), subnet(x).detach(), rtol=1e-3, atol=1e-4)
    parameters = sum(parameter.numel() for parameter in subnet.parameters())
    assert (tmp_path / "net.onnx").stat().st_size < 4 * parameters + 60_000
