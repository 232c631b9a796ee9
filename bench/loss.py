"""Times group_knowledge_loss, forward and backward, against eager torch, torch.compile and a copy of the logits.

    python bench/loss.py                # all shapes; writes results/loss.csv and results/loss.png
    python bench/loss.py --shapes 0 1   # some of them
    python bench/loss.py --plot         # only the plot, from the CSV

Every provider gets the same tensors, one call of each in turn. `copy` is logits.clone() into fresh memory, as the
gradient is fresh; `copy into` writes to memory that is already there. Extra memory is the peak during one call above
what was in use before it, and includes the gradient.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import provider_pictures
import torch
from harness import RESULTS, environment, measure, print_table, write_csv

from gkt_fast import group_knowledge_loss, use_backend
from gkt_fast.ops import BackendError, group_knowledge_loss_reference

SHAPES = [(4, 128, 100), (4, 128, 1000), (4, 65536, 21), (4, 4, 21, 128, 128), (4, 1024, 32000)]
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="indices into the list"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--output", type=Path, default=RESULTS / "loss.csv")
    parser.add_argument("--plot", action="store_true", help="only draw the CSV")
    arguments = parser.parse_args()
    if not arguments.plot:
        rows = []
        for index in arguments.shapes:
            for normalize in (True, False):
                rows += benchmark(SHAPES[index], normalize, arguments)
        write_csv(arguments.output, rows)
    plot(arguments.output)


def benchmark(
    shape: tuple[int, ...], normalize: bool, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    logits = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, shape[2], (shape[1], *shape[3:]), device=device)
    torch.compiler.reset()
    providers = {
        "eager": step(group_knowledge_loss_reference, logits, targets, normalize),
        "compile": step(torch.compile(group_knowledge_loss_reference), logits, targets, normalize),
    }
    for backend in BACKENDS[device]:
        try:
            with use_backend(backend):
                group_knowledge_loss(logits, targets)
        except BackendError as error:
            print(f"{backend}: {error}")
            continue
        providers[backend] = step(on_backend(backend), logits, targets, normalize)
    source, destination = logits.detach(), torch.empty_like(logits)
    providers["copy"] = source.clone
    providers["copy into"] = lambda: destination.copy_(source)

    large = logits.numel() > 1 << 26
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timings = measure(providers, repeats=max(3, arguments.repeats // 7) if large else arguments.repeats)
    logits.grad = None
    gradient_bytes = logits.numel() * logits.element_size()
    rows = []
    for name, provider in providers.items():
        timing = timings[name]
        rows.append(
            {
                "op": "group_knowledge_loss",
                "shape": "x".join(map(str, shape)),
                "dtype": arguments.dtype,
                "normalize_logits": normalize,
                "provider": name,
                "median_ms": timing.median,
                "lower_ms": timing.lower,
                "upper_ms": timing.upper,
                "repeats": timing.repeats,
                "times_faster_than_eager": timings["eager"].median / timing.median,
                "times_faster_than_compile": timings["compile"].median / timing.median,
                "times_copy": timing.median / timings["copy"].median,
                "times_copy_into": timing.median / timings["copy into"].median,
                # The least traffic: logits read once, gradient written once.
                "gigabytes_per_second": 2 * gradient_bytes / timing.median / 1e6,
                "extra_memory_over_gradient": extra_memory(provider, logits) / gradient_bytes,
                **environment(),
            }
        )
    columns = ["shape", "normalize_logits", "provider", "median_ms", "times_faster_than_eager"]
    columns += ["times_faster_than_compile", "times_copy", "times_copy_into", "extra_memory_over_gradient"]
    print_table(rows, columns)
    return rows


def step(loss: Callable, logits: torch.Tensor, targets: torch.Tensor, normalize: bool) -> Callable[[], None]:
    def forward_and_backward() -> None:
        logits.grad = None
        loss(logits, targets, normalize_logits=normalize)[0].backward()

    return forward_and_backward


def on_backend(backend: str) -> Callable:
    def loss(*args, **kwargs):
        with use_backend(backend):
            return group_knowledge_loss(*args, **kwargs)

    return loss


def extra_memory(call: Callable[[], object], logits: torch.Tensor) -> int:
    """Bytes at the peak of one call above those in use before it."""
    logits.grad = None
    gc.collect()
    if logits.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def plot(path: Path) -> None:
    provider_pictures.plot(
        path,
        "times_copy",
        "How long does the loss of all streams take?",
        "forward and backward, normalised logits, in copies of the logits; streams × batch × classes (× pixels)",
        chosen=lambda row: row["normalize_logits"] == "True",
    )


if __name__ == "__main__":
    main()
