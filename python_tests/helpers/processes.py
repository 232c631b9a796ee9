"""Python processes of their own: programs of the tests, and scripts run as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.documents import ROOT


def environment(**settings: str) -> dict[str, str]:
    """This process's environment, with some variables set; what the tests can import can be imported there."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | settings


def run_script(script: str, *arguments: object, folder: Path, code: int = 0) -> str:
    """Runs a script of the repository in a folder, as a user does.

    Args:
        script: its path in the repository.
        arguments: its flags.
        folder: the working directory.
        code: the exit status that it must leave with.

    Returns:
        What it prints; on standard error where it is to fail.
    """
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout
