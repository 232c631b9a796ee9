"""An elastic network as a folder of ONNX files, one for each depth, over one file of weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..network.profile import count_flops, one_sample
from .elastic import ElasticNetwork
from .onnx_graph import LogitsAlone, check_graph, check_inputs, example_rows, input_names, write_graph
from .shared_weights import part_name
from .subnet_table import SubnetResult

__all__ = ["export_elastic"]

WEIGHTS = "weights.bin"
MANIFEST = "manifest.json"
ALIGNMENT = 4096
"""Bytes: a page, so that a runtime can map tensors of the file into memory."""
LEAST_BYTES = 1024
"""Smaller tensors stay in the graph: shapes and axes must be known when it is read."""


def export_elastic(
    elastic: ElasticNetwork,
    folder: str | Path,
    *,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    results: Sequence[SubnetResult] = (),
    dynamic_batch: bool = True,
    opset_version: int | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Writes "<depths>.onnx" for each depth, all over "weights.bin", and "manifest.json".

    Every depth is held against torch by onnxruntime, as it reads the shared file. The folder appears whole, or not at
    all. BatchNorm stays a layer of its own in the graphs (folded into the convolutions, the depths would have no
    weights in common); onnxruntime folds it when it loads a file.

    The manifest has, for each depth: depths, file, parameters, flops (of one sample), accuracy (0 to 1), loss, and
    latencies in milliseconds; null where `results` doesn't say.

    Args:
        elastic: the network.
        folder: a new folder, or an empty one.
        inputs: an example of its input as of `export_onnx`; None: the form that its calibration images had.
        results: of `evaluate_subnets(elastic, ...)`.
        dynamic_batch: as of `export_onnx`.
        opset_version: as of `export_onnx`.
        tolerance: as of `export_onnx`.

    Raises:
        ValueError: inputs is None and the network was made without calibration images.
        OSError: the folder can't be written or isn't empty; found before anything is computed.
        ExportError: torch can't export a depth, or onnxruntime's logits differ.
    """
    if inputs is None:
        if elastic.sample is None:
            raise ValueError(
                "inputs is None, and the network was made without calibration images: give an example of its input"
            )
        inputs = torch.zeros(2, *elastic.sample)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    check_inputs(inputs)
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"folder is {str(folder)!r}, which holds files or is one; name a new or an empty folder"
        )
    temporary.mkdir(parents=True)
    try:
        rows = []
        with open(temporary / WEIGHTS, "wb") as file:
            weights = _Weights(file)
            for subnet in elastic.subnets:
                network = LogitsAlone(elastic.at(subnet))
                path = temporary / f"{part_name(subnet)}.onnx"
                example = example_rows(inputs, 2 if dynamic_batch else len(inputs[0]))
                write_graph(
                    network,
                    path,
                    example,
                    dynamic_batch=dynamic_batch,
                    opset_version=opset_version,
                    optimize=False,
                )
                weights.take(path)
                check_graph(network, path, inputs, (1, 3) if dynamic_batch else (len(inputs[0]),), tolerance)
                rows.append(
                    {
                        "depths": list(subnet.depths),
                        "keep": [list(stage) for stage in subnet.keep],
                        "file": path.name,
                        "parameters": sum(parameter.numel() for parameter in network.parameters()),
                        "flops": count_flops(network, one_sample(inputs)),
                        **_measured(next((r for r in results if r.subnet == subnet), None)),
                    }
                )
        manifest = {
            "format": 1,
            "weights": WEIGHTS,
            "inputs": input_names(inputs),
            "output": "logits",
            "sample": [list(value.shape[1:]) for value in inputs],
            "depths": rows,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _measured(result: SubnetResult | None) -> dict[str, Any]:
    if result is None:
        return {"accuracy": None, "loss": None, "latencies": None}
    latencies = [vars(latency) for latency in result.latencies] or None
    return {"accuracy": result.accuracy, "loss": result.loss, "latencies": latencies}


class _Weights:
    """Tensors of several graphs in one file, each once: those of equal bytes are one."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.places: dict[bytes, int] = {}

    def take(self, path: Path) -> None:
        """Moves a graph's large tensors into the file."""
        import onnx
        from onnx.external_data_helper import set_external_data

        model = onnx.load(path)
        for tensor in model.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) < LEAST_BYTES:
                continue
            key = hashlib.sha256(data).digest()
            if key not in self.places:
                self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
                self.places[key] = self.file.tell()
                self.file.write(data)
            tensor.raw_data = b""
            set_external_data(tensor, WEIGHTS, self.places[key], len(data))
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
        self.file.flush()
        for node in model.graph.node:
            del node.metadata_props[:]  # torch's traces of the model's code, longer than the graph
        path.write_bytes(model.SerializeToString())
