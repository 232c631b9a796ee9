"""Compiles CUDA C++ sources for the CPU (README.md) and loads them; objects are cached by their inputs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock

from gkt_fast.ops import registry

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INCLUDES = (HERE / "include", ROOT / "kernels" / "cuda", ROOT / "csrc")
RUNTIME = tuple(sorted((HERE / "runtime").glob("*.cpp")))

COMMON_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-Werror=uninitialized",
)
# The sanitizers' calls end in runtime/instrumentation.cpp, not in GCC's libraries.
KERNEL_FLAGS = (
    *("-x", "c++", "-O1", "-g", "-Wno-unknown-pragmas"),
    *("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
    "-fsanitize=bounds,alignment,shift,signed-integer-overflow,integer-divide-by-zero",
)


class CompilationError(RuntimeError):
    """The compiler's message about a source."""


def missing_tools() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    if sys.platform != "linux":
        return f"the runtime is written for Linux, not {sys.platform}"
    compiler = shutil.which("g++")
    if compiler is None:
        return "g++ is not on PATH"
    version = run([compiler, "-dumpversion"]).strip()
    if int(version.split(".")[0]) < 11:
        return f"g++ is {version}; it must be 11 or newer"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def load_library(*sources: str | Path, define: Sequence[str] = ()) -> ctypes.CDLL:
    """The `extern "C"` functions of some .cu files, which may use `csrc/guard.h` and `common.cuh`.

    Args:
        sources: the .cu files.
        define: macros for every source, the runtime's too; CUDA_HOST_UCONTEXT takes the portable fibers.

    Raises:
        CompilationError: with the compiler's message.
    """
    objects = _compile_all([*RUNTIME, ROOT / "csrc" / "cpu" / "isa.cpp", *map(Path, sources)], define)
    library = ctypes.CDLL(str(_link(objects, "kernels")))
    library.cuda_host_last_error.restype = ctypes.c_char_p
    return library


@functools.cache
def native_module() -> ModuleType:
    """`csrc/bindings.cpp` with every kernels/cuda/*.cu, compiled for the CPU; it has no CPU kernels.

    Raises:
        CompilationError: with the compiler's message.
    """
    kernels = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
    bindings = ROOT / "csrc" / "bindings.cpp"
    objects = _compile_all([*RUNTIME, ROOT / "csrc" / "cpu" / "isa.cpp", *kernels, bindings])
    # The CPU entries that bindings.cpp names are defined as the one that says they are missing.
    undefined = run(["nm", "-u", *map(str, objects)])
    absent = sorted(set(re.findall(r"\bgkt_\w+_cpu\b", undefined)))
    path = _link(objects, "_native", [f"-Wl,--defsym={name}=gkt_no_cpu_kernel" for name in absent])
    loader = importlib.machinery.ExtensionFileLoader("cuda_host._native", str(path))
    spec = importlib.util.spec_from_file_location("cuda_host._native", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def register(op: str, functions: Callable[[ModuleType], Any]) -> None:
    """Adds the backend "cuda-host" of an op: its "cuda" backend on CPU tensors.

    Args:
        op: name of the op.
        functions: makes the object with the op's functions over a native module; the op's "cuda" backend is
            `functions(native_cuda_module())`, this one is `functions(native_module())`.
    """

    def load() -> Any:
        if reason := missing_tools():
            raise registry.BackendError(reason)
        return functions(native_module())

    dtypes = registry.find(op, "cuda").dtypes
    registry.register(registry.Implementation(op, "cuda-host", ("cpu",), dtypes, load))


@contextmanager
def only_buffers(library: ctypes.CDLL, *tensors: torch.Tensor) -> Iterator[None]:
    """Kernels launched in this block may access these tensors' elements and no other global memory."""
    begins = (ctypes.c_size_t * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    sizes = (ctypes.c_size_t * len(tensors))(*(_extent(tensor) for tensor in tensors))
    library.cuda_host_set_buffers(begins, sizes, len(tensors))
    try:
        yield
    finally:
        library.cuda_host_set_buffers(None, None, 0)


@dataclass(frozen=True)
class Traffic:
    """Global memory accesses of one source line of a kernel.

    Args:
        kernel: name of the kernel; the line "" is all of it.
        line: "FILE:LINE", with " from FILE:LINE" where that was inlined.
        kind: "read", "write" or "atomic update".
        accesses: number of accesses, one per thread.
        bytes: what the threads asked for.
        sector_bytes: what the memory moves for it, in whole sectors of 32 bytes, when the lanes of a warp that
            run the line for the n-th time are one request and nothing stays in a cache.
        distinct_bytes: bytes at different addresses, 0 for a single line: the least that must be moved.
        most_of_a_thread: how often a thread ran the line, at most; of a kernel the most of any line.
    """

    kernel: str
    line: str
    kind: str
    accesses: int
    bytes: int
    sector_bytes: int
    distinct_bytes: int
    most_of_a_thread: int


@contextmanager
def count_traffic(library: ctypes.CDLL | ModuleType) -> Iterator[list[Traffic]]:
    """Counts the global memory accesses of the kernels launched in this block; the list is filled at its end."""
    library = _as_library(library)
    library.cuda_host_count_traffic.restype = ctypes.c_char_p
    rows: list[Traffic] = []
    library.cuda_host_count_traffic(1)
    try:
        yield rows
    finally:
        for text in library.cuda_host_count_traffic(0).decode().splitlines():
            kernel, line, kind, *numbers = text.split("\t")
            rows.append(Traffic(kernel, line, kind, *map(int, numbers)))


@contextmanager
def last_first(library: ctypes.CDLL | ModuleType) -> Iterator[None]:
    """Kernels launched in this block run their last block, warp and lane first, which must not change a bit.

    Args:
        library: what `load_library` or `native_module` returned.
    """
    library = _as_library(library)
    library.cuda_host_set_last_first(1)
    try:
        yield
    finally:
        library.cuda_host_set_last_first(0)


@contextmanager
def refusing_launches(library: ctypes.CDLL | ModuleType, error: int) -> Iterator[None]:
    """Kernels launched in this block don't run, and report a cudaError_t, as on a GPU that the build doesn't fit."""
    library = _as_library(library)
    library.cuda_host_refuse_launches(error)
    try:
        yield
    finally:
        library.cuda_host_refuse_launches(0)


@contextmanager
def refusing_attributes(library: ctypes.CDLL | ModuleType, error: int) -> Iterator[None]:
    """cudaFuncSetAttribute fails in this block, and leaves its error behind, as CUDA does."""
    library = _as_library(library)
    library.cuda_host_refuse_attributes(error)
    try:
        yield
    finally:
        library.cuda_host_refuse_attributes(0)


def _as_library(library: ctypes.CDLL | ModuleType) -> ctypes.CDLL:
    return ctypes.CDLL(library.__file__) if isinstance(library, ModuleType) else library


def _extent(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@functools.cache
def _compiler_version() -> str:
    return run(["g++", "--version"])


@functools.cache
def cache_folder() -> Path:
    """Where objects and libraries are kept: GKT_CUDA_HOST_CACHE, or a folder in the temporary directory."""
    default = Path(tempfile.gettempdir()) / f"gkt-cuda-host-{os.getuid()}"
    folder = Path(os.environ.get("GKT_CUDA_HOST_CACHE") or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CompilationError(f"{folder} belongs to another user: set GKT_CUDA_HOST_CACHE")
    return folder


def _flags(source: Path) -> list[str]:
    flags = [*COMMON_FLAGS, *(f"-I{folder}" for folder in INCLUDES)]
    if source.suffix == ".cu":
        return [*flags, *KERNEL_FLAGS]
    if source.name != "bindings.cpp":
        return [*flags, "-O2"]
    import pybind11

    build_info = {"OPENMP": "none", "CUDA": "host", "COMPILER": "g++", "ISAS": "none", "CUDA_ARCHS": "none"}
    return [
        *flags,
        "-O0",
        "-DGKT_WITH_CUDA=1",
        # pybind11 lets a C++ type be bound once among modules with the same of these; gkt_fast._native binds them too.
        '-DPYBIND11_STDLIB="_cuda_host"',
        *(f'-DGKT_BUILD_{name}="{value}"' for name, value in build_info.items()),
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_path('include')}",
    ]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def _compile_all(sources: Sequence[Path], define: Sequence[str] = ()) -> list[Path]:
    headers = [path for folder in (*INCLUDES, HERE / "runtime") for path in sorted(folder.rglob("*.*h"))]
    base = _digest(_compiler_version(), *(path.read_bytes() for path in headers))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: _compile(source.resolve(), base, define), sources))


def _compile(source: Path, base: str, define: Sequence[str]) -> Path:
    flags = [*_flags(source), *(f"-D{name}" for name in define)]
    beside = [path.read_bytes() for path in sorted(source.parent.glob("*.*h"))]
    target = (
        cache_folder() / f"{source.stem}-{_digest(base, *flags, str(source), source.read_bytes(), *beside)}.o"
    )
    with FileLock(target.with_suffix(".lock")):  # other processes need the same; one of them compiles it
        if not target.exists() and source.suffix == ".cu":
            assembly = target.with_suffix(f".{os.getpid()}.s")
            run(["g++", *flags, "-S", str(source), "-o", str(assembly)])
            assembly.write_text(_with_red_zones(assembly.read_text()))
            _produce(target, ["g++", "-c", str(assembly)])
            assembly.unlink()
        elif not target.exists():
            _produce(target, ["g++", *flags, "-c", str(source)])
    return target


def _with_red_zones(assembly: str) -> str:
    """Leaves 256 bytes free behind every function-local static variable, which `__shared__` ones are."""
    red_zone = r"\n\t.local\t\2.redzone\n\t.comm\t\2.redzone,256,1"
    assembly = re.sub(r"(?m)^(\t\.comm\t(_ZZ[^,\n]+),\d+,\d+)$", r"\1" + red_zone, assembly)
    return re.sub(r"(?m)^(\t\.size\t(_ZZ\w+), (\d+)\n\2:\n\t\.zero\t\3)$", r"\1\n\t.zero\t256", assembly)


def _link(objects: Sequence[Path], stem: str, flags: Sequence[str] = ()) -> Path:
    target = cache_folder() / f"{stem}-{_digest(*(path.name for path in objects), *flags)}.so"
    if not target.exists():
        # The runtime comes first: its uninstrumented copies of inline functions are the ones that stay.
        _produce(
            target,
            ["g++", "-shared", "-Wl,-Bsymbolic", *flags, *map(str, objects), "-ldl", "-lpthread"],
        )
    return target


def _produce(target: Path, command: Sequence[str]) -> None:
    """Runs the command with a temporary output, so that two processes can fill the cache at once."""
    temporary = target.with_suffix(f".{os.getpid()}{target.suffix}")
    run([*command, "-o", str(temporary)])
    temporary.replace(target)


def run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompilationError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout
