"""Runs an op's tests on every backend. What can't run here is skipped with the reason, or fails where GKT_REQUIRE
(a comma list of backends) names it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from gkt_fast.ops import registry
from helpers.triton_interpreter import patch_the_language_once_per_launch


@contextmanager
def running_on(op: str, backend: str, device: str = "cpu") -> Iterator[None]:
    """Runs `op` on `backend` inside the block; every dtype that the backend lists must be usable."""
    implementation = registry.find(op, backend)
    try:
        with registry.use_backend(backend):
            registry.select(op, device, implementation.dtypes[0])
    except registry.BackendError as error:
        unavailable(backend, str(error))
    if backend == "triton" and not torch.cuda.is_available():
        patch_the_language_once_per_launch()
    with registry.use_backend(backend):
        yield


def combinations(backend: str, turning: Sequence, *axes: Sequence) -> list[tuple]:
    """Rows (backend, one of `turning`, one of each of `axes`): all of them.

    With Triton, whose interpreter is slow, enough of them: every combination of `axes` is there, and every one of
    `turning` meets every value of each axis.
    """
    rows = list(itertools.product(turning, *axes))
    if backend == "triton":
        rows = _covering(rows)
    return [(backend, *row) for row in rows]


def _covering(rows: list[tuple]) -> list[tuple]:
    """The rows that are left when each next one is that which meets most of what isn't met yet."""

    def meets(row: tuple) -> set:
        first, *others = map(repr, row)
        return {tuple(others), *((first, i, value) for i, value in enumerate(others))}

    missing, chosen = set().union(*map(meets, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(meets(row) & missing)))
        missing -= meets(chosen[-1])
    return chosen


def unavailable(backend: str, reason: str) -> None:
    """Skips the test, or fails it where GKT_REQUIRE names the backend."""
    if backend in os.environ.get("GKT_REQUIRE", "").split(","):
        pytest.fail(f"GKT_REQUIRE names {backend}: {reason}")
    pytest.skip(reason)
