"""Merging the sums of ghost_batch_norm's chunks is short: loop trips of a thread, from geometry and counted.

Trips of the CUDA kernels are those of gkt_fast/instruments/merges.py. Its number of chunks is held against what the
native module allocates for every norm of ResNet-50, and its trips against what the host runtime counts on problems that
are small enough to run. Triton's kernels load a tile of the same chunks, lanes and channels in each trip.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_host import build
from helpers.backends import unavailable
from torch import nn

from gkt_fast import ghost_batch_norm, use_backend
from gkt_fast.instruments import merges
from gkt_fast.ops.ghost_batch_norm.native import CudaBackend
from gkt_fast.ops.ghost_batch_norm.problem import describe

MOST_TRIPS = 64
BATCH_SIZE, IMAGE_SIZE = 256, 224
GHOSTS = (1, 2, 3, 4, 7, 13)  # a stacked step has as many as streams share a batch


@pytest.fixture(scope="module")
def native():
    if reason := build.missing_tools():
        unavailable("cuda-host", reason)
    build.register("ghost_batch_norm", CudaBackend)
    return build.native_module()


@pytest.fixture(scope="module")
def resnet50_norms() -> set[tuple[int, ...]]:
    """(channels, height, width) of the input of every norm."""
    models = pytest.importorskip("torchvision.models")
    shapes = set()
    with torch.device("meta"):
        model = models.resnet50()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape[1:])))
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert len(shapes) > 10
    return shapes


def chunks_of(native, channels_last: bool, ghosts: int, shape: tuple[int, int, int, int]) -> int:
    """As many as the native module allocates sums for: 3 per chunk, and 3 coefficients."""
    rows, channels = shape[:2]
    elements = all_elements(native, channels_last, ghosts, shape, rows)
    chunks, rest = divmod(elements // (3 * ghosts * channels) - 1, 1)
    assert rest == 0 and elements % (3 * ghosts * channels) == 0
    return chunks


def all_elements(native, channels_last, ghosts, shape, lead_rows) -> int:
    rows, channels, height, width = shape
    shape = 0, channels_last, ghosts, rows, channels, height * width, lead_rows
    strides = [(0, 0, 0)] * 6
    return native.GhostBatchNorm(shape, 1e-5, True, False, 0.0, *strides).workspace_cuda()


@pytest.mark.parametrize("channels_last", [True, False])
def test_no_norm_of_resnet50_takes_many_trips(native, resnet50_norms, channels_last):
    for channels, height, width in resnet50_norms:
        for ghosts in GHOSTS:
            chunks = chunks_of(native, channels_last, ghosts, (BATCH_SIZE, channels, height, width))
            counts = merges.chunk_counts(channels_last, ghosts, BATCH_SIZE, channels, height * width)
            assert chunks == counts.lead == counts.other
            assert chunks <= math.ceil(merges.MOST_CHUNKS / ghosts)
            assert merges.statistics_trips(counts) <= MOST_TRIPS
            assert merges.gradient_trips(counts, ghosts) <= MOST_TRIPS


@pytest.mark.parametrize("rows", [2, 64, 128, 255, 512])
@pytest.mark.parametrize("channels_last", [True, False])
def test_unequal_ghost_batches_take_no_more(native, resnet50_norms, channels_last, rows):
    """The first ghost batch has the whole batch, each other one `rows` rows."""
    for channels, height, width in resnet50_norms:
        for ghosts in GHOSTS[1:]:
            shape = (rows, channels, height, width)
            counts = merges.chunk_counts(channels_last, ghosts, rows, channels, height * width, BATCH_SIZE)
            chunks = counts.lead + (ghosts - 1) * counts.other
            assert all_elements(native, channels_last, ghosts, shape, BATCH_SIZE) == (
                3 * channels * (chunks + ghosts)
            )
            assert chunks <= merges.MOST_CHUNKS + ghosts
            assert merges.statistics_trips(counts) <= MOST_TRIPS
            assert merges.gradient_trips(counts, ghosts, equal=False) <= MOST_TRIPS


# Rows that are long enough to be a chunk each, in planes.
ROW = (1, 41, 100)


@pytest.mark.parametrize(
    ("ghosts", "rows", "lead_rows"),
    [(1, 70, 70), (3, 20, 20), (20, 3, 3), (3, 20, 70), (2, 70, 20), (4, 2, 66)],
)
def test_trips_are_as_counted(native, ghosts, rows, lead_rows):
    """The reads of parts by the thread that makes most of them: 3 per chunk forward, 2 backward."""
    chunks, equal = merges.Chunks(lead_rows, rows), lead_rows == rows
    if equal:
        assert chunks_of(native, False, ghosts, (rows, *ROW)) == rows
    x = torch.randn(lead_rows + (ghosts - 1) * rows, *ROW).requires_grad_()
    with use_backend("cuda-host"), build.count_traffic(native) as rows:
        y, _, _ = ghost_batch_norm(x, None, None, ghosts=ghosts, lead_rows=lead_rows, activation="identity")
        y.backward(torch.ones_like(y))
    for kernel, loads, trips in (
        ("merge_statistics", 3, merges.chunk_trips(chunks, ghosts, backward=False, equal=equal)),
        ("merge_gradients", 2, merges.chunk_trips(chunks, ghosts, backward=True, equal=equal)),
    ):
        most = max(
            row.most_of_a_thread for row in rows if kernel in row.kernel and row.kind == "read" and row.line
        )
        assert most == loads * trips, kernel


def test_triton_merges_the_same_way():
    pytest.importorskip("triton")
    from gkt_fast.kernels.triton import ghost_batch_norm as kernels

    threads = 32 * kernels.MERGE_OPTIONS["num_warps"]
    assert kernels.MERGE_TILE["LANES"] * kernels.MERGE_TILE["BLOCK"] == threads, "one element per thread"
    for channels, size in ((64, 112), (256, 56), (2048, 7)):
        for ghosts in GHOSTS:
            for channels_last in (True, False):
                shape = (BATCH_SIZE * ghosts, channels, size, size)
                x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
                x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
                plan = kernels._Plan(describe(x, channels_last, ghosts, True, 1e-5, False), (x,))
                trips = math.ceil(plan.chunks / kernels.MERGE_TILE["LANES"])
                assert plan.chunks <= math.ceil(kernels.MOST_CHUNKS / ghosts)
                # The sum of a tile's lanes: two of them in a warp, then as many partial sums as warps.
                tree = 1 + kernels.MERGE_OPTIONS["num_warps"]
                assert trips + tree <= MOST_TRIPS
                assert ghosts * (trips + 1) + tree <= MOST_TRIPS


def test_triton_loads_a_tile_of_chunks_per_trip(monkeypatch):
    """Counted in the interpreter: what the merge kernels load of the sums, by the programs' loads."""
    pytest.importorskip("triton")
    from gkt_fast.ops.ghost_batch_norm.triton import DEVICES

    if "cpu" not in DEVICES:
        unavailable("triton", "TRITON_INTERPRET is not set")
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    loads: dict[str, int] = {}
    current = []
    launch, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load

    def noting_launch(self, *arguments, **options):
        current.append(self.fn.__name__)
        result = launch(self, *arguments, **options)
        current.pop()
        return result

    def noting_load(self, pointers, mask, *rest):
        if current and pointers.data.ndim == 2 and "merge" in current[-1]:
            loads[current[-1]] = loads.get(current[-1], 0) + 1
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", noting_launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noting_load)
    x = torch.randn(70, *ROW).requires_grad_()
    with use_backend("triton"):
        y, _, _ = ghost_batch_norm(x, None, None, ghosts=1, activation="identity")
        y.backward(torch.ones_like(y))
    from gkt_fast.kernels.triton import ghost_batch_norm as kernels

    plan = kernels._Plan(describe(x, False, 1, False, 1e-5, False), (x,))
    trips = math.ceil(plan.chunks / kernels.MERGE_TILE["LANES"])
    assert loads == {"merge_statistics_kernel": 3 * trips, "merge_gradients_kernel": 2 * trips}
