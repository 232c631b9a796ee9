"""Triton kernels and their launchers, one file per op.

Each file also has `aot_configurations()`, a generator over everything that its launchers can launch, one
representative per choice of the launcher (dtype, flags, block sizes, warps). It yields tuples

    (name, function, signature, constexprs, options)

of a readable name that is unique in the file, the `@triton.jit` function, its signature by argument name
(`{"x_ptr": "*bf16", "rows": "i64", "BLOCK": "constexpr"}`), the values of its constexprs by argument name,
and `{"num_warps": ..., "num_stages": ...}`. Pointers and integers that are multiples of 16 in the launch (Triton
specialises on them) are named in `options["divisible_by_16"]`, a tuple of argument names.
`bench/machine_code.py` and the tests compile these for every architecture without a GPU.
"""
