"""Python processes of their own that can import what the tests import."""

from __future__ import annotations

import os
import sys


def environment(**settings: str) -> dict[str, str]:
    """This process's environment and import path, with some variables set."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | settings
