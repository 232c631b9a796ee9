"""Checks that a model's forward calls its blocks, all of them, in every stream and in the same order.

A model that skips blocks by itself, or lets their order depend on its data, would be trained with other subnets than
those that were drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .discovery import NAME_STAGES
from .interception import Site

__all__ = ["BlockOrder"]


class BlockOrder:
    """Records which blocks each stream calls, the full network's first.

    Args:
        sites: places of the model.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._blocks = [site.path for site in sites if site.is_block]
        self._expected: list[str] | None = None
        self._called: list[str] = []

    @property
    def advice(self) -> str:
        """Which blocks were found, and what the user can do."""
        return (
            f"The blocks found are {_listed(self._blocks)}. Turn off what skips blocks, or leave those that it may "
            f"skip to the model. {NAME_STAGES}"
        )

    def begin_stream(self) -> None:
        """Starts the next stream."""
        self._called = []

    def call(self, site: Site) -> None:
        """Records a call of a site, dropped or not."""
        if site.is_block:
            self._called.append(site.path)

    def end_stream(self) -> None:
        """Ends the stream, and checks which blocks it called.

        Raises:
            ValueError: the full network left out a block, or a subnet's stream called other ones than it.
        """
        if self._expected is not None:
            if self._called != self._expected:
                raise ValueError(
                    f"the model's forward called the blocks {_listed(self._called)} for a subnet and "
                    f"{_listed(self._expected)} for the full network: it decides by its data, or at random, which "
                    f"blocks run. {self.advice}"
                )
            return
        self._expected = self._called
        missing = [path for path in self._blocks if path not in set(self._called)]
        if len(missing) == len(self._blocks):
            raise ValueError(
                f"stages names {_listed(missing)}, but the model's forward did not call any of them through its "
                f"parent module, so that none can be dropped. {NAME_STAGES}"
            )
        if missing:
            raise ValueError(
                f"the model's forward called {len(self._blocks) - len(missing)} of its {len(self._blocks)} blocks, but "
                f"not {_listed(missing)}: it skips blocks by itself, or they stand in a branch that did not run. "
                f"{self.advice}"
            )


def _listed(paths: Sequence[str]) -> str:
    shown = [*map(repr, paths[:12]), *(["..."] if len(paths) > 12 else [])]
    return ", ".join(shown) or "none"
