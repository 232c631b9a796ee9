"""Writes a network, or one of its subnets, as ONNX."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..batch_norm.fusion import unfuse_blocks
from ..network.calls import logits_of
from ..network.copying import copy_of
from ..network.discovery import Stages
from ..subnets.subnet import Subnet
from .extraction import extract_subnet

__all__ = ["ExportError", "check_writable", "export_onnx"]


class ExportError(RuntimeError):
    """The network can't be exported, or what was exported computes something else; nothing was written."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    depths: Subnet | Sequence[int] | None = None,
    *,
    inputs: Tensor | tuple[Tensor, ...],
    stages: Stages | None = None,
    dynamic_batch: bool = True,
    opset_version: int | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Writes the network in evaluation mode as one ONNX file, after holding it against onnxruntime.

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
        inputs: an example of the model's input, or a tuple of them; batch first. Of floating point inputs, only
            shapes and dtypes matter.
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
    import onnxruntime

    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if not inputs or not all(isinstance(value, Tensor) and value.dim() for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise TypeError(
            f"inputs holds ({kinds}); it must be a tensor with a batch dimension, or a tuple of such"
        )
    network = _Logits(_standalone(model, depths, stages)).eval().float().cpu()
    path, temporary = Path(path), _temporary(Path(path))
    check_writable(path)
    try:
        names = ["input"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))]
        batch = len(inputs[0])
        _write(
            network,
            temporary,
            names,
            _rows(inputs, 2 if dynamic_batch else batch),
            dynamic_batch,
            opset_version,
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(temporary, options, providers=["CPUExecutionProvider"])
        for size in (1, 3) if dynamic_batch else (batch,):
            _check_same(network, session, names, _rows(inputs, size), tolerance)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Logits(nn.Module):
    """A network that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return logits_of(self.model(*inputs))


def _standalone(model: nn.Module, depths: Subnet | Sequence[int] | None, stages: Stages | None) -> nn.Module:
    if depths is not None:
        return extract_subnet(model, depths, stages)
    model = copy_of(model)
    unfuse_blocks(model)
    return model


def check_writable(path: str | Path) -> None:
    """Checks that a file can be written in the path's folder, by writing one.

    Raises:
        OSError: it can't be, or the path is a folder.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"path is {str(path)!r}, which can't be written: {reason}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _rows(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """A batch of that size: noise in the form of floating point inputs, repeated rows of others."""
    batch = len(inputs[0])
    generator = torch.Generator().manual_seed(size)

    def resized(value: Tensor) -> Tensor:
        shape = (size, *value.shape[1:]) if len(value) == batch else value.shape
        if value.is_floating_point():
            return torch.randn(shape, generator=generator)
        return value.detach().cpu()[torch.arange(shape[0]) % len(value)]

    return tuple(map(resized, inputs))


def _write(
    network: nn.Module,
    path: Path,
    names: list[str],
    inputs: tuple[Tensor, ...],
    dynamic_batch: bool,
    opset_version: int | None,
) -> None:
    size = torch.export.Dim("batch")
    dynamic = tuple({0: size} if len(value) == len(inputs[0]) else None for value in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself and the model's code
            program = torch.onnx.export(
                network,
                inputs,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(dynamic,) if dynamic_batch else None,
                opset_version=opset_version,
                dynamo=True,
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


def _check_same(
    network: nn.Module, session: object, names: list[str], inputs: tuple[Tensor, ...], tolerance: float
) -> None:
    with torch.no_grad():
        expected = network(*inputs)
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
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
