"""A Triton kernel whose machine code the tests know."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sum_kernel(x_ptr, sums_ptr, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * stride + index, mask=index < columns, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row, tl.sum(total, 0))


def sample_configuration(aligned: bool) -> tuple:
    """A configuration as `aot_configurations()` yields it; 16-byte loads are possible when aligned."""
    signature = {
        "x_ptr": "*bf16",
        "sums_ptr": "*fp32",
        "columns": "i32",
        "stride": "i64",
        "BLOCK": "constexpr",
    }
    divisible = ("x_ptr", "columns", "stride") if aligned else ()
    options = {"num_warps": 4, "num_stages": 2, "divisible_by_16": divisible}
    return "row_sum", row_sum_kernel, signature, {"BLOCK": 1024}, options
