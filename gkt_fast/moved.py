"""Where gkt_fast 0.1 kept what ends up in pickles: its modules can be imported by those names as well."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "gkt_fast.evaluation": "gkt_fast.deployment.evaluation",
    "gkt_fast.execution.interception": "gkt_fast.network.interception",
    "gkt_fast.fusion": "gkt_fast.batch_norm.fusion",
    "gkt_fast.plan": "gkt_fast.subnets.plan",
    "gkt_fast.schedules": "gkt_fast.training.schedules",
    "gkt_fast.subnet": "gkt_fast.subnets.subnet",
    "gkt_fast.subnet_table": "gkt_fast.deployment.subnet_table",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds a module by its old name when that is imported; until then nothing is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the module of today in the place of the one that was made for the old name."""
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(_MovedModules())
