"""Which subnets are looked at where nobody named any. No torch here."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from ..config import GKTConfig
from ..subnets.sampling import minimum_depths
from ..subnets.subnet import Stage, Subnet

__all__ = ["choose_subnets", "nested_subnets"]


def choose_subnets(
    stages: Sequence[Stage], min_depth: int | Sequence[int] = 1, max_subnets: int = 64, seed: int = 0
) -> list[Subnet]:
    """Subnets that show what a network can do: all ordered ones if they are no more than `max_subnets`.

    Otherwise: the full network; a nested chain from it to the smallest subnet, each with one block less than the one
    before, taken from the stage that has kept the largest share of its blocks (every n-th link, where the chain alone
    is longer than `max_subnets`); and for the rest ordered subnets drawn at random, all alike.

    Args:
        stages: the network's stages.
        min_depth: smallest depth of a stage, as in `GKTConfig`; subnets below what was trained do badly.
        max_subnets: how many at most.
        seed: of the random ones.

    Returns:
        Distinct subnets, those with more blocks first.

    Raises:
        ValueError: max_subnets is not positive, or min_depth doesn't fit the stages.
    """
    if max_subnets < 1:
        raise ValueError(f"max_subnets is {max_subnets}; it must be at least 1")
    choices = _choices(stages, min_depth)
    total = math.prod(map(len, choices))
    if total <= max_subnets:
        chosen = set(itertools.product(*choices))
    else:
        chosen = set(_thinned(_chain(choices), max_subnets))
        for index in random.Random(seed).sample(range(total), max_subnets):
            if len(chosen) == max_subnets:
                break
            chosen.add(_decode(index, choices))
    ordered = sorted(chosen, key=lambda depths: (sum(depths), depths), reverse=True)
    return [Subnet.ordered(depths, stages) for depths in ordered]


def nested_subnets(
    stages: Sequence[Stage], min_depth: int | Sequence[int] = 1, max_subnets: int = 5
) -> list[Subnet]:
    """Subnets of which each holds the one before, from the smallest to the full network, at about even distances.

    Args:
        stages: the network's stages.
        min_depth: smallest depth of a stage, as in `GKTConfig`.
        max_subnets: how many at most.

    Raises:
        ValueError: max_subnets is not positive, or min_depth doesn't fit the stages.
    """
    if max_subnets < 1:
        raise ValueError(f"max_subnets is {max_subnets}; it must be at least 1")
    chain = _thinned(_chain(_choices(stages, min_depth)), max_subnets)
    return [Subnet.ordered(depths, stages) for depths in reversed(chain)]


def _choices(stages: Sequence[Stage], min_depth: int | Sequence[int]) -> list[range]:
    """The depths that each stage may have."""
    min_depth = min_depth if isinstance(min_depth, int) else tuple(min_depth)
    least = minimum_depths(stages, GKTConfig(min_depth=min_depth))
    return [range(m, stage.depth + 1) for m, stage in zip(least, stages, strict=True)]


def _thinned(chain: list[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    """Every n-th link, where the chain is longer; its ends are kept."""
    step = (len(chain) - 1) / max(length - 1, 1)
    return chain if step <= 1 else [chain[round(i * step)] for i in range(length)]


def _chain(choices: Sequence[range]) -> list[tuple[int, ...]]:
    """From the deepest to the shallowest depths, one block less at a time; of equal stages the last gives first."""
    depths = [choice[-1] for choice in choices]
    chain = [tuple(depths)]
    while True:
        shares = [
            (depth / choice[-1] if depth > choice[0] else -1.0, i)
            for i, (depth, choice) in enumerate(zip(depths, choices, strict=True))
        ]
        share, stage = max(shares)
        if share < 0:
            return chain
        depths[stage] -= 1
        chain.append(tuple(depths))


def _decode(index: int, choices: Sequence[range]) -> tuple[int, ...]:
    """The index-th combination of the choices."""
    depths = []
    for choice in choices:
        index, position = divmod(index, len(choice))
        depths.append(choice[position])
    return tuple(depths)
