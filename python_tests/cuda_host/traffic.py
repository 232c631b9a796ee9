"""Counts the bytes that the GPU kernels move, while they run on the CPU, against the floor.

    cd python_tests && python -m cuda_host.traffic [--provider cuda triton] [--csv PATH]

CUDA kernels run in the host runtime of this folder, Triton kernels in Triton's interpreter, each on a small
problem, forward and backward. Per kernel and element of the logits or of x: the bytes that the program asks for, the
bytes of the 32-byte sectors that a warp touches when nothing stays in a cache (CUDA only), and the floor: each byte
that is touched at all, moved once. What is asked for again lies close by in time, in the first-level cache: the rows
of logits, and what a thread reads once per channel, which small problems show large. Writes bench/results/traffic.csv.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # triton.jit reads this when a kernel is defined

import numpy as np
import torch

from gkt_fast import ghost_batch_norm, group_knowledge_loss, use_backend
from gkt_fast.instruments.machine_code import shorten
from gkt_fast.instruments.tables import print_table, write_csv
from gkt_fast.ops.ghost_batch_norm.native import CudaBackend as CudaNorm
from gkt_fast.ops.group_knowledge_loss.native import CudaBackend as CudaLoss

from . import build

RESULTS = build.ROOT / "bench" / "results" / "traffic.csv"
LOGITS = {"classes together": (4, 16, 64), "positions together": (4, 2, 16, 4, 8)}
ACTIVATIONS = (4, 4, 16, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = {"cuda": "cuda-host", "triton": "triton"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--provider", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = [row for provider in options.provider for row in count(provider)]
    write_csv(options.csv, rows)
    print_table(rows, list(rows[0]))


def count(provider: str) -> list[dict[str, object]]:
    """A row per op, layout, dtype and kernel."""
    build.register("group_knowledge_loss", CudaLoss)
    build.register("ghost_batch_norm", CudaNorm)
    counter = count_cuda if provider == "cuda" else count_triton
    rows = []
    for op, layout, name, elements, step in steps():
        with use_backend(BACKENDS[provider]):
            step()  # scratch is allocated, kernels are compiled
            with counter() as kernels:
                step()
        for kernel, bytes_of in kernels.items():
            per_element = {kind: round(value / elements, 3) for kind, value in bytes_of.items()}
            rows.append(
                {"provider": provider, "op": op, "layout": layout, "dtype": name, "kernel": kernel}
                | {kind: per_element.get(kind, "") for kind in ("asked", "sectors", "floor")}
            )
    return rows


def steps() -> Iterator[tuple]:
    """(op, layout, dtype, elements, function that runs the op forward and backward)."""
    for name, dtype in DTYPES.items():
        for layout, shape in LOGITS.items():
            logits = torch.randn(shape, dtype=dtype).requires_grad_()
            targets = torch.zeros((shape[1], *shape[3:]), dtype=torch.int64)

            def loss_step(logits=logits, targets=targets):
                group_knowledge_loss(logits, targets)

            yield "group_knowledge_loss", layout, name, logits.numel(), loss_step
        for layout, memory_format in (
            ("channels_last", torch.channels_last),
            ("planes", torch.contiguous_format),
        ):
            x, residual, grad_y = (
                torch.randn(ACTIVATIONS, dtype=dtype).contiguous(memory_format=memory_format)
                for _ in range(3)
            )
            weight, bias = torch.ones(ACTIVATIONS[1]), torch.zeros(ACTIVATIONS[1])
            inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, residual)]

            def norm_step(inputs=inputs, grad_y=grad_y):
                x, weight, bias, residual = inputs
                y, _, _ = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
                torch.autograd.grad(y, inputs, grad_y)

            yield "ghost_batch_norm", layout, name, x.numel(), norm_step


@contextmanager
def count_cuda() -> Iterator[dict[str, dict[str, int]]]:
    kernels: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    with build.count_traffic(build.native_module()) as rows:
        yield kernels
    for row in rows:
        if row.line == "":
            bytes_of = kernels[shorten(row.kernel)]
            bytes_of["asked"] += row.bytes
            bytes_of["sectors"] += row.sector_bytes
            bytes_of["floor"] += row.distinct_bytes


@contextmanager
def count_triton() -> Iterator[dict[str, dict[str, int]]]:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    kernels: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    touched: list[tuple[str, np.ndarray, int]] = []
    launch = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(kind: str, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched.append((kind, pointers.data[np.broadcast_to(mask.data, pointers.data.shape)], size))

    def noting_load(self, pointers, mask, *rest):
        note("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noting_store(self, pointers, value, mask, *rest):
        note("write", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noting_launch(self, *arguments, **options):
        touched.clear()
        result = launch(self, *arguments, **options)
        direction = {True: " backward", False: " forward"}.get(options.get("BACKWARD"), "")
        bytes_of = kernels[self.fn.__name__ + direction]
        for kind in ("read", "write"):
            for size in {s for k, _, s in touched if k == kind}:
                addresses = np.concatenate([a.ravel() for k, a, s in touched if k == kind and s == size])
                bytes_of["asked"] += addresses.size * size
                bytes_of["floor"] += np.unique(addresses).size * size
        return result

    with (
        mock.patch.object(GridExecutor, "__call__", noting_launch),
        mock.patch.object(InterpreterBuilder, "create_masked_load", noting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", noting_store),
    ):
        yield kernels


if __name__ == "__main__":
    main()
