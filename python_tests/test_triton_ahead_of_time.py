"""Every Triton kernel and configuration that a launcher can choose compiles for every architecture, without a GPU.

In a process of its own, since this one's kernels are defined for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from backends import unavailable

SCRIPT = """
import os, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from gkt_fast.kernels.triton import ghost_batch_norm

count = 0
for name, function, signature, constants, options in ghost_batch_norm.aot_configurations():
    options = dict(options)
    divisible = options.pop("divisible_by_16", ())
    attributes = {(function.arg_names.index(a),): [["tt.divisibility", 16]] for a in divisible}
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert compiled.asm["cubin"], name
    wide = compiled.asm["ptx"].count("ld.global.v4") + compiled.asm["ptx"].count("ld.global.v2")
    if name.startswith(("affine", "sums")) and "channels_last" in name:
        assert wide > 0, f"{name} reads one element at a time"
    count += 1
print(count)
"""


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_ghost_batch_norm(architecture):
    try:
        import triton  # noqa: F401
    except ImportError as error:
        unavailable("triton", str(error))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(architecture)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout) > 50
