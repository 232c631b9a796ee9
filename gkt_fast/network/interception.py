"""Runs a model's own forward with the calls of chosen modules handed to someone else.

While `intercept` is active, every chosen module's place in its parent holds a stand-in; the model's forward calls the
stand-in as if it were the module. Another thread that runs the model meanwhile runs the modules themselves. Nothing of
the model is changed outside the block: no forward is rebound, no hook is left behind, and a module that stands in two
places has one stand-in for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from torch import nn

from ..subnets.subnet import Stage

__all__ = ["Call", "Site", "StandIn", "find_layers", "find_sites", "intercept"]

Call = Callable[["Site", nn.Module, tuple, dict], Any]
"""Handles a call: (site, the real module, positional arguments, keyword arguments) -> result."""


@dataclass(frozen=True)
class Site:
    """A place of a model whose calls are intercepted.

    Args:
        index: number of the site.
        path: module path.
        is_block: whether it is a residual block, or a module between the blocks.
    """

    index: int
    path: str
    is_block: bool

    @functools.cached_property
    def parent(self) -> str:
        """Module path of the parent."""
        return self.path.rpartition(".")[0]

    @functools.cached_property
    def name(self) -> str:
        """Name in the parent."""
        return self.path.rpartition(".")[2]


def find_sites(model: nn.Module, stages: Iterable[Stage]) -> list[Site]:
    """The blocks, and every outermost module that is no block, contains none and can be called (stem, head).

    Raises:
        ValueError: two blocks are one place, because their container stands in the model twice.
    """
    blocks = {path for stage in stages for path in stage.blocks}
    ancestors = {""}
    for path in blocks:
        while path:
            path = path.rpartition(".")[0]
            ancestors.add(path)
    sites: list[Site] = []
    seen: set[tuple[int, str]] = set()

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            child_path = f"{path}.{name}" if path else name
            if child is None:
                continue
            is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))  # never called, but what it holds is
            if child_path not in blocks and (child_path in ancestors or is_list):
                visit(child, child_path)
            elif (id(module), name) not in seen:
                seen.add((id(module), name))
                sites.append(Site(len(sites), child_path, child_path in blocks))

    visit(model, "")
    hidden = sorted(blocks - {site.path for site in sites})
    if hidden:
        raise ValueError(
            f"stages names {hidden[0]!r}, which is the same place as another block: its container stands in "
            "the model twice. Build two containers that hold the same blocks"
        )
    return sites


def find_layers(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Site]:
    """Every place of a module that is wanted, however deep; not those within such a module."""
    sites: list[Site] = []
    seen: set[tuple[int, str]] = set()

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            if child is None or (id(module), name) in seen:
                continue
            seen.add((id(module), name))
            child_path = f"{path}.{name}" if path else name
            if wanted(child):
                sites.append(Site(len(sites), child_path, is_block=False))
            else:
                visit(child, child_path)

    visit(model, "")
    return sites


class StandIn:
    """Takes a module's place in its parent's `_modules`; looks like the module to everything but a call."""

    __slots__ = ("__weakref__", "_call", "_module", "_site", "_thread")

    def __init__(self, site: Site, module: nn.Module, call: Call) -> None:
        object.__setattr__(self, "_site", site)
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_call", call)
        object.__setattr__(self, "_thread", get_ident())

    @property
    def __class__(self) -> type:  # isinstance() in the model's forward sees the module's own class
        return type(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if get_ident() != self._thread:  # someone else's inference while a step runs
            return self._module(*args, **kwargs)
        return self._call(self._site, self._module, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in StandIn.__slots__:  # of one that is being made or copied: not to be asked of itself
            raise AttributeError(name)
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._module[key]

    def __iter__(self) -> Iterator:
        return iter(self._module)

    def __len__(self) -> int:
        return len(self._module)


@contextmanager
def intercept(model: nn.Module, sites: Iterable[Site], call: Call) -> Iterator[None]:
    """Hands the calls of the modules at `sites` to `call` while the block runs."""
    parents = {}
    replaced: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    try:
        for site in sites:
            if site.parent not in parents:
                parents[site.parent] = model.get_submodule(site.parent)
            modules = parents[site.parent]._modules
            module = modules[site.name]
            modules[site.name] = StandIn(site, module, call)
            replaced.append((modules, site.name, module))
        yield
    finally:
        for modules, name, module in reversed(replaced):
            modules[name] = module
