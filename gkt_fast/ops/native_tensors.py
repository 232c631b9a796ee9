"""Tensors for the native module, which calls torch through libtorch's C interface: as handles, each for one use."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["finds_torch", "handles_of", "tensors_of"]

logger = logging.getLogger("gkt_fast")

handles_of = getattr(getattr(torch._C, "_aoti", None), "unsafe_alloc_void_ptrs_from_tensors", None)
"""Handles of the tensors in a list. Whoever gets them must take each once."""

tensors_of = getattr(getattr(torch._C, "_aoti", None), "alloc_tensors_by_stealing_from_void_ptrs", None)
"""The tensors of handles, which end with this."""


@functools.cache
def finds_torch(native: ModuleType) -> bool:
    """Whether the native module can call this torch; said once where it can't."""
    folder = Path(torch.__file__).parent / "lib"
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    cpu, cuda = (folder / f"libtorch_{device}{suffix}" for device in ("cpu", "cuda"))
    missing: str | None = "torch._C._aoti"
    if handles_of is not None and tensors_of is not None:
        missing = native.load_torch(str(cpu), str(cuda) if cuda.exists() else None)
    if missing is not None:
        logger.info(
            "Python runs residual blocks and updates running statistics, which takes longer: this torch has no %s",
            missing,
        )
    return missing is None
