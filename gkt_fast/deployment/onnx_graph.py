"""ONNX graphs of networks: written by torch, held against torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batch_norm.fusion import unfuse_blocks
from ..network.calls import logits_of
from ..network.copying import copy_of

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "ExportError",
    "LogitsAlone",
    "check_graph",
    "check_inputs",
    "example_rows",
    "graph_session",
    "input_names",
    "write_graph",
]


class ExportError(RuntimeError):
    """The network can't be exported, or what was exported computes something else; nothing was written."""


class LogitsAlone(nn.Module):
    """A copy of a network on the CPU, in float32 and evaluation mode, that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy_of(model)
        unfuse_blocks(self.model)
        self.eval().float().cpu()

    def forward(self, *inputs: Tensor) -> Tensor:
        return logits_of(self.model(*inputs))


def input_names(inputs: tuple[Tensor, ...]) -> list[str]:
    """The names of a graph's inputs: "input", or "input0", "input1", ...; its output is "logits"."""
    return ["input"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))]


def check_inputs(inputs: tuple[Tensor, ...]) -> None:
    """Raises TypeError where they aren't tensors with a batch dimension."""
    if not inputs or not all(isinstance(value, Tensor) and value.dim() for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise TypeError(
            f"inputs holds ({kinds}); it must be a tensor with a batch dimension, or a tuple of such"
        )


def example_rows(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """A batch of that size: noise in the form of floating point inputs, repeated rows of others."""
    batch = len(inputs[0])
    generator = torch.Generator().manual_seed(size)

    def resized(value: Tensor) -> Tensor:
        shape = (size, *value.shape[1:]) if len(value) == batch else value.shape
        if value.is_floating_point():
            return torch.randn(shape, generator=generator)
        return value.detach().cpu()[torch.arange(shape[0]) % len(value)]

    return tuple(map(resized, inputs))


def write_graph(
    network: LogitsAlone,
    path: Path,
    inputs: tuple[Tensor, ...],
    *,
    dynamic_batch: bool = True,
    opset_version: int | None = None,
    optimize: bool = True,
) -> None:
    """Writes the network as one file.

    Args:
        network: what is written.
        path: the file.
        inputs: an example, two rows or more where the batch is to be dynamic.
        dynamic_batch: whether the file takes batches of any size.
        opset_version: of ONNX; None: torch's default.
        optimize: whether constants are folded, BatchNorm into convolutions among them; without it the file holds the
            network's own tensors, and the runtime folds them when it loads it.

    Raises:
        ExportError: torch can't export the network.
        OSError: the file can't be written.
    """
    size = torch.export.Dim("batch")
    dynamic = tuple({0: size} if len(value) == len(inputs[0]) else None for value in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself and the model's code
            program = torch.onnx.export(
                network,
                inputs,
                input_names=input_names(inputs),
                output_names=["logits"],
                dynamic_shapes=(dynamic,) if dynamic_batch else None,
                opset_version=opset_version,
                dynamo=True,
                optimize=optimize,
                verbose=False,
            )
            program.save(path, external_data=False)
    except OSError:
        raise
    except Exception as error:  # whatever the model's own code raises while it is traced
        reason = next(
            (line for line in str(error.__cause__ or error).splitlines() if line.strip()), repr(error)
        )
        hint = "; if it is the size of the batch, try dynamic_batch=False" if dynamic_batch else ""
        raise ExportError(f"torch can't export {type(network.model).__name__}: {reason}{hint}") from error


def graph_session(path: Path) -> onnxruntime.InferenceSession:
    """A session on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def check_graph(
    network: LogitsAlone, path: Path, inputs: tuple[Tensor, ...], sizes: Sequence[int], tolerance: float
) -> None:
    """Holds onnxruntime's logits against the network's, on batches of these sizes.

    Raises:
        ExportError: they differ by more than the tolerance, relative to the largest logit (or to 1).
    """
    session = graph_session(path)
    for size in sizes:
        _check_same(network, session, example_rows(inputs, size), tolerance)


def _check_same(
    network: LogitsAlone, session: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...], tolerance: float
) -> None:
    with torch.no_grad():
        expected = network(*inputs)
    feed = {name: value.numpy() for name, value in zip(input_names(inputs), inputs, strict=True)}
    actual = torch.from_numpy(session.run(["logits"], feed)[0])
    if actual.shape != expected.shape:
        raise ExportError(
            f"onnxruntime returns logits of shape {tuple(actual.shape)} where torch returns {tuple(expected.shape)}"
        )
    difference = (actual - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise ExportError(
            f"onnxruntime's logits differ from torch's by {difference:.3g}; the tolerance allows {allowed:.3g}"
        )
