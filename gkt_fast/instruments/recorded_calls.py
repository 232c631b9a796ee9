"""Records the convolutions and matrix products of a piece of code, and runs each of them again by itself."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

_FACTORIES = {
    torch.float32: torch.randn, torch.float64: torch.randn, torch.int64: torch.zeros, torch.bool: torch.zeros,
}  # fmt: skip


class Call:
    """An operator with its arguments, tensors by shape, strides and dtype; equal calls are one."""

    def __init__(self, operator: Any, args: tuple, kwargs: dict) -> None:
        self.operator = operator
        self.arguments = tree_map_only(torch.Tensor, _Layout.of, (args, kwargs))
        self._key = (str(operator), repr(self.arguments))
        self.flop = 0

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self._key == other._key

    def fresh(self) -> Callable[[], object]:
        """The call on tensors of its own."""
        args, kwargs = tree_map_only(_Layout, _Layout.make, self.arguments)
        return lambda: self.operator(*args, **kwargs)


class _Layout:
    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.stride, self.dtype = shape, stride, dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Layout:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def make(self) -> torch.Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        values = _FACTORIES[self.dtype](max(extent, 1), dtype=self.dtype)
        return values.as_strided(self.shape, self.stride)

    def __repr__(self) -> str:
        return f"{self.shape}{self.stride}{self.dtype}"


class Recorder(TorchDispatchMode):
    """Counts the calls that torch's own FLOP counter knows: convolutions, matrix products, attention."""

    def __init__(self, calls: Counter[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        counted = flop_registry.get(operator.overloadpacket)
        if counted is not None:
            call = Call(operator, args, kwargs)
            call.flop = counted(*args, **kwargs, out_val=result)
            self.calls[call] += 1
        return result


def time_calls(calls: set[Call], repeats: int) -> dict[Call, float]:
    """Median milliseconds of each call by itself, one of each in turn."""
    functions = {call: call.fresh() for call in calls}
    samples: dict[Call, list[float]] = {call: [] for call in calls}
    for repeat in range(repeats + 1):
        for call, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                samples[call].append(1e3 * (time.perf_counter() - start))
    return {call: statistics.median(values) for call, values in samples.items()}
