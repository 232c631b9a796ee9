"""Runs Python with AddressSanitizer's allocator, whose red zones the host runtime checks at every access:

PYTHONPATH=python_tests python -m cuda_host.address_sanitizer -m pytest python_tests/test_OP.py -k cuda-host
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .build import CompilationError, run


def environment() -> dict[str, str]:
    """The environment of a subprocess whose allocations have red zones, which the runtime then checks.

    Raises:
        CompilationError: the compiler has no libasan.
    """
    # libasan looks for the real __cxa_throw when it starts, so libstdc++ has to be there already.
    libraries = [
        run(["g++", f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so.6")
    ]
    for library in libraries:
        if not Path(library).is_absolute():
            raise CompilationError(f"the compiler has no {library}")
    options = "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": " ".join(map(os.path.realpath, libraries)), "ASAN_OPTIONS": options}


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
