"""Elastic networks as ONNX: a graph for each depth over one file of weights, and a manifest."""

from __future__ import annotations

import json

import onnx
import onnxruntime
import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401

from gkt_fast import ExportError, evaluate_subnets, export_onnx, make_elastic
from gkt_fast.deployment import elastic_export
from gkt_fast.models import cifar_resnet

DEPTHS = [(1, 1, 1), (2, 2, 2)]


def images(rows=6):
    return torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def elastic():
    torch.manual_seed(0)
    model = cifar_resnet(14, num_classes=5, width=16)
    return make_elastic(model, DEPTHS, calibration_loader=[images()])


def test_every_depth_over_one_file_of_weights(elastic, tmp_path):
    results = evaluate_subnets(elastic, [(images(), torch.arange(6) % 5)], latency=["torch"], latency_batch=2)
    export_onnx(elastic, tmp_path / "net", results=results[:1])
    files = {path.name: path.stat().st_size for path in (tmp_path / "net").iterdir()}
    assert files.keys() == {"1-1-1.onnx", "2-2-2.onnx", "weights.bin", "manifest.json"}
    parameters = 4 * sum(parameter.numel() for parameter in elastic.parameters())
    assert 0.95 * parameters < files["weights.bin"] < 1.5 * parameters  # tensors start on pages
    assert max(files["1-1-1.onnx"], files["2-2-2.onnx"]) < 0.25 * parameters
    x = images(3)
    for depths in DEPTHS:
        path = tmp_path / "net" / f"{'-'.join(map(str, depths))}.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"input": x.numpy()})
        with torch.no_grad():
            expected = elastic(x, depths=depths)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)
        onnx.checker.check_model(str(path))
    manifest = json.loads((tmp_path / "net" / "manifest.json").read_text())
    assert (manifest["weights"], manifest["sample"], manifest["inputs"]) == (
        "weights.bin",
        [[3, 12, 12]],
        ["input"],
    )
    first, second = manifest["depths"]
    assert first["depths"] == [1, 1, 1] and second["file"] == "2-2-2.onnx"
    assert (first["accuracy"], first["flops"]) == (results[0].accuracy, results[0].flops)
    assert [entry["batch_size"] for entry in first["latencies"]] == [1, 2]
    assert second["accuracy"] is None and second["latencies"] is None
    assert second["flops"] == results[1].flops and second["parameters"] == results[1].parameters


def test_a_folder_that_holds_files_is_left_alone(elastic, tmp_path, monkeypatch):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(
        torch.onnx, "export", lambda *_, **__: pytest.fail("it exported before it complained")
    )
    for name in ("net", "file"):
        with pytest.raises(FileExistsError, match="which holds files or is one"):
            export_onnx(elastic, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"net", "file"}


def test_nothing_is_left_of_an_export_that_fails(elastic, tmp_path, monkeypatch):
    def differs(*_):
        raise ExportError("onnxruntime's logits differ")

    monkeypatch.setattr(elastic_export, "check_graph", differs)
    with pytest.raises(ExportError, match="logits differ"):
        export_onnx(elastic, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_do_not_fit(elastic, tmp_path):
    with pytest.raises(ValueError, match="depths and stages are the elastic network's own"):
        export_onnx(elastic, tmp_path / "net", (1, 1, 1))
    with pytest.raises(ValueError, match="results go into the manifest of an elastic network"):
        export_onnx(elastic.at(), tmp_path / "net", inputs=images(), results=[1])
    with pytest.raises(TypeError, match=r"inputs holds \(NoneType\)"):
        export_onnx(elastic.at(), tmp_path / "net")
    unknown = make_elastic(torch.nn.Sequential(*_blocks()), [(1,), (2,)])
    with pytest.raises(ValueError, match="made without calibration images: give an example of its input"):
        export_onnx(unknown, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return x + self.layer(x)


def _blocks():
    return [Residual(), Residual()]
