"""Triton kernels around the loss: rows are counted before it, and its programs' sums are added up after it.

Shapes: counts (counters, 4), counters <= COUNTERS, int64, of each counting program: rows whose class index isn't
ignore_index, those of them that subnets have, rows whose class index is out of range, and the largest such index; sums
(S + 1, programs), float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_knowledge_loss_tiles import row_offsets

__all__ = ["COUNTERS", "count_kernel", "counted_rows", "finish_kernel"]

COUNTERS = tl.constexpr(64)  # every program of the loss adds up what they leave behind
COUNTS = tl.constexpr(4)
LEAST_INDEX = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=["targets_ptr", "counts_ptr", "class_count", "row_count", "subnet_rows", "size_1",
                               "size_2", "stride_0", "stride_1", "stride_2", "ignore_index"])  # fmt: skip
def count_kernel(
    targets_ptr, counts_ptr, class_count: tl.int32, row_count: tl.int64, subnet_rows: tl.int64, size_1: tl.int64,
    size_2: tl.int64, stride_0: tl.int64, stride_1: tl.int64, stride_2: tl.int64, ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    counted = tl.zeros((BLOCK,), tl.int64)
    in_share = tl.zeros((BLOCK,), tl.int64)
    wrong = tl.zeros((BLOCK,), tl.int64)
    largest = tl.full((BLOCK,), LEAST_INDEX, tl.int64)
    for start in range(program * BLOCK, row_count, tl.num_programs(0) * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        offsets = row_offsets(rows, size_1, size_2, stride_0, stride_1, stride_2)
        labels = tl.load(targets_ptr + offsets, mask=rows < row_count, other=ignore_index)
        counts = labels != ignore_index
        counted += counts.to(tl.int64)
        in_share += (counts & (rows < subnet_rows)).to(tl.int64)
        out = counts & ((labels < 0) | (labels >= class_count))
        wrong += out.to(tl.int64)
        largest = tl.maximum(largest, tl.where(out, labels, LEAST_INDEX))
    to = counts_ptr + program * COUNTS
    tl.store(to, tl.sum(counted, axis=0))
    tl.store(to + 1, tl.sum(in_share, axis=0))
    tl.store(to + 2, tl.sum(wrong, axis=0))
    tl.store(to + 3, tl.max(largest, axis=0))


@triton.jit
def counted_rows(counts_ptr, counters, row_count, subnet_rows, distill_ignored, PROBABILITIES: tl.constexpr):
    """How many rows the means of the full network's CE, of kd and of the subnets' CE count; NaN with a wrong index."""
    if PROBABILITIES:
        full = row_count.to(tl.float32)
        share = subnet_rows.to(tl.float32)
        distilled = share
    else:
        at = counts_ptr + tl.arange(0, COUNTERS) * COUNTS
        there = tl.arange(0, COUNTERS) < counters
        wrong = tl.sum(tl.load(at + 2, mask=there, other=0), axis=0)
        invalid = tl.where(wrong > 0, float("nan"), 0.0)
        full = tl.sum(tl.load(at, mask=there, other=0), axis=0).to(tl.float32) + invalid
        share = tl.sum(tl.load(at + 1, mask=there, other=0), axis=0).to(tl.float32) + invalid
        distilled = tl.where(distill_ignored, subnet_rows.to(tl.float32) + invalid, share)
    return full, distilled, share


@triton.jit(do_not_specialize=["sums_ptr", "counts_ptr", "loss_ptr", "terms_ptr", "report_ptr", "programs", "counters",
                               "streams", "class_count", "row_count", "subnet_rows", "distill_ignored"])  # fmt: skip
def finish_kernel(
    sums_ptr, counts_ptr, loss_ptr, terms_ptr, report_ptr, programs: tl.int32, counters: tl.int32, streams: tl.int32,
    class_count: tl.int32, row_count: tl.int64, subnet_rows: tl.int64, distill_ignored: tl.int32,
    ce_weight: tl.float32, kd_weight: tl.float32, subnet_ce_weight: tl.float32,
    PROBABILITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    full, distilled, share = counted_rows(
        counts_ptr, counters, row_count, subnet_rows, distill_ignored != 0, PROBABILITIES
    )
    loss = tl.where(full == full, 0.0, float("nan"))  # NaN with a wrong index
    zero = tl.program_id(0).to(tl.int64)  # makes 64-bit integers of what is added to it
    for stream in range(streams + 1):
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, programs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            sums = tl.load(sums_ptr + (zero + stream) * programs + at, mask=at < programs, other=0.0)
            total += sums.to(tl.float64)
        rows = tl.where(stream == 0, full, tl.where(stream == streams, share, distilled))
        weight = tl.where(stream == 0, ce_weight, tl.where(stream == streams, subnet_ce_weight, kd_weight))
        mean = (tl.sum(total, axis=0) / rows).to(tl.float32)
        if stream < streams:
            tl.store(terms_ptr + stream, mean)
        if (weight != 0) & ((stream < streams) | (streams > 1)):
            loss += weight * mean
    tl.store(loss_ptr, loss)
    if not PROBABILITIES:
        at = counts_ptr + tl.arange(0, COUNTERS) * COUNTS
        there = tl.arange(0, COUNTERS) < counters
        if tl.sum(tl.load(at + 2, mask=there, other=0), axis=0) > 0:
            tl.store(report_ptr, tl.max(tl.load(at + 3, mask=there, other=LEAST_INDEX), axis=0))
            tl.store(report_ptr + 1, class_count.to(tl.int64))
