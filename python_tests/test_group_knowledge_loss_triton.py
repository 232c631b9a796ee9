"""Ahead-of-time compilation of group_knowledge_loss's Triton kernel, where no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from backends import unavailable

CONFIGURATIONS = [
    "fp32_21",
    "bf16_1000",
    "fp16_32000",
    "fp32_100_one_loop_false",
    "fp32_100_probabilities_true",
]

# A process of its own: this one's Triton may be the interpreter, which has nothing to compile.
PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gkt_fast.kernels.triton.group_knowledge_loss import aot_configurations

architecture, wanted = int(sys.argv[1]), sys.argv[2].split(",")
for name, function, signature, constexprs, options in aot_configurations():
    if name not in wanted:
        continue
    wanted.remove(name)
    divisible = options.pop("divisible_by_16")
    attributes = {(function.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in divisible}
    source = ASTSource(function, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert compiled.asm["cubin"]
    print(name, compiled.metadata.shared)
assert not wanted, wanted
"""


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_ahead_of_time(architecture):
    try:
        import triton  # noqa: F401
    except ImportError as error:
        unavailable("triton", str(error))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(architecture), ",".join(CONFIGURATIONS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == len(CONFIGURATIONS)
