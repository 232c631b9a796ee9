"""CUDA sources on the CPU: right kernels give right results, and a planted bug of each kind is reported."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import threading
import types

import pytest
import torch
from cuda_host import address_sanitizer, build
from helpers.processes import environment

from gkt_fast.ops import registry, use_backend
from gkt_fast.ops.native import DTYPES

KERNELS = build.HERE / "kernels"


def unavailable(reason: str) -> None:
    """Skips, or fails where GKT_REQUIRE names the host runtime."""
    required = "cuda-host" in os.environ.get("GKT_REQUIRE", "").split(",")
    (pytest.fail if required else pytest.skip)(f"cuda-host: {reason}")


@pytest.fixture(scope="module", autouse=True)
def tools():
    reason = build.missing_tools()
    if reason:
        unavailable(reason)


@pytest.fixture(scope="module", params=[(), ("CUDA_HOST_UCONTEXT",)], ids=["native-fibers", "ucontext"])
def reductions(request):
    return build.load_library(KERNELS / "reductions.cu", define=request.param)


@pytest.fixture(scope="module")
def planted():
    return build.load_library(KERNELS / "planted.cu")


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def call(library: ctypes.CDLL, name: str, *arguments) -> None:
    if getattr(library, name)(*arguments) != 0:
        raise RuntimeError(library.cuda_host_last_error().decode())


@pytest.mark.parametrize("width", [8, 32])
def test_warp_reduce(reductions, width):
    x = torch.randn(640)
    sums = unwritten(640, dtype=torch.float32)
    call(reductions, "warp_sum", address(x), 640, width, address(sums))
    expected = x.double().view(-1, width).sum(1, keepdim=True).expand(-1, width)
    torch.testing.assert_close(sums.view(-1, width).double(), expected, rtol=1e-6, atol=1e-5)
    assert (sums.view(-1, width) == sums.view(-1, width)[:, :1]).all(), "every lane has the same bits"


@pytest.mark.parametrize("threads", [32, 96, 1024])
@pytest.mark.parametrize("columns", [1, 31, 1003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_reduce(reductions, dtype, columns, threads):
    x = (3 * torch.randn(3, columns, dtype=torch.float64) + 1).to(dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    statistics = unwritten(3, 6, dtype=computed)
    call(
        reductions, "block_statistics", address(x), DTYPES[dtype], 3, ctypes.c_int64(columns), threads,
        address(statistics),
    )  # fmt: skip
    exact = x.double()
    maximum = exact.amax(1)
    expected = torch.stack(
        [
            exact.sum(1),
            maximum,
            maximum,
            (exact - maximum[:, None]).exp().sum(1),
            exact.mean(1),
            exact.var(1, unbiased=False),
        ],
        dim=1,
    )
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(statistics.double(), expected, rtol=tolerance, atol=tolerance * columns**0.5)


def test_block_reduce_of_infinities_and_nan(reductions):
    x = torch.randn(3, 70)
    x[0, ::2] = -torch.inf
    x[1] = -torch.inf
    x[2, 40] = torch.nan
    statistics = unwritten(3, 6, dtype=torch.float32)
    call(reductions, "block_statistics", address(x), 0, 3, ctypes.c_int64(70), 64, address(statistics))
    _, maximum, pair_maximum, pair_sum, _, _ = statistics.unbind(1)
    finite = x[0, 1::2].double()
    assert maximum[0] == pair_maximum[0] == finite.max()
    torch.testing.assert_close(pair_sum[0].double(), (finite - finite.max()).exp().sum(), rtol=1e-6, atol=0)
    assert maximum[1] == pair_maximum[1] == -torch.inf
    assert maximum[2].isnan()
    assert pair_maximum[2].isnan()
    assert pair_sum[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_access(reductions, dtype):
    count = 16 // dtype.itemsize * 150
    x = torch.randn(count, dtype=torch.float64).to(dtype)
    y = unwritten(count, dtype=dtype)
    call(reductions, "double_elements", address(x), DTYPES[dtype], ctypes.c_int64(count), address(y))
    assert torch.equal(y, 2 * x)
    with pytest.raises(RuntimeError, match="not vectorizable"):
        odd = count - 1
        call(reductions, "double_elements", address(x), DTYPES[dtype], ctypes.c_int64(odd), address(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_to_nearest_even(reductions, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[~every.isnan()]
    finite = every[every.isfinite()].sort().values
    ties = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    up, down = torch.full_like(ties, torch.inf), torch.full_like(ties, -torch.inf)
    extremes = torch.tensor(
        [1e38, 3.4028235e38, 65519.0, 65520.0, 1e-45, -1e-45, 2.0**-25, 3 * 2.0**-26, torch.nan]
    )
    x = torch.cat([every, ties, ties.nextafter(up), ties.nextafter(down), extremes])
    y, back = unwritten(len(x), dtype=dtype), unwritten(len(x), dtype=torch.float32)
    call(reductions, "convert", address(x), DTYPES[dtype], ctypes.c_int64(len(x)), address(y), address(back))
    expected = x.to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(y[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert y[~numbers].isnan().all()
    assert torch.equal(back[numbers], expected[numbers].float())


def test_an_attribute_that_is_refused_is_not_the_next_launchs_error(reductions):
    """CUDA keeps the error of a call until somebody asks for it."""
    y = unwritten(64, dtype=torch.float32)
    arguments = address(y), 64, ctypes.c_int64(64 * 1024)
    with (
        build.refusing_attributes(reductions, 1),
        pytest.raises(RuntimeError, match=r"^dynamic shared memory: invalid argument$"),
    ):
        call(reductions, "count_in_shared", *arguments)
    call(reductions, "count_in_shared", *arguments)
    assert torch.equal(y, torch.arange(64.0))


# Each bug of kernels/planted.cu: what it is called, and what its message must say.
PLANTED = {
    "shift": r"out of bounds in kernel .*shift_kernel, block \(1, 0, 0\), thread \(63, 0, 0\): read of 4 "
    r"bytes .* \(planted.cu:\d+\): byte 512 of a buffer of 512 bytes",
    "barrier": r"divergent barrier in kernel .*barrier_kernel, block \(0, 0, 0\): .* not reached by thread "
    r"\(40, 0, 0\), which has exited",
    "two_barriers": r"divergent barrier .* \(32, 0, 0\), which waits in __syncthreads at planted.cu:\d+",
    "exited": r"divergent barrier .* \(63, 0, 0\), which has exited",
    "shuffle": r"inactive lane .*__shfl_down_sync at planted.cu:\d+ by thread \(0, 0, 0\) with mask "
    "0xffffffff: lane 24 of the mask does not take part: it has exited",
    "shuffle_source": r"inactive lane .* with mask 0x0000ffff reads lane 31, which is not in the mask",
    "vote": r"inactive lane .*thread \(31, 0, 0\).*__ballot_sync .* the calling lane is not in the mask",
    "partial_warp": r"inactive lane .* lane 8, but the warp has only 8 threads",
    "uninitialised": r"uninitialised shared memory .* thread \(58, 0, 0\), read of 4 bytes",
    "uninitialised_dynamic": r"uninitialised shared memory .* thread \(58, 0, 0\), read of 4 bytes",
    "dynamic_bounds": r"out of bounds .*thread \(63, 0, 0\).*offset 256 of dynamic shared memory, which has "
    "256 bytes",
    "static_bounds": r"out of bounds .*thread \(63, 0, 0\): index 64 of 'float \[64\]' at planted.cu:\d+",
    "static_pointer": r"out of bounds .*thread \(32, 0, 0\).*: byte 128 of first of 128 bytes",
    "external": r"out of bounds .*thread \(32, 0, 0\).*: byte 128 of first of 128 bytes",
    "shared_race": r"race .* in shared memory '(tile|bytes)', which thread \(31, 0, 0\) wrote \(planted.cu:\d+\)",
    "warp_race": r"race .* in shared memory '(tile|bytes)', which thread \(0, 0, 0\) read",
    "write_race": r"race .* write of 4 bytes .* in shared memory '(tile|bytes)', which thread \(0, 0, 0\) wrote",
    "byte_race": r"race .* write of 1 bytes .* in shared memory '(tile|bytes)', which thread \(0, 0, 0\) read",
    "block_race": r"race .*block \(1, 0, 0\), thread \(0, 0, 0\): .* in global memory, which thread "
    r"\(32, 0, 0\) of block \(0, 0, 0\) wrote",
    "last_block": r"race .*block \(1, 0, 0\), thread \(0, 0, 0\): read .* in global memory, which thread "
    r"\(0, 0, 0\) of block \(0, 0, 0\) wrote",
    "misaligned": r"misaligned access .* no multiple of 16 .*common.cuh:\d+",
    "overflow": r"arithmetic .* a product overflows 'int' at planted.cu:\d+",
    "float_atomic": r"order-dependent sum .* floating-point",
    "null_pointer": r"out of bounds .* write of 4 bytes at 0 ",
    "host_pointer": r"out of bounds .* a local variable of host code",
    "endless": r"endless loop .* \(planted.cu:\d+\)",
    "tickets": r"out of bounds .* of a buffer of 512 bytes",
    "block_too_large": r"invalid launch of kernel .*barrier_kernel: block of \(2048, 1, 1\)",
}


def test_every_planted_bug_is_listed():
    source = (KERNELS / "planted.cu").read_text()
    assert set(re.findall(r"^PLANTED\((\w+),", source, re.MULTILINE)) == set(PLANTED)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_reported_and_its_twin_passes(planted, name):
    for correct in (True, False, True):
        x, y = torch.zeros(128), torch.zeros(128)
        with build.only_buffers(planted, x, y):
            if correct:
                call(planted, name, address(x), address(y), True)
            else:
                with pytest.raises(RuntimeError, match="^cuda-host: " + PLANTED[name]):
                    call(planted, name, address(x), address(y), False)


@pytest.mark.parametrize("removed", [0, 1])
def test_every_barrier_of_block_reduce_is_needed(tmp_path, removed):
    header = (build.ROOT / "kernels" / "cuda" / "common.cuh").read_text()
    pieces = header.split("  __syncthreads();\n")
    assert len(pieces) == 3
    pieces[removed : removed + 2] = ["".join(pieces[removed : removed + 2])]
    (tmp_path / "common.cuh").write_text("  __syncthreads();\n".join(pieces))
    source = tmp_path / "reductions.cu"
    source.write_text((KERNELS / "reductions.cu").read_text())
    library = build.load_library(source)
    x, statistics = torch.randn(1, 500), torch.empty(1, 6)
    with pytest.raises(RuntimeError, match=r"race in kernel .* in shared memory 'sums', which"):
        call(library, "block_statistics", address(x), 0, 1, ctypes.c_int64(500), 96, address(statistics))


@pytest.mark.parametrize("columns", [31, 1003])
def test_order_of_blocks_and_threads_changes_no_bit(reductions, columns):
    x = torch.randn(5, columns)
    results = []
    for reverse in (False, True):
        statistics = unwritten(5, 6, dtype=torch.float32)
        with build.last_first(reductions) if reverse else contextlib.nullcontext():
            call(
                reductions, "block_statistics", address(x), 0, 5, ctypes.c_int64(columns), 96, address(statistics)
            )  # fmt: skip
        results.append(statistics)
    assert torch.equal(*results)


def test_order_dependence_shows(planted):
    results = []
    for reverse in (False, True):
        x, y = torch.zeros(128), torch.zeros(128)
        with build.last_first(planted) if reverse else contextlib.nullcontext():
            call(planted, "tickets", address(x), address(y), True)
        results.append(y)
    assert torch.equal(results[0], torch.arange(128.0))
    assert torch.equal(results[1], torch.arange(128.0).flip(0))


def test_unmapped_memory_is_reported_without_buffers(planted):
    x, y = torch.zeros(128), torch.zeros(128)
    with pytest.raises(RuntimeError, match=r"out of bounds .* no memory is there"):
        call(planted, "null_pointer", address(x), address(y), False)


def test_launches_from_several_threads(reductions):
    x = torch.randn(8, 640)
    sums = unwritten(8, 640, dtype=torch.float32)
    errors = []

    def work(row: int) -> None:
        try:
            for _ in range(20):
                call(reductions, "warp_sum", address(x[row]), 640, 32, address(sums[row]))
        except RuntimeError as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    expected = x.view(8, 20, 32).sum(2, keepdim=True).expand(-1, -1, 32)
    torch.testing.assert_close(sums.view(8, 20, 32), expected, rtol=1e-5, atol=1e-5)


def test_out_of_bounds_under_address_sanitizer():
    try:
        sanitizer = address_sanitizer.environment()
    except build.CompilationError as error:
        unavailable(f"no AddressSanitizer: {error}")
    code = f"""
import ctypes
from cuda_host import address_sanitizer, build
library = build.load_library({str(KERNELS / "planted.cu")!r})
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
x, y = (ctypes.c_void_p(libc.malloc(ctypes.c_size_t(512))) for _ in range(2))
for correct in (True, False):
    print(library.shift(x, y, correct), library.cuda_host_last_error().decode())
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**sanitizer),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    right, wrong = result.stdout.splitlines()
    assert right == "0 "
    assert re.match(
        r"2 cuda-host: out of bounds in kernel .*shift_kernel, block \(1, 0, 0\), thread \(63, 0, 0\): "
        r"read of 4 bytes .* no live allocation \(AddressSanitizer\)",
        wrong,
    )


def test_compilation_error_has_the_compilers_message(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("int f() { return undeclared_name; }\n")
    with pytest.raises(build.CompilationError, match="undeclared_name"):
        build.load_library(source)


def test_bindings_load_beside_the_native_ones():
    native = pytest.importorskip("gkt_fast._native")
    module = build.native_module()
    assert module is not native
    assert module.abi_version == native.abi_version
    assert {name for name in dir(native) if name.endswith("_cpu")} <= set(dir(module))
    assert module.build_info()["cuda"] == "host"


@pytest.fixture
def private_registry():
    with registry.isolated():
        yield


def test_register_adds_the_backend(private_registry):
    registry.register(
        registry.Implementation(
            "doubled", "cuda", ("cuda",), (torch.float32,), lambda: pytest.fail("not asked")
        )
    )
    build.register("doubled", lambda module: types.SimpleNamespace(native=module))
    with use_backend("cuda-host"):
        assert registry.select("doubled", "cpu", torch.float32).native is build.native_module()


def test_traffic_is_counted(reductions):
    x, y = torch.randn(3000), torch.empty(3000)
    with build.count_traffic(reductions) as rows:
        call(reductions, "double_elements", address(x), 0, ctypes.c_int64(3000), address(y))
    (kernel,) = {row.kernel for row in rows}
    assert "double_kernel<float>" in kernel
    assert {(row.kind, row.accesses, row.bytes, row.distinct_bytes) for row in rows if row.line == ""} == {
        ("read", 750, 12000, 12000),
        ("write", 750, 12000, 12000),
    }
    (read,) = (row for row in rows if row.line and row.kind == "read")
    assert re.fullmatch(r"common.cuh:\d+ from reductions.cu:\d+", read.line)
    assert 12000 <= read.sector_bytes <= 12000 + 32 * 25, "whole sectors, but for the ends of each warp"


def test_traffic_shows_uncoalesced_reads(reductions):
    columns = 64
    x, statistics = torch.randn(2, columns), torch.empty(2, 6)
    with build.count_traffic(reductions) as rows:
        call(
            reductions, "block_statistics", address(x), 0, 2, ctypes.c_int64(columns), 32, address(statistics)
        )
    reads = [row for row in rows if row.line == "" and row.kind == "read"]
    writes = [row for row in rows if row.line == "" and row.kind == "write"]
    assert reads[0].bytes == reads[0].distinct_bytes == 2 * columns * 4
    assert writes[0].bytes == 2 * 6 * 4
    assert writes[0].sector_bytes >= 2 * 6 * 32, "one thread writes six numbers one by one"
