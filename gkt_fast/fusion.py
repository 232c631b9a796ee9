"""Where models pickled by gkt_fast 0.1 look for their fused blocks; they are in `gkt_fast.batch_norm.fusion` now."""

from __future__ import annotations

from .batch_norm import fusion


def __getattr__(name: str) -> type:
    return getattr(fusion, name)
