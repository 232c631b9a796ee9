"""Draws the subnets of a step, nested within each other (Tang et al., AAAI-24: subnet-in-subnet).

Every draw is a function of (seed, step) alone, so that all processes of a distributed run and a resumed run agree.
The decay of `inherit_decay` is reconstructed: the paper describes an inheriting exponential decay that prefers
larger subnets, not its coefficients.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from typing import Protocol

from ..config import GKTConfig
from .subnet import Stage, Subnet

__all__ = [
    "SAMPLERS",
    "Sampler",
    "check_sampling",
    "depth_probabilities",
    "minimum_depths",
    "sample_resolutions",
    "sample_subnets",
    "survival_probabilities",
]


class Sampler(Protocol):
    """Draws a subnet of a subnet."""

    def __call__(
        self, parent: Subnet, stages: Sequence[Stage], config: GKTConfig, index: int, draw: random.Random
    ) -> Subnet:
        """One subnet within `parent`; `index` is the place of its stream, 0 for the first subnet of the step."""


def sample_subnets(stages: Sequence[Stage], config: GKTConfig, step: int) -> list[Subnet]:
    """The loops * groups subnets of a step, in the order of their streams; with chain="steps" a single one.

    Each loop starts at the full network; each group's subnet lies within that of the group before. The sampler
    `uniform` with groups=1 and loops=K is Stimulative Training with K subnets.

    With chain="steps" step t runs the subnet of group t mod G + 1, of a chain drawn for the number t // G.

    Raises:
        ValueError: min_depth or the fixed subnets don't fit the stages, or the sampler is unknown.
        TypeError: step is not an integer.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step is {step!r}; it must be an integer")
    if config.sampler not in SAMPLERS:
        raise ValueError(f"sampler is {config.sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[config.sampler]
    over_steps = config.chain == "steps" and config.groups > 0
    number, member = divmod(step, config.groups) if over_steps else (step, 0)
    draw = random.Random(f"{config.seed}/{number}")
    full = Subnet.full(stages)
    subnets: list[Subnet] = []
    for _ in range(config.loops):
        parent = full
        for _ in range(config.groups):
            parent = sampler(parent, stages, config, len(subnets), draw)
            subnets.append(parent)
    return subnets[member : member + 1] if over_steps else subnets


def check_sampling(stages: Sequence[Stage], config: GKTConfig) -> None:
    """Checks that subnets of these stages can be drawn as the configuration asks.

    Raises:
        ValueError: min_depth or the fixed subnets don't fit the stages, or the sampler is unknown.
    """
    minimum_depths(stages, config)  # which the sampler needn't ask for
    sample_subnets(stages, config, step=0)


def sample_resolutions(config: GKTConfig, step: int) -> list[int]:
    """The height and width of each subnet's images in a step; empty where they are the full network's.

    ST++ (arXiv 2305.02507, "random smaller inputs") draws them uniformly, anew for every subnet.
    """
    if config.subnet_resolution is None:
        return []
    if isinstance(config.subnet_resolution, int):
        return [config.subnet_resolution] * (config.loops * config.step_groups)
    draw = random.Random(f"{config.seed}/{step}/resolution")
    return [draw.randint(*config.subnet_resolution) for _ in range(config.loops * config.step_groups)]


def minimum_depths(stages: Sequence[Stage], config: GKTConfig) -> tuple[int, ...]:
    """The fewest blocks of each stage: `min_depth`, but never fewer than can't be dropped.

    Raises:
        ValueError: min_depth has the wrong length or exceeds a stage that it names explicitly.
    """
    if isinstance(config.min_depth, int):
        return tuple(min(max(config.min_depth, stage.least_depth), stage.depth) for stage in stages)
    if len(config.min_depth) != len(stages):
        raise ValueError(
            f"min_depth is {config.min_depth}; it must have one entry for each of {len(stages)} stages"
        )
    for least, stage in zip(config.min_depth, stages, strict=True):
        if least > stage.depth:
            raise ValueError(f"min_depth is {config.min_depth}; a stage has only {stage.depth} blocks")
    return tuple(max(least, stage.least_depth) for least, stage in zip(config.min_depth, stages, strict=True))


def survival_probabilities(stages: Sequence[Stage], drop_rate: float) -> list[list[float]]:
    """For every block of every stage, how likely stochastic depth keeps it: 1 - drop_rate * l / L for block l of L.

    1 for a block that can't be dropped (Huang et al., ECCV 2016, equation 4: linear decay).
    """
    total = sum(stage.depth for stage in stages)
    position = itertools.count(1)
    return [
        [
            1.0 - drop_rate * l / total if droppable else 1.0
            for droppable, l in zip(stage.droppable, position, strict=False)
        ]
        for stage in stages
    ]


def depth_probabilities(parent_depth: int, least: int, decay: float) -> list[float]:
    """P(k | D) = decay^(D-k) / sum_j decay^(D-j) for k = least..D (reconstructed)."""
    weights = [decay ** (parent_depth - k) for k in range(least, parent_depth + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


@functools.lru_cache(maxsize=4096)
def _cumulated(parent_depth: int, least: int, decay: float) -> list[float]:
    """Sums of `depth_probabilities`."""
    return [*itertools.accumulate(depth_probabilities(parent_depth, least, decay))]


def _inherit_decay(
    parent: Subnet, stages: Sequence[Stage], config: GKTConfig, index: int, draw: random.Random
) -> Subnet:
    depths = []
    for depth, least in zip(parent.depths, minimum_depths(stages, config), strict=True):
        choices = range(least, depth + 1)
        depths.append(draw.choices(choices, cum_weights=_cumulated(depth, least, config.decay))[0])
    return Subnet.ordered(depths, stages)


def _uniform(
    parent: Subnet, stages: Sequence[Stage], config: GKTConfig, index: int, draw: random.Random
) -> Subnet:
    """Every depth of the parent alike (Stimulative Training, NeurIPS-22)."""
    least = minimum_depths(stages, config)
    return Subnet.ordered([draw.randint(m, d) for d, m in zip(parent.depths, least, strict=True)], stages)


def _stochastic_depth(
    parent: Subnet, stages: Sequence[Stage], config: GKTConfig, index: int, draw: random.Random
) -> Subnet:
    """Block i of n is dropped with probability drop_rate * i / n (Huang et al., ECCV 2016: linear decay)."""
    return Subnet(
        tuple(
            tuple(draw.random() < p and kept for kept, p in zip(mask, probabilities, strict=True))
            for mask, probabilities in zip(
                parent.keep, survival_probabilities(stages, config.drop_rate), strict=True
            )
        )
    )


def _fixed(
    parent: Subnet, stages: Sequence[Stage], config: GKTConfig, index: int, draw: random.Random
) -> Subnet:
    """The depths that the configuration lists; repeated in every loop when it lists one per group."""
    subnets = config.subnets or ()
    subnet = Subnet.ordered(subnets[index % len(subnets)], stages)
    if not subnet.is_within(parent):
        raise ValueError(
            f"subnets[{index % len(subnets)}] is {subnet}; it must lie within {parent}, the group before"
        )
    return subnet


SAMPLERS: dict[str, Sampler] = {
    "inherit_decay": _inherit_decay,
    "uniform": _uniform,
    "stochastic_depth": _stochastic_depth,
    "fixed": _fixed,
}
