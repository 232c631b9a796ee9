"""What a shared step costs on average, and the smallest depths that keep it within a budget.

With ordered nested subnets and one loop the expectation is exact. Two neighbours in the chain full, group 1, ..., group
G run a layer in the same state unless their depths differ in an earlier stage, and stages are drawn independently, so

    E[states of block j in stage t] = 1 + sum_g P(some earlier stage of g - 1 and g differs) * P(depth of g in t > j).

With chain="steps" a step runs the full network and one of the G subnets: the mean over g, with the full network in the
place of g - 1. What exceeds the full network's pass is done on a share of the batch (`subnet_share`).

Other cases are estimated from seeded draws.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..config import GKTConfig
from .plan import Cost, Layer, make_plan
from .sampling import depth_probabilities, minimum_depths, sample_subnets
from .subnet import Stage

__all__ = ["expected_cost", "expected_sequential_cost", "solve_min_depth"]

ACCURACY = 0.005
"""Relative standard error of an estimate from draws."""


class _StageCost(NamedTuple):
    """For a stage with a given smallest depth, one entry per group: how likely its depth equals that of the network it
    shares states with (the group's before, or with chain="steps" the full network's), and the expected cost of its
    blocks where it does not share its state."""

    equal: list[float]
    blocks: list[float]


def expected_cost(stages: Sequence[Stage], layers: Sequence[Layer], config: GKTConfig) -> float:
    """Expected cost of a shared step, in plain steps.

    Args:
        stages: the model's stages.
        layers: its layers with their costs (`GKT.layers`).
        config: sampler, groups, loops, decay, min_depth and subnet_share.
    """
    if config.train_full and config.loops == 1 and config.sampler in ("inherit_decay", "uniform"):
        gaps = _gaps(stages, layers)
        if gaps is not None:
            table = _stage_costs(stages, layers, config)
            plain = sum(layer.flops for layer in layers)
            return _exact(minimum_depths(stages, config), table, gaps, plain, config)
    return _estimated(stages, layers, config)


def expected_sequential_cost(stages: Sequence[Stage], layers: Sequence[Layer], config: GKTConfig) -> float:
    """Expected cost of a step whose streams run one by one, in plain steps.

    Args:
        stages: the model's stages.
        layers: its layers with their costs (`GKT.layers`).
        config: sampler, groups, loops, decay, min_depth and subnet_share.
    """
    whole = config.train_full and config.subnet_share == 1
    if not whole or config.sampler not in ("inherit_decay", "uniform"):
        return _estimated(stages, layers, config, lambda cost: cost.sequential_ratio)
    table = _stage_costs(stages, layers, config)
    chosen = [stage[depth] for stage, depth in zip(table, minimum_depths(stages, config), strict=True)]
    plain = sum(layer.flops for layer in layers)
    between = sum(layer.flops for layer in layers if not layer.is_block)
    subnets = sum(between + sum(stage.blocks[group] for stage in chosen) for group in range(config.groups))
    return (plain + config.loops * subnets * _part_of_chain(config)) / plain


def solve_min_depth(stages: Sequence[Stage], layers: Sequence[Layer], config: GKTConfig) -> tuple[int, ...]:
    """The smallest depths, not below `min_depth`, that keep the expected cost within `config.budget`.

    Of all that do, those that allow the most subnets; of several, the one whose cost is nearest to the budget. Costs
    are rounded to three decimals: subnets that share all blocks but the last stage's keep a budget of 1, though each
    has a classifier of its own.

    Raises:
        ValueError: the budget can't be met with any subnet; names the least possible one. Or the sampler has no depths.
    """
    if config.sampler not in ("inherit_decay", "uniform"):
        raise ValueError(
            f"budget is {config.budget} with sampler {config.sampler!r}; it needs inherit_decay or uniform"
        )
    budget = float(config.budget or math.inf)
    lowest = minimum_depths(stages, config)
    candidates = list(
        itertools.product(*(range(m, s.depth + 1) for m, s in zip(lowest, stages, strict=True)))
    )
    one_loop = config.replace(loops=1, budget=None)
    gaps = _gaps(stages, layers)
    table = _stage_costs(stages, layers, one_loop)
    plain = sum(layer.flops for layer in layers)

    def exact(depths: tuple[int, ...]) -> float:
        if gaps is None:
            return _estimated(stages, layers, one_loop.replace(min_depth=depths))
        return _exact(depths, table, gaps, plain, config)

    def cost(depths: tuple[int, ...], one: float) -> float:
        return (
            one
            if config.loops == 1
            else expected_cost(stages, layers, config.replace(min_depth=depths, budget=None))
        )

    least, cheapest = math.inf, lowest
    fitting: list[tuple[float, tuple[int, ...]]] = []
    by_variety = sorted(candidates, key=lambda depths: -_variety(depths, stages))
    for variety, group in itertools.groupby(by_variety, key=lambda depths: _variety(depths, stages)):
        if variety == 1 or fitting:
            break
        for depths in group:
            one = exact(depths)
            if one < least:
                least, cheapest = one, depths
            if round(one, 3) <= budget:
                value = cost(depths, one)
                if round(value, 3) <= budget:
                    fitting.append((value, depths))
    if not fitting:
        raise ValueError(
            f"budget is {config.budget}; the least possible for this model, {config.groups} groups and "
            f"{config.loops} loops is {cost(cheapest, least):.4g} plain steps"
        )
    return max(fitting)[1]


def _variety(depths: Sequence[int], stages: Sequence[Stage]) -> int:
    """Number of subnets with at least these depths."""
    return math.prod(stage.depth - depth + 1 for depth, stage in zip(depths, stages, strict=True))


def _gaps(stages: Sequence[Stage], layers: Sequence[Layer]) -> list[int] | None:
    """Cost of the layers before the first stage, before the second, ..., and behind the last.

    None when layers lie between the blocks of one stage, the stages don't run in their order, or states differ by the
    random numbers drawn.
    """
    if any(layer.draws_noise for layer in layers):
        return None
    order = [path for stage in stages for path in stage.blocks]
    if [layer.path for layer in layers if layer.is_block] != order:
        return None
    first_of = {stage.blocks[0]: i for i, stage in enumerate(stages)}
    gaps = [0] * (len(stages) + 1)
    stage, remaining = 0, 0
    for layer in layers:
        if layer.is_block:
            if layer.path in first_of:
                stage = first_of[layer.path] + 1
                remaining = stages[stage - 1].depth
            remaining -= 1
        elif remaining:
            return None
        else:
            gaps[stage] += layer.flops
    return gaps


def _stage_costs(
    stages: Sequence[Stage], layers: Sequence[Layer], config: GKTConfig
) -> list[dict[int, _StageCost]]:
    """For every stage and smallest depth."""
    flops = {layer.path: layer.flops for layer in layers}
    decay = 1.0 if config.sampler == "uniform" else config.decay
    table = []
    for stage in stages:
        costs = [flops.get(path, 0) for path in stage.blocks]
        of_depth = list(itertools.accumulate(costs, initial=0))
        table.append(
            {
                least: _stage_cost(stage.depth, least, decay, of_depth, config)
                for least in range(stage.least_depth, stage.depth + 1)
            }
        )
    return table


def _part_of_chain(config: GKTConfig) -> float:
    """How many of a chain's subnets a step runs."""
    return config.step_groups / max(config.groups, 1)


def _stage_cost(
    depth: int, least: int, decay: float, of_depth: Sequence[int], config: GKTConfig
) -> _StageCost:
    """Follows the distribution of the depth down the chain of groups."""
    step = {d: depth_probabilities(d, least, decay) for d in range(least, depth + 1)}
    distribution = {depth: 1.0}
    equal, blocks = [], []
    for group in range(config.groups):
        stays = sum(p * step[d][-1] for d, p in distribution.items())
        equal.append(stays if config.chain == "step" else step[depth][-1] ** (group + 1))
        following = dict.fromkeys(range(least, depth + 1), 0.0)
        for d, p in distribution.items():
            for offset, q in enumerate(step[d]):
                following[least + offset] += p * q
        distribution = following
        blocks.append(sum(p * of_depth[d] for d, p in distribution.items()))
    return _StageCost(equal, blocks)


def _exact(
    depths: Sequence[int],
    table: Sequence[dict[int, _StageCost]],
    gaps: Sequence[int],
    plain: int,
    config: GKTConfig,
) -> float:
    chosen = [stage[depth] for stage, depth in zip(table, depths, strict=True)]
    subnets = 0.0
    for group in range(config.groups):
        same = 1.0
        for stage, gap in zip(chosen, gaps[1:], strict=True):
            subnets += (1.0 - same) * stage.blocks[group]
            same *= stage.equal[group]
            subnets += (1.0 - same) * gap
    return 1.0 + config.subnet_share * _part_of_chain(config) * subnets / plain


def _estimated(
    stages: Sequence[Stage],
    layers: Sequence[Layer],
    config: GKTConfig,
    ratio: Callable[[Cost], float] = lambda cost: cost.shared_ratio,
) -> float:
    """Mean over draws, until its standard error is within `ACCURACY`."""
    ratios: list[float] = []
    while True:
        for step in range(len(ratios), len(ratios) + 500):
            subnets = sample_subnets(stages, config, step)
            dropped = [subnet.dropped(stages) for subnet in subnets]
            if config.train_full:
                dropped.insert(0, frozenset())
            ratios.append(ratio(make_plan(layers, dropped, config.subnet_share).cost()))
        mean = statistics.fmean(ratios)
        if statistics.stdev(ratios) <= ACCURACY * mean * math.sqrt(len(ratios)):
            return mean
