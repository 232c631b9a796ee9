"""Writes a network, one of its subnets, or an elastic network as ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..network.discovery import Stages
from ..subnets.subnet import Subnet
from .elastic import ElasticNetwork
from .elastic_export import export_elastic
from .extraction import extract_subnet
from .files import written_whole
from .onnx_graph import ExportError, LogitsAlone, check_graph, check_inputs, example_rows, write_graph
from .subnet_table import SubnetResult

__all__ = ["ExportError", "export_onnx"]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    depths: Subnet | Sequence[int] | None = None,
    *,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    results: Sequence[SubnetResult] = (),
    stages: Stages | None = None,
    dynamic_batch: bool = True,
    opset_version: int | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Writes the network in evaluation mode as one ONNX file, after comparing it with onnxruntime.

    An elastic network becomes a folder: see `export_elastic`.

    The model is left as it is: a copy on the CPU in float32 is exported, by `torch.onnx.export` through
    torch.export. The file's inputs are called "input" (or "input0", "input1", ...), its output "logits": of a model
    that returns a dict or an object, the logits alone. It is written under another name and renamed when it has
    passed, so that there is never half a file, and a file of that name stays as it was when anything goes wrong.
    Needs the packages onnx, onnxscript and onnxruntime (`pip install "gkt_fast[export]"`).

    Args:
        model: the network. A subnet's BatchNorm statistics are best estimated anew before
            (`recalibrate_batch_norm`).
        path: the file.
        depths: export this subnet (`extract_subnet`); None: the model as it is.
        inputs: an example of the model's input, or a tuple of them; batch first. Only shapes and dtypes of floating
            point inputs matter. An elastic network that was calibrated knows its own.
        results: of an elastic network, what `evaluate_subnets` found, for the manifest.
        stages: the model's stages, or their module paths; None: found automatically.
        dynamic_batch: whether the file takes batches of any size, or only of the example's.
        opset_version: of ONNX; None: torch's default.
        tolerance: largest difference between onnxruntime's logits and torch's, relative to the largest logit (or to
            1 if that is larger).

    Raises:
        TypeError: inputs holds something else than tensors, or depths doesn't hold integers.
        ValueError: the depths don't fit the model.
        OSError: the path can't be written; found before anything is computed.
        ExportError: torch can't export the model, or the outputs differ by more than the tolerance.
    """
    if isinstance(model, ElasticNetwork):
        if depths is not None or stages is not None:
            raise ValueError("depths and stages are the elastic network's own; leave them out")
        export_elastic(
            model,
            path,
            inputs=inputs,
            results=results,
            dynamic_batch=dynamic_batch,
            opset_version=opset_version,
            tolerance=tolerance,
        )
        return
    if results:
        raise ValueError(
            "results go into the manifest of an elastic network; model is a network of one depth"
        )
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    check_inputs(inputs)
    network = LogitsAlone(model if depths is None else extract_subnet(model, depths, stages))
    batch = len(inputs[0])
    with written_whole(path) as temporary:
        rows = example_rows(inputs, 2 if dynamic_batch else batch)
        write_graph(network, temporary, rows, dynamic_batch=dynamic_batch, opset_version=opset_version)
        check_graph(network, temporary, inputs, (1, 3) if dynamic_batch else (batch,), tolerance)
