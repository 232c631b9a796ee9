"""bench/machine_code.py: what it reads from cubins is right, and no kernel spills or has a stack."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gkt_fast.instruments import machine_code, sass

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "machine_code.csv"
ARCHITECTURES = sorted(sass.ARCHITECTURES)

KERNELS = r"""
#include <cuda_bf16.h>

__global__ void __launch_bounds__(128) copy_kernel(const float4* x, float4* y) {
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void __launch_bounds__(64, 2) shared_kernel(const double* x, __nv_bfloat16* y) {
  __shared__ double tile[65];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = __float2bfloat16(static_cast<float>(tile[threadIdx.x + 1]));
}

template <int N>
__global__ void sum_kernel(const unsigned char* x, float* y, int rows) {
  float sum = 0;
  for (int row = threadIdx.x; row < rows; row += 32) {
    int i = 0;
#pragma unroll 1
    do sum += x[row * rows + i] * N;
    while (++i < rows);
    y[row] = sum;
  }
}
template __global__ void sum_kernel<3>(const unsigned char*, float*, int);

__global__ void __launch_bounds__(1024) spilling_kernel(const float* x, float* y) {
  float values[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) y[i * 1024 + threadIdx.x] = values[199 - i] * values[i];
}
"""


def require(backend: str, *tools: str) -> None:
    missing = [tool for tool in tools if sass.find_tool(tool) is None]
    if missing:
        unavailable(backend, f"{', '.join(missing)} not found")


def unavailable(backend: str, reason: str) -> None:
    """Skips, or fails where GKT_REQUIRE names the backend."""
    required = backend in os.environ.get("GKT_REQUIRE", "").split(",")
    (pytest.fail if required else pytest.skip)(f"{backend}: {reason}")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def rows(request, tmp_path_factory):
    require("nvcc", "nvcc", "cuobjdump", "nvdisasm")
    source = tmp_path_factory.mktemp("kernels") / "sample.cu"
    source.write_text(KERNELS)
    return {row["kernel"]: row for row in machine_code.cuda_rows([source], [request.param])}


def test_names_are_readable(rows):
    assert set(rows) == {"copy_kernel", "shared_kernel", "sum_kernel<3>", "spilling_kernel"}
    assert {row["op"] for row in rows.values()} == {"sample"}


def test_access_widths(rows):
    copy = rows["copy_kernel"]
    assert [copy[f"loads_{width}"] for width in machine_code.WIDTHS] == [0, 1, 0, 0, 0, 0]
    assert [copy[f"stores_{width}"] for width in machine_code.WIDTHS] == [0, 1, 0, 0, 0, 0]
    assert rows["shared_kernel"]["loads_8"] == 1
    assert rows["shared_kernel"]["stores_2"] == 1


def test_threads_and_shared_memory(rows):
    assert (rows["copy_kernel"]["threads"], rows["copy_kernel"]["threads_known"]) == (128, True)
    assert not rows["sum_kernel<3>"]["threads_known"]
    assert rows["shared_kernel"]["static_shared"] == 65 * 8
    assert rows["copy_kernel"]["static_shared"] == 0


def test_inner_loop(rows):
    row = rows["sum_kernel<3>"]
    assert row["loops"] >= 1
    assert row["loop_loads_1"] == 1
    assert row["loop_stores_4"] == 0, "the store is in the outer loop"
    assert 4 <= row["loop_instructions"] <= 30
    assert row["loop_bytes"] == 1
    assert rows["copy_kernel"]["loops"] == 0
    assert rows["copy_kernel"]["loop_instructions"] == rows["copy_kernel"]["instructions"]


def test_bytes_in_flight(rows):
    """Threads times blocks times what a thread has loaded before it uses any of it."""
    copy, total = rows["copy_kernel"], rows["sum_kernel<3>"]
    assert copy["bytes_in_flight"] == 16 * 128 * copy["blocks_per_sm"]
    assert total["bytes_in_flight"] == 1 * total["threads"] * total["blocks_per_sm"]


def test_a_load_is_over_when_its_value_is_used():
    def instruction(address: int, opcode: str, operands: str) -> sass.Instruction:
        return sass.Instruction(address, opcode, None, operands)

    code = sass.Code()
    code.instructions = (
        instruction(0, "LDG.E.128.CONSTANT", "R4, [R2.64]"),
        instruction(16, "LDG.E.64", "R8, [R2.64+0x10]"),
        instruction(32, "FADD", "R20, R7, R7"),  # of the first
        instruction(48, "LDG.E.64", "R10, [R2.64+0x20]"),
        instruction(64, "LDG.E.64", "R12, [R10.64]"),  # its address is the one before: waits for both
        instruction(80, "STG.E", "[R2.64], R12"),
    )
    assert code.most_bytes_in_flight() == 24


def test_spills(rows):
    row = rows["spilling_kernel"]
    assert row["spill_loads"] > 0
    assert row["spill_stores"] > 0
    assert row["stack"] > 0
    assert row["registers"] <= 64
    for name in set(rows) - {"spilling_kernel"}:
        assert rows[name]["spill_loads"] == rows[name]["spill_stores"] == rows[name]["stack"] == 0


def test_occupancy_is_that_of_the_toolkit(tmp_path):
    header = _occupancy_header()
    if header is None or shutil.which("g++") is None:
        unavailable("nvcc", "no cuda_occupancy.h or no g++")
    cases = [
        (architecture, threads, registers, shared)
        for architecture in ARCHITECTURES
        for threads in (32, 64, 96, 128, 256, 512, 768, 1024)
        for registers in (16, 24, 32, 37, 40, 56, 64, 72, 96, 128, 168, 255)
        for shared in (0, 1, 1000, 8192, 40_000, 100_000, 163 * 1024, 164 * 1024, 227 * 1024)
    ]
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run(["g++", f"-I{header.parent}", str(source), "-o", str(program)], check=True)
    devices = {number: sass.ARCHITECTURES[number] for number in ARCHITECTURES}
    lines = [
        f"{number // 10} {number % 10} {devices[number].shared_bytes} {devices[number].shared_bytes_per_block} "
        f"{threads} {registers} {shared}"
        for number, threads, registers, shared in cases
    ]
    result = subprocess.run(
        [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = [int(line) for line in result.stdout.split()]
    assert [sass.occupancy(*case).blocks for case in cases] == expected
    assert len(set(expected)) > 10


OCCUPANCY = r"""
#include <cstdio>
#include "cuda_occupancy.h"

int main() {
  int major, minor, threads, registers;
  size_t per_multiprocessor, per_block, shared;
  while (scanf("%d %d %zu %zu %d %d %zu", &major, &minor, &per_multiprocessor, &per_block, &threads, &registers,
               &shared) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = per_multiprocessor;
    device.numSms = 100;
    device.sharedMemPerBlockOptin = per_block;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = 0;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = shared;
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, shared) != 0) return 1;
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def _occupancy_header() -> Path | None:
    nvcc = sass.find_tool("nvcc")
    folders = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
        *(Path(nvcc).parents[1:2] if nvcc else ()),
    ]
    headers = [folder / "include" / "cuda_occupancy.h" for folder in folders]
    return next((header for header in headers if header.exists()), None)


def sample_row(aligned: bool, architecture: int) -> dict:
    """Runs in a process that compiles, see `machine_code.compiler_processes`."""
    from cuda_host.triton_sample import sample_configuration

    return machine_code.triton_row("sample", sample_configuration(aligned=aligned), architecture)


def test_triton_kernels_are_read():
    require("triton", "cuobjdump", "nvdisasm")
    pytest.importorskip("triton")
    with machine_code.compiler_processes(1) as pool:
        aligned_rows, unaligned_rows = (
            list(pool.map(sample_row, [a] * 3, ARCHITECTURES)) for a in (True, False)
        )
    assert len(aligned_rows) == len(unaligned_rows) == len(ARCHITECTURES) == 3
    for aligned, unaligned in zip(aligned_rows, unaligned_rows, strict=True):
        assert aligned["loop_loads_16"] > 0
        assert aligned["loop_loads_2"] == 0
        assert aligned["threads"] == 128
        assert aligned["static_shared"] + aligned["dynamic_shared"] > 0
        assert unaligned["loop_loads_16"] == 0
        assert unaligned["loop_loads_2"] > 0


MOST_REGISTERS = "|".join(
    (
        r"(fp32|bf16)_\w+_loops_probabilities",
        r"affine_\w+_(fp32|bf16|fp64)_\w+_relu_residual",
        r"sums_backward_(fp32|bf16|fp64)_\w+_relu",
        r"merge_\w+",
    )
)


def with_most_registers(jobs: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    return sorted(job for job in jobs if re.fullmatch(MOST_REGISTERS, job[1]))


def some(jobs: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """The configurations with most registers, each on one architecture in turn; all of them where GKT_AOT=all."""
    if os.environ.get("GKT_AOT") == "all":
        return jobs
    names = sorted({(op, name) for op, name, _ in with_most_registers(jobs)})
    return [(op, name, ARCHITECTURES[i % len(ARCHITECTURES)]) for i, (op, name) in enumerate(names)]


@pytest.fixture(scope="module", params=["cuda", "triton"])
def kernel_rows(request):
    """The rows of all CUDA kernels for every architecture, and of `some` Triton configurations."""
    if request.param == "cuda":
        require("nvcc", "nvcc", "cuobjdump", "nvdisasm")
        return machine_code.cuda_rows(
            sorted((ROOT / "kernels" / "cuda").glob("*.cu")), ARCHITECTURES, [ROOT / "csrc"]
        )
    require("triton", "cuobjdump", "nvdisasm")
    pytest.importorskip("triton")
    return machine_code.triton_rows(ARCHITECTURES, choose=some)


def identify(rows: list[dict]) -> list[tuple]:
    return [(row["op"], row["kernel"], row["arch"]) for row in rows]


def spilling(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["spill_loads"] or row["spill_stores"] or row["stack"]]


def narrow(rows: list[dict]) -> list[dict]:
    """Triton kernels for 16-byte accesses whose inner loop makes others, except of the mask's bytes."""
    return [
        row
        for row in rows
        if "vectors" in row["kernel"]
        and (
            row["loop_loads_16"] == 0
            or any(row[f"loop_{kind}_{width}"] for kind in ("loads", "stores") for width in (2, 4, 8))
        )
    ]


def test_no_kernel_spills(kernel_rows):
    assert not identify(spilling(kernel_rows))


def test_every_kernel_says_its_block_size(kernel_rows):
    assert not identify([row for row in kernel_rows if not row["threads_known"]])


def test_every_kernel_can_be_launched(kernel_rows):
    assert not identify([row for row in kernel_rows if row["blocks_per_sm"] == 0])


def test_every_op_loads_16_bytes_at_once(kernel_rows):
    everywhere = {(row["op"], row["arch"]) for row in kernel_rows}
    # Not of the loop alone: the one that moves most in the loss's CUDA kernels adds up what blocks left behind.
    assert everywhere == {(row["op"], row["arch"]) for row in kernel_rows if row["loads_16"]}
    assert not identify(narrow(kernel_rows))


# Bytes per multiprocessor, of kernels that only move memory. An A100's has three quarters of an H100's bandwidth.
LEAST_IN_FLIGHT = {80: 32 * 1024, 90: 40 * 1024, 100: 40 * 1024}


def test_the_norms_passes_keep_enough_bytes_in_flight(kernel_rows):
    """Two 16-byte loads per iteration and more, and enough of them before the first is used. Not in float64."""
    passes = [
        row
        for row in kernel_rows
        if row["kind"] == "cuda" and row["op"] == "ghost_batch_norm" and row["loop_loads_16"]
    ]
    if not passes:  # Triton's are judged by widths alone
        return
    assert len(passes) == len(ARCHITECTURES) * 4 * 4, "four passes, four dtypes, on every architecture"
    assert not identify([row for row in passes if row["loop_loads_16"] < 2])
    few = [
        row
        for row in passes
        if row["bytes_in_flight"] < LEAST_IN_FLIGHT[int(row["arch"].removeprefix("sm_"))]
        and "double" not in row["kernel"]
    ]
    assert not identify(few)


def test_the_committed_table_is_of_these_kernels():
    """It has every CUDA kernel and the Triton configurations with most registers on every architecture."""
    require("triton")
    pytest.importorskip("triton")
    with RESULTS.open() as file:
        rows = [
            {name: int(value) if value.isdigit() else value for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
    with machine_code.compiler_processes(1) as pool:
        jobs = pool.submit(machine_code.triton_jobs, ARCHITECTURES).result()
    measured = {
        (row["op"], row["kernel"], int(row["arch"].removeprefix("sm_")))
        for row in rows
        if row["kind"] == "triton"
    }
    assert measured <= set(jobs)
    assert measured >= set(with_most_registers(jobs))
    cuda = {
        architecture: {
            row["kernel"] for row in rows if row["arch"] == f"sm_{architecture}" and row["kind"] == "cuda"
        }
        for architecture in ARCHITECTURES
    }
    assert all(kernels == cuda[90] and kernels for kernels in cuda.values())
    assert not identify(spilling(rows))
    assert not identify(narrow(rows))
