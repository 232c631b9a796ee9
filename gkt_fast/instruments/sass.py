"""Reads cubins: resources, access widths and loops of every kernel, and the occupancy they allow.

Needs `cuobjdump` and `nvdisasm`, of a CUDA toolkit or of Triton, which ships both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Kernel",
    "Loop",
    "Occupancy",
    "find_tool",
    "occupancy",
    "read_cubin",
]


@dataclass(frozen=True)
class Architecture:
    """What limits the resident blocks of a multiprocessor.

    Sources: for the numbers, "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++
    Programming Guide; for the granularities and the formula of `occupancy`, the toolkit's cuda_occupancy.h;
    for the 1 KiB of shared memory that the system takes from each block, the Ampere and Hopper tuning guides,
    "Unified Shared Memory/L1/Texture Cache".
    """

    warps: int
    blocks: int
    registers: int
    shared_bytes: int
    shared_bytes_per_block: int

    register_granularity = 256  # per warp
    shared_granularity = 128
    reserved_shared_bytes = 1024
    partitions = 4


ARCHITECTURES = {
    80: Architecture(64, 32, 65536, 164 * 1024, 163 * 1024),
    90: Architecture(64, 32, 65536, 228 * 1024, 227 * 1024),
    100: Architecture(64, 32, 65536, 228 * 1024, 227 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks per multiprocessor, the share of its warps they fill, and which resource ends first."""

    blocks: int
    share: float
    limit: str


def occupancy(architecture: int, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Occupancy of a kernel, with all of the combined cache that can be shared memory given to it.

    Args:
        architecture: compute capability times ten: 80, 90 or 100.
        threads: threads per block.
        registers: registers per thread.
        shared_bytes: static and dynamic shared memory per block.
    """
    device = ARCHITECTURES[architecture]
    warps = -(-threads // 32)
    per_warp = _round_up(registers * 32, device.register_granularity)
    resident_warps = device.registers // device.partitions // per_warp * device.partitions
    shared = _round_up(shared_bytes + device.reserved_shared_bytes, device.shared_granularity)
    limits = {
        "warps": device.warps // warps,
        "registers": resident_warps // warps,
        "shared memory": device.shared_bytes // shared
        if shared_bytes <= device.shared_bytes_per_block
        else 0,
        "blocks": device.blocks,
    }
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limits[limit] * warps / device.warps, limit)


def _round_up(value: int, granularity: int) -> int:
    return -(-value // granularity) * granularity


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    target: int | None = None  # of a branch
    operands: str = ""

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def access_bytes(self) -> int:
        """Bytes that one thread moves with this load or store."""
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((widths[part] for part in self.opcode.split(".")[1:] if part in widths), 4)


class Code:
    """A run of instructions and what can be counted in it."""

    instructions: tuple[Instruction, ...]

    def count(self, *bases: str) -> int:
        """Instructions whose opcode starts with one of these names up to its first dot."""
        return sum(instruction.base in bases for instruction in self.instructions)

    def widths(self, base: str) -> Counter[int]:
        """Number of accesses by bytes per thread, of "LDG" (global loads), "STG", "LDS", "STS", ..."""
        return Counter(i.access_bytes for i in self.instructions if i.base == base)

    def bytes_moved(self, *bases: str) -> int:
        """Bytes per thread that these accesses move when each runs once."""
        return sum(i.access_bytes for i in self.instructions if i.base in bases)

    def most_bytes_in_flight(self) -> int:
        """The most bytes per thread of global loads that are under way at once: issued, and not yet used.

        Loads come back in order: who uses one has waited for those before it.
        """
        pending: list[tuple[set[int], int]] = []  # registers and bytes of each load
        most = 0
        for instruction in self.instructions:
            loads = instruction.base == "LDG"
            written, _, read = instruction.operands.partition(",")
            used = _registers(read if loads else instruction.operands)
            last = max((i for i, (registers, _) in enumerate(pending) if registers & used), default=-1)
            del pending[: last + 1]
            if loads and (first := re.search(r"\bR(\d+)", written)):
                count = max(1, instruction.access_bytes // 4)
                registers = set(range(int(first[1]), int(first[1]) + count))
                pending.append((registers, instruction.access_bytes))
                most = max(most, sum(size for _, size in pending))
        return most


def _registers(operands: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)", operands)}


@dataclass(frozen=True)
class Loop(Code):
    """The instructions from the target of a backward branch to the branch."""

    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Kernel(Code):
    """One kernel of a cubin.

    `threads` is the block size of `__launch_bounds__` or of `reqntid`, None without.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int | None
    instructions: tuple[Instruction, ...]

    @cached_property
    def loops(self) -> list[Loop]:
        """The innermost loops: those that contain no other."""
        spans = [
            (i.target, i.address)
            for i in self.instructions
            if i.target is not None and i.target < i.address and i.base in ("BRA", "BRX", "JMP")
        ]
        inner = [
            (first, last)
            for first, last in set(spans)
            if not any((f, l) != (first, last) and first <= f and l <= last for f, l in spans)
        ]
        return [
            Loop(tuple(i for i in self.instructions if first <= i.address <= last))
            for first, last in sorted(inner)
        ]

    @cached_property
    def main_loop(self) -> Loop | None:
        """The innermost loop that moves most global memory, one with loads before one without; the longest if
        none moves any."""
        return max(
            self.loops,
            key=lambda loop: (
                loop.count("LDG", "LDGSTS") > 0,
                loop.bytes_moved("LDG", "STG", "LDGSTS"),
                len(loop.instructions),
            ),
            default=None,
        )


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, under CUDA_HOME or /usr/local/cuda, or in Triton's package."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which(name, path=path)


def read_cubin(path: str | Path, architecture: int) -> list[Kernel]:
    """The kernels of a cubin file.

    Args:
        path: the file.
        architecture: compute capability times ten that it was compiled for.

    Raises:
        RuntimeError: a tool is missing, or can't read the file.
    """
    # From compute capability 9.0 on, the shared memory of kernels that have any includes the reserved part.
    reserved = Architecture.reserved_shared_bytes if architecture >= 90 else 0
    resources = {
        name: (registers, stack, max(0, shared - reserved))
        for name, registers, stack, shared in _parse_resources(_run("cuobjdump", "-res-usage", path))
    }
    threads = _parse_threads(_run("cuobjdump", "-elf", path))
    code = _parse_code(_run("nvdisasm", "-c", path))
    return [
        Kernel(name, *resources[name], threads.get(name), instructions)
        for name, instructions in sorted(code.items())
        if name in resources
    ]


def _run(tool: str, *arguments: str | Path) -> str:
    program = find_tool(tool)
    if program is None:
        raise RuntimeError(f"{tool} was not found: install a CUDA toolkit or Triton")
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{tool} {' '.join(map(str, arguments))}: {result.stderr.strip()}")
    return result.stdout


def _parse_resources(text: str) -> list[tuple[str, int, int, int]]:
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return [(name, *map(int, numbers)) for name, *numbers in re.findall(pattern, text)]


def _parse_threads(text: str) -> dict[str, int]:
    threads = {}
    for section in text.split(".nv.info.")[1:]:
        match = re.search(
            r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\S+\s+Value:\s+((?:0x[0-9a-f]+ ?)+)", section
        )
        if match:
            x, y, z = (int(value, 16) for value in match[1].split())
            threads[section.split(None, 1)[0]] = x * y * z
    return threads


def _parse_code(text: str) -> dict[str, tuple[Instruction, ...]]:
    functions = {}
    for section in re.split(r"(?m)^\s*\.section\s+", text)[1:]:
        if section.startswith(".text."):
            name = section[len(".text.") :].split(",", 1)[0]
            functions[name] = _parse_instructions(section)
    return functions


def _parse_instructions(text: str) -> tuple[Instruction, ...]:
    labels: dict[str, int] = {}
    pending: list[str] = []
    parsed: list[tuple[int, str, str | None, str]] = []
    for line in text.splitlines():
        if match := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            target = re.search(r"`\((\.L_\w+)\)", match[3])
            parsed.append((address, match[2], target and target[1], match[3].strip()))
        elif match := re.match(r"(\.L_\w+):", line):
            pending.append(match[1])
    # After the code the assembler puts a branch to itself and NOPs, to fill the cache line.
    while parsed and (
        parsed[-1][1] == "NOP" or (parsed[-1][1] == "BRA" and labels.get(parsed[-1][2]) == parsed[-1][0])
    ):
        parsed.pop()
    return tuple(
        Instruction(address, opcode, labels.get(target), operands)
        for address, opcode, target, operands in parsed
    )
