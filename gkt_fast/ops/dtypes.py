"""The dtypes that the ops take, and those that they compute in."""

from __future__ import annotations

import torch

__all__ = ["FLOAT_DTYPES", "accumulation_dtype"]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, of sums and of statistics: float64 for float64, float32 for everything else."""
    return dtype if dtype is torch.float64 else torch.float32
