"""Compiles CUDA and Triton kernels without a GPU, and describes the machine code of each by a row of figures.

Triton kernels are found by convention: `aot_configurations()` of `gkt_fast.kernels.triton.*` (see there).
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .sass import Code, Kernel, find_tool, occupancy, read_cubin

WIDTHS = (32, 16, 8, 4, 2, 1)
NVCC_FLAGS = ("-std=c++17", "-O3", "-cubin")
UNKNOWN_THREADS = 256  # of a CUDA kernel without __launch_bounds__


def cuda_rows(
    sources: Sequence[Path], architectures: Sequence[int], include: Sequence[Path] = ()
) -> list[dict[str, object]]:
    """A row per kernel of these .cu files and architecture.

    Args:
        sources: CUDA C++.
        architectures: compute capabilities times ten.
        include: folders of headers.

    Raises:
        RuntimeError: nvcc is missing, or its message.
    """
    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor() as pool:
        return [row for rows in pool.map(lambda job: _rows_of_source(*job, include), jobs) for row in rows]


def _rows_of_source(source: Path, architecture: int, include: Sequence[Path]) -> list[dict[str, object]]:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found: CUDA kernels can't be compiled")
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        folders = [f"-I{folder}" for folder in include]
        command = [nvcc, *NVCC_FLAGS, *folders, f"-arch=sm_{architecture}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        kernels = read_cubin(cubin, architecture)
    names = readable_names([kernel.name for kernel in kernels])
    return [
        {
            "kind": "cuda",
            "op": source.stem,
            "kernel": name,
            **_columns(kernel, architecture, kernel.threads, 0),
        }
        for name, kernel in zip(names, kernels, strict=True)
    ]


def readable_names(mangled: Sequence[str]) -> list[str]:
    """Demangled kernel names with template arguments, without namespaces and parameters."""
    program = shutil.which("c++filt") or find_tool("cu++filt")
    if program is None or not mangled:
        return list(mangled)
    result = subprocess.run([program], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [shorten(name) for name in result.stdout.splitlines()]


def shorten(name: str) -> str:
    """A demangled kernel name without its return type, namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\b_GLOBAL__N__\w+::|\bgkt::|^void ", "", name)
    name = re.sub(r"\((?:int|unsigned int|long)\)(\d+)", r"\1", name)
    name = name.replace("(bool)1", "true").replace("(bool)0", "false")
    depth = 0
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:position]
    return name


def triton_configurations(ops: Sequence[str] | None = None) -> Iterator[tuple[str, tuple]]:
    """(op, configuration) of every Triton kernel that a launcher can launch."""
    package = importlib.import_module("gkt_fast.kernels.triton")
    for info in pkgutil.iter_modules(package.__path__):
        if ops is None or info.name in ops:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for configuration in getattr(module, "aot_configurations", tuple)():
                yield info.name, configuration


def compile_triton(configuration: tuple, architecture: int) -> object:
    """Compiles one configuration of `aot_configurations()`; the result has `asm` and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, function, signature, constexprs, options = configuration
    options = dict(options)
    divisible = options.pop("divisible_by_16", ())
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(function, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def triton_jobs(architectures: Sequence[int], ops: Sequence[str] | None = None) -> list[tuple[str, str, int]]:
    """(op, name, architecture) of every configuration. Not where Triton's interpreter is on."""
    return [
        (op, configuration[0], architecture)
        for op, configuration in triton_configurations(ops)
        for architecture in architectures
    ]


def triton_rows(
    architectures: Sequence[int],
    ops: Sequence[str] | None = None,
    choose: Callable[[list[tuple[str, str, int]]], list[tuple[str, str, int]]] | None = None,
) -> list[dict[str, object]]:
    """A row per Triton configuration and architecture, compiled by one process per core.

    Args:
        architectures: compute capabilities times ten.
        ops: only these ops.
        choose: picks some of the jobs (op, name, architecture); default: all.
    """
    with compiler_processes(os.cpu_count() or 1) as pool:
        jobs = pool.submit(triton_jobs, architectures, ops).result()
        rows = list(pool.map(_run_triton_job, jobs if choose is None else choose(jobs), chunksize=4))
    return sorted(rows, key=lambda row: (row["op"], row["kernel"], row["arch"]))


@contextmanager
def compiler_processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile Triton kernels, also where this one has Triton's interpreter on.

    Processes of their own: compilation holds the GIL, and torch's threads don't survive a fork. They start without the
    interpreter, since Triton may be imported before any code of ours runs in them.
    """
    interpreter = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        if interpreter is not None:
            os.environ["TRITON_INTERPRET"] = interpreter


@functools.cache
def _configurations_by_name() -> dict[tuple[str, str], tuple]:
    return {(op, configuration[0]): configuration for op, configuration in triton_configurations()}


def _run_triton_job(job: tuple[str, str, int]) -> dict[str, object]:
    op, name, architecture = job
    return triton_row(op, _configurations_by_name()[op, name], architecture)


def triton_row(op: str, configuration: tuple, architecture: int) -> dict[str, object]:
    """The row of one configuration of `aot_configurations()`.

    Raises:
        RuntimeError: Triton can't compile it.
    """
    try:
        compiled = compile_triton(configuration, architecture)
    except Exception as error:  # Triton's errors have no common class
        raise RuntimeError(f"{op}, {configuration[0]}, sm_{architecture}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = read_cubin(cubin, architecture)
    threads = 32 * compiled.metadata.num_warps
    columns = _columns(kernel, architecture, threads, compiled.metadata.shared - kernel.shared_bytes)
    return {"kind": "triton", "op": op, "kernel": configuration[0], **columns}


def _columns(
    kernel: Kernel, architecture: int, threads: int | None, dynamic_shared: int
) -> dict[str, object]:
    block = threads or UNKNOWN_THREADS
    resident = occupancy(architecture, block, kernel.registers, kernel.shared_bytes + dynamic_shared)
    loop = kernel.main_loop
    part: Code = loop or kernel
    return {
        "arch": f"sm_{architecture}",
        "registers": kernel.registers,
        "stack": kernel.stack_bytes,
        "spill_loads": kernel.count("LDL"),
        "spill_stores": kernel.count("STL"),
        "static_shared": kernel.shared_bytes,
        "dynamic_shared": dynamic_shared,
        "threads": block,
        "threads_known": threads is not None,
        "blocks_per_sm": resident.blocks,
        "occupancy": resident.share,
        "limit": resident.limit,
        "instructions": len(kernel.instructions),
        **_width_columns("loads", kernel.widths("LDG")),
        **_width_columns("stores", kernel.widths("STG")),
        "loops": len(kernel.loops),
        "loop_instructions": len(part.instructions),
        **_width_columns("loop_loads", part.widths("LDG")),
        **_width_columns("loop_stores", part.widths("STG")),
        "loop_bytes": part.bytes_moved("LDG", "STG"),
        "bytes_in_flight": part.most_bytes_in_flight() * block * resident.blocks,
        "loop_float": part.count(
            "FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "DADD", "DMUL", "DFMA", "DSETP"
        ),
        "loop_special": part.count("MUFU"),
        "loop_shuffles": part.count("SHFL", "REDUX"),
        "loop_barriers": part.count("BAR"),
    }


def _width_columns(name: str, widths: Counter[int]) -> dict[str, int]:
    return {f"{name}_{width}": widths[width] for width in WIDTHS}
