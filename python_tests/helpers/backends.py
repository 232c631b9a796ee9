"""Runs an op's tests on every backend. What can't run here is skipped with the reason, or fails where GKT_REQUIRE
(a comma list of backends) names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gkt_fast.ops import registry


@contextmanager
def running_on(op: str, backend: str, device: str = "cpu") -> Iterator[None]:
    """Runs `op` on `backend` inside the block; every dtype that the backend lists must be usable."""
    implementation = registry.find(op, backend)
    try:
        with registry.use_backend(backend):
            registry.select(op, device, implementation.dtypes[0])
    except registry.BackendError as error:
        unavailable(backend, str(error))
    with registry.use_backend(backend):
        yield


def unavailable(backend: str, reason: str) -> None:
    """Skips the test, or fails it where GKT_REQUIRE names the backend."""
    if backend in os.environ.get("GKT_REQUIRE", "").split(","):
        pytest.fail(f"GKT_REQUIRE names {backend}: {reason}")
    pytest.skip(reason)
