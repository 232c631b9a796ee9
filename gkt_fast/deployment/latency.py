"""How long networks take, on this device: in torch, and in onnxruntime where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .onnx_graph import ExportError, LogitsAlone, example_rows, graph_session, input_names, write_graph

__all__ = ["RUNTIMES", "Latency", "measure_latencies"]

RUNTIMES = ("torch", "onnxruntime")

logger = logging.getLogger("gkt_fast")


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Args:
        runtime: "torch" or "onnxruntime".
        batch_size: rows of the batch.
        median_ms: milliseconds for the batch.
        lower_ms: first quartile.
        upper_ms: third quartile.
    """

    runtime: str
    batch_size: int
    median_ms: float
    lower_ms: float
    upper_ms: float


@torch.no_grad()
def measure_latencies(
    networks: Sequence[nn.Module],
    inputs: tuple[Tensor, ...],
    batch_sizes: Sequence[int] = (1,),
    runtimes: Sequence[str] = RUNTIMES,
    repeats: int = 20,
    warmup: int = 3,
) -> list[tuple[Latency, ...]]:
    """Times every network in every runtime and batch size, one call of each in turn, so that all see the same noise.

    Torch runs where the network is, in evaluation mode as it is; onnxruntime on the CPU alone, with as many threads as
    torch has. A runtime that isn't installed, or can't run one of the networks, is left out, and that is logged.

    Args:
        networks: in evaluation mode.
        inputs: an example of their input, of any number of rows.
        batch_sizes: distinct.
        runtimes: of `RUNTIMES`.
        repeats: how often each is timed.
        warmup: how often each runs before.

    Returns:
        For each network its latencies, in the order of runtimes and batch sizes.

    Raises:
        ValueError: an argument is out of its range.
    """
    unknown = [runtime for runtime in runtimes if runtime not in RUNTIMES]
    if unknown:
        raise ValueError(f"runtimes holds {unknown[0]!r}; it must hold {' or '.join(map(repr, RUNTIMES))}")
    for size in batch_sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes holds {size!r}; it must hold integers of at least 1")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    parameters = [next(network.parameters(), torch.empty(0)) for network in networks]
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[tuple[int, str, int], Callable[[], Any]] = {}
        sessions = _sessions(networks, inputs, Path(folder)) if "onnxruntime" in runtimes else []
        for i, (network, parameter) in enumerate(zip(networks, parameters, strict=True)):
            for runtime in runtimes:
                for size in dict.fromkeys(batch_sizes):
                    rows = example_rows(inputs, size)
                    if runtime == "torch":
                        on_device = (_like(value, parameter) for value in rows)
                        calls[i, runtime, size] = partial(network, *on_device)
                    elif sessions:
                        feed = {
                            name: value.numpy() for name, value in zip(input_names(rows), rows, strict=True)
                        }
                        calls[i, runtime, size] = partial(sessions[i].run, None, feed)
        times = _interleaved(calls, repeats, warmup)
    return [
        tuple(_summary(key[1], key[2], seconds) for key, seconds in times.items() if key[0] == i)
        for i in range(len(networks))
    ]


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


def _sessions(networks: Sequence[nn.Module], inputs: tuple[Tensor, ...], folder: Path) -> list[Any]:
    """One for each network; none where onnxruntime can't run all of them."""
    missing = [
        name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
    ]
    if missing:
        logger.info("no latencies in onnxruntime: %s isn't installed", ", ".join(missing))
        return []
    if any(next(network.parameters(), torch.empty(0)).device.type != "cpu" for network in networks):
        logger.info("no latencies in onnxruntime: the network is on a GPU, and it is timed on the CPU alone")
        return []
    sessions = []
    for i, network in enumerate(networks):
        path = folder / f"{i}.onnx"
        try:
            write_graph(LogitsAlone(network), path, example_rows(inputs, 2), optimize=False)
        except ExportError as error:
            logger.warning("no latencies in onnxruntime: %s", error)
            return []
        sessions.append(graph_session(path))
    return sessions


def _interleaved(
    calls: dict[tuple[int, str, int], Callable[[], Any]], repeats: int, warmup: int
) -> dict[tuple[int, str, int], list[float]]:
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    seconds: dict[tuple[int, str, int], list[float]] = {key: [] for key in calls}
    for repeat in range(warmup + repeats):
        for key, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if repeat >= warmup:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def _summary(runtime: str, batch_size: int, seconds: list[float]) -> Latency:
    milliseconds = [1e3 * value for value in seconds]
    if len(milliseconds) == 1:
        return Latency(runtime, batch_size, *3 * milliseconds)
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Latency(runtime, batch_size, median, lower, upper)
