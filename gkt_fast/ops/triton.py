"""What every Triton backend needs: where its kernels run, and what it looks like when they can't."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from .registry import BackendError

__all__ = ["DEVICES", "reporting_failures"]

# Triton's interpreter runs kernels on CPU tensors.
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# The GPU's own troubles, which no other backend escapes. torch before 2.8 has no AcceleratorError.
_NOT_TRITONS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
_LONGEST_REASON = 300
# What Triton's launcher reports of the driver, and what in it says that compiled kernels don't fit this GPU.
_DRIVER_ERROR = "Triton Error [CUDA]"
_DOES_NOT_FIT = ("kernel image", "PTX", "invalid device function")


def reporting_failures(launch: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The launcher, raising `BackendError` for whatever goes wrong when Triton compiles and launches.

    Triton has no exception of its own for most of it: a C compiler that is missing is a RuntimeError, ptxas or a
    cache that can't be written an OSError, an architecture it doesn't know an IndexError. Arguments must have been
    checked, so that nothing else is left to go wrong. Only what the driver reports at a launch, such as an illegal
    address of a kernel before, is not Triton's fault and raised as it is, unless it says that kernels don't fit.
    """

    @functools.wraps(launch)
    def launch_or_report(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return launch(*args, **kwargs)
        except _NOT_TRITONS:
            raise
        except Exception as error:
            if _DRIVER_ERROR in str(error) and not any(sign in str(error) for sign in _DOES_NOT_FIT):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[-1] if lines else ''}"[:_LONGEST_REASON]
            raise BackendError(reason) from error

    return launch_or_report
