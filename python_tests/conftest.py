"""Settings of the whole test session: without a GPU Triton kernels run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton.jit reads this when a kernel is defined
