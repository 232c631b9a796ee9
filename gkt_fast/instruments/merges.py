"""How often a thread goes round in the merge kernels of `ghost_batch_norm`, from the geometry of their launches.

A merge kernel adds up the sums that the blocks of the first pass leave behind, one for each chunk, channel and ghost
batch. It has few threads, so that what it takes is not bytes but rounds: each loads, then waits. The geometry is that
of kernels/cuda/ghost_batch_norm_chunks.cuh and ..._merge.cuh, to which the tests hold it.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LOADED_TOGETHER", "Chunks", "chunk_counts", "chunk_trips", "gradient_trips", "statistics_trips"]

CHUNK_ELEMENTS = 8192
MOST_CHUNKS = 1024
MOST_COLUMNS = 128
LANES, WARPS = 64, 16  # of a block, per channel and in all
LOADED_TOGETHER = 4
"""Chunks whose loads are under way at once: a thread waits once for so many trips."""


class Chunks(NamedTuple):
    """Chunks of the first ghost batch, and of each other one."""

    lead: int
    other: int


def chunk_counts(
    channels_last: bool, ghosts: int, rows: int, channels: int, positions: int, lead_rows: int | None = None
) -> Chunks:
    """For ghost batches of `rows` rows; the first of `lead_rows` rows, None: as the others."""
    per_row, length = (positions, channels) if channels_last else (1, positions)
    lead, other = (rows if lead_rows is None else lead_rows) * per_row, rows * per_row
    width = min(length, MOST_COLUMNS) if channels_last else length
    longest = _cdiv(lead + (ghosts - 1) * other, MOST_CHUNKS)
    lines = min(max(lead, other), max(1, CHUNK_ELEMENTS // width, longest))
    return Chunks(_cdiv(lead, lines), _cdiv(other, lines))


def statistics_trips(chunks: Chunks) -> int:
    """Loop trips of a thread when statistics are merged: over the chunks, then over the block's warps."""
    return _cdiv(max(chunks), LANES) + WARPS


def gradient_trips(chunks: Chunks, ghosts: int, equal: bool = True) -> int:
    """Loop trips of a thread when gradients are merged: over chunks and warps, then over ghost batches."""
    return sum(
        _cdiv(count, LANES // groups) + WARPS // groups + groups
        for count, groups in _rounds(chunks, ghosts, equal)
    )


def chunk_trips(chunks: Chunks, ghosts: int, backward: bool, equal: bool = True) -> int:
    """Those of a thread's trips that load from main memory: chunks."""
    if not backward:
        return _cdiv(max(chunks), LANES)
    return sum(_cdiv(count, LANES // groups) for count, groups in _rounds(chunks, ghosts, equal))


def _rounds(chunks: Chunks, ghosts: int, equal: bool) -> list[tuple[int, int]]:
    """Chunks of a ghost batch and ghost batches that a block merges at a time: the first alone if it differs."""
    others = ghosts if equal else ghosts - 1
    groups = min(WARPS, 1 << (others - 1).bit_length())
    return [(chunks.lead, 1)] * (not equal) + [(chunks.other, groups)] * _cdiv(others, groups)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
