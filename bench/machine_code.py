"""Compiles every CUDA and Triton kernel for every architecture, without a GPU, and tabulates its machine code.

    python bench/machine_code.py [--arch 80 90 100] [--op OP ...] [--kind cuda triton] [--csv PATH] [FILE ...]

Per kernel and architecture: registers, stack, accesses to local memory (spills), shared memory, occupancy,
global loads and stores by bytes per thread ("4x16": four of 16 bytes), and the same of the inner loop: the
innermost loop that moves most global memory, or the whole kernel where there is none. "KB in flight" is what all
threads of a multiprocessor have loaded and not yet used at most, in that loop. "256?" threads are
assumed where a kernel has no __launch_bounds__. The dynamic shared memory of CUDA kernels isn't known here. Kernels
are found by convention: kernels/cuda/*.cu, and `aot_configurations()` of kernels/triton/*.py (see there).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import RESULTS, print_table, write_csv

from gkt_fast.instruments.machine_code import WIDTHS, cuda_rows, triton_rows
from gkt_fast.instruments.sass import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = (ROOT / "csrc", ROOT / "kernels" / "cuda")

TABLE = [
    *("op", "kernel", "arch", "registers", "stack", "spills", "shared", "threads", "occupancy", "limit"),
    *("loads", "stores", "loop", "loop loads", "loop stores", "instructions per 16 B", "KB in flight"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="CUDA sources; default: kernels/cuda/*.cu")
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=sorted(ARCHITECTURES), default=sorted(ARCHITECTURES)
    )
    parser.add_argument("--op", nargs="+", help="only these ops")
    parser.add_argument("--kind", nargs="+", choices=["cuda", "triton"], default=["cuda", "triton"])
    parser.add_argument("--csv", type=Path, default=RESULTS / "machine_code.csv")
    options = parser.parse_args(arguments)

    rows = []
    if "cuda" in options.kind:
        sources = options.files or sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
        chosen = [source for source in sources if options.op is None or source.stem in options.op]
        rows += cuda_rows(chosen, options.arch, INCLUDE)
    if "triton" in options.kind and not options.files:
        rows += triton_rows(options.arch, options.op)
    if not rows:
        sys.exit("no kernel was found")
    write_csv(options.csv, rows)
    print_table([{**row, **_readable(row)} for row in rows], TABLE)


def _readable(row: dict[str, object]) -> dict[str, object]:
    moved = row["loop_bytes"]
    return {
        "spills": row["spill_loads"] + row["spill_stores"],
        "shared": row["static_shared"] + row["dynamic_shared"],
        "threads": row["threads"] if row["threads_known"] else f"{row['threads']}?",
        **{name: _widths_text(row, name) for name in ("loads", "stores")},
        "loop loads": _widths_text(row, "loop_loads"),
        "loop stores": _widths_text(row, "loop_stores"),
        "loop": row["loop_instructions"] if row["loops"] else f"{row['loop_instructions']} (no loop)",
        "instructions per 16 B": 16 * row["loop_instructions"] / moved if moved else "",
        "KB in flight": row["bytes_in_flight"] / 1024,
    }


def _widths_text(row: dict[str, object], name: str) -> str:
    """Accesses as "4x16 1x4": four of 16 bytes, one of 4."""
    counts = {width: row[f"{name}_{width}"] for width in WIDTHS}
    return " ".join(f"{count}x{width}" for width, count in counts.items() if count) or "-"


if __name__ == "__main__":
    main()
