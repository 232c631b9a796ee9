"""The execution modes by name. Each is the `MODE` of the file of that name in this folder.

The table itself is `gkt_fast.config.EXECUTIONS`, which the configuration and the command line check a name against: a
new mode is a file here and a line there.
"""

from __future__ import annotations

from importlib import import_module

from ..config import EXECUTIONS
from .step import Mode

__all__ = ["EXECUTION_MODES"]

EXECUTION_MODES: dict[str, Mode] = {
    name: import_module(f".{name}", __package__).MODE for name in EXECUTIONS if name != "auto"
}
