"""How often a thread goes round in the merge kernels of `ghost_batch_norm`, from the geometry of their launches.

A merge kernel adds up the sums that the blocks of the first pass leave behind, one for each chunk, channel and ghost
batch. It has few threads, so that what it takes is not bytes but rounds: each loads, then waits. The geometry is that
of kernels/cuda/ghost_batch_norm_chunks.cuh and ..._merge.cuh, to which the tests hold it.
"""

from __future__ import annotations

__all__ = ["LOADED_TOGETHER", "chunk_count", "chunk_trips", "gradient_trips", "statistics_trips"]

CHUNK_ELEMENTS = 8192
MOST_CHUNKS = 1024
MOST_COLUMNS = 128
LANES, WARPS = 64, 16  # of a block, per channel and in all
LOADED_TOGETHER = 4
"""Chunks whose loads are under way at once: a thread waits once for so many trips."""


def chunk_count(channels_last: bool, ghosts: int, rows: int, channels: int, positions: int) -> int:
    """Chunks of each ghost batch of `rows` rows."""
    lines, length = (rows * positions, channels) if channels_last else (rows, positions)
    width = min(length, MOST_COLUMNS) if channels_last else length
    longest = _cdiv(ghosts * lines, MOST_CHUNKS)
    return _cdiv(lines, min(lines, max(1, CHUNK_ELEMENTS // width, longest)))


def statistics_trips(chunks: int) -> int:
    """Loop trips of a thread when statistics are merged: over the chunks, then over the block's warps."""
    return _cdiv(chunks, LANES) + 2 * WARPS


def gradient_trips(chunks: int, ghosts: int) -> int:
    """Loop trips of a thread when gradients are merged: over chunks and warps, then over ghost batches."""
    groups = gradient_groups(ghosts)
    rounds = _cdiv(ghosts, groups)
    return rounds * (_cdiv(chunks, LANES // groups) + 2 * (WARPS // groups) + groups)


def gradient_groups(ghosts: int) -> int:
    """Ghost batches that a block merges at a time."""
    return min(WARPS, 1 << (ghosts - 1).bit_length())


def chunk_trips(chunks: int, ghosts: int, backward: bool) -> int:
    """Those of a thread's trips that load from main memory: chunks."""
    if not backward:
        return _cdiv(chunks, LANES)
    groups = gradient_groups(ghosts)
    return _cdiv(ghosts, groups) * _cdiv(chunks, LANES // groups)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
