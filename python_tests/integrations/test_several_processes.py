"""Two gloo processes in each library's loop train what one process does that accumulates their batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "one_of_several.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    "library, execution",
    [("timm", "auto"), ("huggingface", "auto"), ("lightning", "auto"), ("accelerate", "sequential")],
)
def test_two_processes_are_one_that_accumulates(library, execution, tmp_path):
    weights = {}
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        path = tmp_path / f"{name}.pt"
        result = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), library, execution, str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        weights[name] = torch.load(path, weights_only=True)
    for name, one in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], one, rtol=1e-4, atol=1e-6)
