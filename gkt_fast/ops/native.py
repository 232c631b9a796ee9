"""Finds the compiled module `gkt_fast._native` and turns its errors into Python's."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from pathlib import Path
from types import ModuleType

import torch  # loaded before the native module, so that both share one OpenMP runtime

from .registry import BackendError, UnfitDevice

__all__ = [
    "DTYPES",
    "build_info",
    "check_capability",
    "cuda_stream",
    "native_cuda_module",
    "native_module",
]

logger = logging.getLogger("gkt_fast")

ABI_VERSION = 6

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The ABI's number of a dtype (csrc/gkt_abi.h)."""


@functools.cache
def native_module() -> ModuleType:
    """The native module.

    Raises:
        BackendError: it was not built, doesn't load, or is of another version.
    """
    try:
        from gkt_fast import _native
    except ImportError as error:
        _warn_of_source_tree()
        raise BackendError(f"the native module is not installed ({error})") from error
    if _native.abi_version != ABI_VERSION:
        raise BackendError(
            f"the native module has ABI version {_native.abi_version}, this package needs {ABI_VERSION}: "
            "reinstall gkt_fast"
        )
    return _native


@functools.cache
def _warn_of_source_tree() -> None:
    """Says it once where a source tree is imported that was not installed from, as by `python -m` inside of it."""
    if importlib.util.find_spec("gkt_fast.kernels") is None:
        logger.warning(
            "gkt_fast is imported from the source tree %s, which has neither the native module nor the kernels of an "
            "installed package: install it by pip install -e, or work in another folder",
            Path(__file__).parents[2],
        )


def native_cuda_module() -> ModuleType:
    """The native module, when it was built with CUDA kernels and a CUDA device is here that can run them.

    Where there are several, each is asked by `check_capability` when it is first used. A driver that is too old shows
    when a kernel is launched (csrc/guard.h: `Unsupported`).

    Raises:
        BackendError: one of them is missing.
    """
    module = native_module()
    build = module.build_info()
    if build["cuda"] == "none":
        raise BackendError("the native module was built without nvcc")
    if not torch.cuda.is_available():
        raise BackendError("no CUDA device")
    reasons = []
    for device in range(torch.cuda.device_count()):
        try:
            check_capability(str(build["cuda_architectures"]), device)
        except UnfitDevice as error:
            reasons.append(str(error))
        else:
            return module
    raise BackendError("; ".join(dict.fromkeys(reasons)))


@functools.cache
def check_capability(architectures: str, device: int) -> None:
    """Whether kernels for these of CMake's architectures run on a GPU; asked once per GPU, as they can differ.

    Raises:
        UnfitDevice: they don't.
    """
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs_on(architecture, capability) for architecture in architectures.split(", ")):
        raise UnfitDevice(
            f"the GPU has compute capability {capability[0]}.{capability[1]}, the native module was built for "
            f"{architectures} (GKT_CUDA_ARCHS)"
        )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for one of CMake's architectures runs on a GPU; of names like "native" that is not known.

    Machine code ("-real") runs on GPUs of the same major version, what is specific to an architecture ("90a") on that
    one; otherwise there is PTX too, for every newer GPU.
    """
    parts = re.fullmatch(r"(\d+)(\d)([af]?)(-\w+)?", architecture)
    if parts is None:
        return True
    built = int(parts[1]), int(parts[2])
    if parts[3] == "a":
        return capability == built
    if parts[3] == "f" or parts[4] == "-real":
        return capability[0] == built[0] and capability >= built
    return capability >= built


def cuda_stream(tensor: torch.Tensor) -> int:
    """The handle of torch's current stream on the tensor's device; 0 for a CPU tensor (CUDA on the host)."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def build_info() -> dict[str, object]:
    """Compiler, OpenMP, instruction sets and CUDA of the native module; {"native": reason} without one."""
    try:
        return dict(native_module().build_info())
    except BackendError as error:
        return {"native": str(error)}
