"""ghost_batch_norm + residual + ReLU against torch eager and torch.compile: forward and backward, and bytes/s.

    python bench/norm.py [--shapes 0 1 ...] [--repeats 40] [--threads 2] [--retain-memory]

Prints a table, writes bench/results/norm.csv and bench/results/norm.png. With --retain-memory glibc keeps freed
memory instead of returning it to the system, so that page faults of fresh memory don't count
(norm_retained.*). The floor is the time that a copy takes for the bytes that two passes each way must move:
forward reads x twice and the residual, writes y; backward reads x and the gradient of y twice, writes two
gradients; plus the mask.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import provider_pictures
import torch
import torch.nn.functional as F
from harness import RESULTS, environment, measure, print_table, write_csv

from gkt_fast import ghost_batch_norm, use_backend

SHAPES = ((64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8), (32, 256, 28, 28))


def eager(x, weight, bias, residual):
    return torch.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)


def fused(backend: str):
    def run(x, weight, bias, residual):
        with use_backend(backend):
            return ghost_batch_norm(x, weight, bias, ghosts=1, residual=residual)[0]

    return run


def floor_bytes(shape: tuple[int, ...], itemsize: int) -> float:
    """Bytes moved forward and backward with every pass from memory, write-allocation not counted."""
    elements = torch.Size(shape).numel()
    return elements * (10 * itemsize + 3 / 8)


def copy_bandwidth(numel: int, device: str, repeats: int) -> float:
    """Bytes per second of a copy, read and written bytes counted."""
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.numel() * source.element_size() / (1e-3 * timing.median)


def providers(shape: tuple[int, ...], device: str, dtype: torch.dtype, names: list[str]) -> dict:
    def tensor() -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=dtype)
        return values.to(memory_format=torch.channels_last).requires_grad_()

    x, residual, grad_y = tensor(), tensor(), tensor().detach()
    weight, bias = (torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2))
    inputs = (x, weight, bias, residual)

    def step(function):
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad_y)

    functions = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    return {name: step(functions.get(name) or fused(name)) for name in names}


def retain_memory() -> None:
    """Tells glibc's malloc to take large blocks from its heap and never to shrink that."""
    top_pad, trim_threshold, mmap_threshold = -2, -1, -3
    libc = ctypes.CDLL(None)
    for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, 2**31 - 1), (top_pad, 1 << 26)):
        if libc.mallopt(option, value) != 1:
            raise RuntimeError("this C library has no such option of mallopt")


def rows(
    shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype, names: list[str], repeats: int
) -> list[dict[str, object]]:
    where, table = environment(), []
    for shape in shapes:
        torch.compiler.reset()
        timings = measure(providers(shape, device, dtype, names), repeats, warmup=5)
        bandwidth = copy_bandwidth(torch.Size(shape).numel(), device, repeats)
        floor = 1e3 * floor_bytes(shape, dtype.itemsize) / bandwidth
        for name, timing in timings.items():
            table.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "provider": name,
                    "ms": timing.median,
                    "ms_lower": timing.lower,
                    "ms_upper": timing.upper,
                    "speedup_over_eager": timings["eager"].median / timing.median,
                    "speedup_over_compile": timings["compile"].median / timing.median,
                    "floor_ms": floor,
                    "times_floor": timing.median / floor,
                    "copy_gb_per_s": bandwidth / 1e9,
                    **where,
                }
            )
    return table


def plot(path: Path) -> None:
    provider_pictures.plot(
        path,
        "speedup_over_eager",
        "How fast is the fused normalisation?",
        "BatchNorm, residual and ReLU, forward and backward, times faster than eager torch; batch × channels × pixels",
        baseline="eager torch",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="indices into the list"
    )
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--csv", type=Path, help="default: results/norm.csv; the picture goes beside it")
    parser.add_argument("--retain-memory", action="store_true")
    parser.add_argument("--plot", action="store_true", help="only draw the CSV")
    arguments = parser.parse_args()
    name = "norm" + (f"_{arguments.dtype}" if arguments.dtype != "float32" else "")
    name += "_retained" if arguments.retain_memory else ""
    path = arguments.csv or RESULTS / f"{name}.csv"
    if arguments.plot:
        plot(path)
        return
    if arguments.retain_memory:
        retain_memory()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["eager", "compile", *(["cuda", "triton"] if device == "cuda" else ["cpp"])]
    shapes = [SHAPES[index] for index in arguments.shapes]
    table = rows(shapes, device, getattr(torch, arguments.dtype), names, arguments.repeats)
    print_table(
        table,
        [
            "shape",
            "provider",
            "ms",
            "speedup_over_eager",
            "speedup_over_compile",
            "times_floor",
            "copy_gb_per_s",
        ],
    )
    write_csv(path, table)
    plot(path)


if __name__ == "__main__":
    main()
