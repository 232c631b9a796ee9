"""What every benchmark shares: interleaved timing in one process, quartiles, the tidy CSV and where it ran."""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gkt_fast.instruments.tables import print_table, read_csv, write_csv

__all__ = [
    "RESULTS",
    "SavedMemory",
    "Timing",
    "environment",
    "measure",
    "print_table",
    "read_csv",
    "write_csv",
]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """One provider's times per call, in milliseconds, in the order measured."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def lower(self) -> float:
        """First quartile."""
        return self._quartile(0)

    @property
    def upper(self) -> float:
        """Third quartile."""
        return self._quartile(2)

    @property
    def repeats(self) -> int:
        return len(self.milliseconds)

    def mean_ratio(self, baseline: Timing) -> float:
        """Mean over the calls of their time relative to the baseline's median: what many calls cost on average."""
        return statistics.fmean(self.milliseconds) / baseline.median

    def _quartile(self, index: int) -> float:
        if len(self.milliseconds) == 1:
            return self.milliseconds[0]
        return statistics.quantiles(self.milliseconds, n=4, method="inclusive")[index]


def measure(
    providers: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every provider `repeats` times, one call of each in turn, so that all see the same noise.

    On a GPU each call is timed between two synchronisations. The garbage collector is off while it measures. For what
    runs on one CPU thread, `clock` can be `time.thread_time`: others on the machine don't add to it.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        for provider in providers.values():
            provider()
    milliseconds: dict[str, list[float]] = {name: [] for name in providers}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, provider in providers.items():
                synchronize()
                start = clock()
                provider()
                synchronize()
                milliseconds[name].append(1e3 * (clock() - start))
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in milliseconds.items()}


class SavedMemory:
    """Bytes of activations that autograd holds for backward, by hooks on what it saves; `peak` is the most so far.

    Args:
        model: its parameters and buffers don't count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._holders: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0

    def __enter__(self) -> SavedMemory:
        memory = self

        class Held:
            """A saved tensor; counts as long as autograd keeps it. Tensors of one storage count once."""

            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = (
                    tensor.detach()
                )  # with its history an op's own output would keep its graph forever
                memory._hold(tensor.untyped_storage())

            def __del__(self) -> None:
                memory._let_go(self.tensor.untyped_storage())

        self._hooks = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self._weights:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)

    def _let_go(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self._weights:
            return
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self._bytes -= storage.nbytes()


def environment() -> dict[str, object]:
    """The columns that say where a row was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return "unknown"
    return result.stdout.strip() or "unknown"
