"""Triton kernels: per op one file with the launchers, named as the op, and one with the kernels.

The former also has `aot_configurations()`, a generator over everything that its launchers can launch (dtype, flags,
block sizes, warps). It yields tuples

    (name, function, signature, constexprs, options)

of a readable name that is unique in the file, the `@triton.jit` function, its signature by argument name
(`{"x_ptr": "*bf16", "rows": "i64", "BLOCK": "constexpr"}`), the values of its constexprs by argument name,
and the options of the launch, `{"num_warps": ..., "maxnreg": ...}`. A kernel that lets Triton specialise on
arguments that are multiples of 16 names them in `options["divisible_by_16"]`; these here don't.
`bench/machine_code.py` and the tests compile these for every architecture without a GPU.
"""
