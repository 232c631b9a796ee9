"""Hands `ghost_batch_norm` to its Triton kernels."""

from __future__ import annotations

from torch import Tensor

from ..dtypes import FLOAT_DTYPES as DTYPES
from ..triton import DEVICES, reporting_failures
from .problem import Problem

__all__ = ["DEVICES", "DTYPES", "TritonBackend"]


class TritonBackend:
    """The Triton kernels."""

    def __init__(self) -> None:
        from gkt_fast.kernels.triton import ghost_batch_norm as kernels

        self._forward = reporting_failures(kernels.forward)
        self._backward = reporting_failures(kernels.backward)

    def forward(self, problem: Problem, *tensors: Tensor | None) -> None:
        self._forward(problem, *tensors)

    def backward(self, problem: Problem, *tensors: Tensor | None) -> None:
        self._backward(problem, *tensors)
