"""Samplers: probabilities, nesting, determinism, and what they refuse."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from scipy.stats import chisquare

from gkt_fast import GKTConfig, Stage, Subnet
from gkt_fast.subnets.sampling import SAMPLERS, depth_probabilities, minimum_depths, sample_subnets

STAGES = [
    Stage(tuple(f"{i}.{j}" for j in range(depth)), (i == 0,) + (True,) * (depth - 1))
    for i, depth in enumerate((3, 4, 6, 3))
]
ONE = [Stage(tuple(map(str, range(6))), (True,) * 6)]


@pytest.mark.parametrize("decay", [0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("parent, least", [(6, 1), (3, 1), (4, 4), (5, 0)])
def test_depth_probabilities_follow_the_formula(parent, least, decay):
    probabilities = depth_probabilities(parent, least, decay)
    total = sum(decay ** (parent - j) for j in range(least, parent + 1))
    expected = [decay ** (parent - k) / total for k in range(least, parent + 1)]
    assert probabilities == pytest.approx(expected, rel=1e-14)
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities)


@pytest.mark.parametrize("decay", [0.3, 0.5, 1.0])
def test_inherit_decay_draws_by_the_formula(decay):
    """The first group from the full depth, the second from each depth that the first one took."""
    config = GKTConfig(groups=2, decay=decay, min_depth=2)
    pairs = Counter(tuple(s.depths[0] for s in sample_subnets(ONE, config, step)) for step in range(20_000))
    cells = [(first, second) for first in range(2, 7) for second in range(2, first + 1)]
    assert set(pairs) <= set(cells)
    expected = [
        20_000 * depth_probabilities(6, 2, decay)[a - 2] * depth_probabilities(a, 2, decay)[b - 2]
        for a, b in cells
    ]
    assert chisquare([pairs[cell] for cell in cells], expected).pvalue > 1e-3


def test_stages_are_drawn_independently():
    config = GKTConfig(groups=1)
    stages = [ONE[0], Stage(("a", "b", "c"), (True,) * 3)]
    pairs = Counter(sample_subnets(stages, config, step)[0].depths for step in range(20_000))
    cells = [(a, b) for a in range(1, 7) for b in range(1, 4)]
    first, second = depth_probabilities(6, 1, 0.5), depth_probabilities(3, 1, 0.5)
    expected = [20_000 * first[a - 1] * second[b - 1] for a, b in cells]
    assert chisquare([pairs[cell] for cell in cells], expected).pvalue > 1e-3


def test_uniform_draws_every_depth_alike():
    config = GKTConfig(groups=1, sampler="uniform", min_depth=2)
    counts = Counter(sample_subnets(ONE, config, step)[0].depths[0] for step in range(10_000))
    assert sorted(counts) == [2, 3, 4, 5, 6]
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_stochastic_depth_drops_by_linear_decay():
    config = GKTConfig(groups=1, sampler="stochastic_depth", drop_rate=0.6)
    draws = 10_000
    kept = [0] * 16
    for step in range(draws):
        (subnet,) = sample_subnets(STAGES, config, step)
        for i, keep in enumerate(block for stage in subnet.keep for block in stage):
            kept[i] += keep
    droppable = [block for stage in STAGES for block in stage.droppable]
    for i, (count, can_drop) in enumerate(zip(kept, droppable, strict=True)):
        survival = 1 - 0.6 * (i + 1) / 16 if can_drop else 1.0
        assert count / draws == pytest.approx(survival, abs=5 * (0.25 / draws) ** 0.5)


def test_stochastic_depth_gives_masks_that_are_not_ordered():
    config = GKTConfig(sampler="stochastic_depth")
    assert any(not s.is_ordered for step in range(20) for s in sample_subnets(STAGES, config, step))
    everything = GKTConfig(sampler="stochastic_depth", drop_rate=0.0)
    assert set(sample_subnets(STAGES, everything, 0)) == {Subnet.full(STAGES)}


@pytest.mark.parametrize("sampler", ["inherit_decay", "uniform", "stochastic_depth"])
@pytest.mark.parametrize("groups, loops", [(1, 1), (3, 2), (4, 3)])
def test_each_group_lies_within_the_one_before(groups, loops, sampler):
    config = GKTConfig(groups=groups, loops=loops, sampler=sampler)
    restarted = False
    for step in range(100):
        subnets = sample_subnets(STAGES, config, step)
        assert len(subnets) == groups * loops
        for index, subnet in enumerate(subnets):
            subnet.dropped(STAGES)
            if index % groups:
                assert subnet.is_within(subnets[index - 1])
            elif index:
                restarted |= not subnet.is_within(subnets[index - 1])
    assert restarted == (loops > 1), "a new loop starts at the full network again"


@pytest.mark.parametrize("sampler", ["inherit_decay", "uniform", "stochastic_depth"])
def test_draws_depend_on_seed_and_step_alone(sampler):
    config = GKTConfig(groups=3, loops=2, sampler=sampler, seed=7)
    forwards = [sample_subnets(STAGES, config, step) for step in range(30)]
    random.seed(1)
    backwards = [sample_subnets(STAGES, config, step) for step in reversed(range(30))][::-1]
    assert forwards == backwards
    assert len({tuple(subnets) for subnets in forwards}) > 20
    assert forwards != [sample_subnets(STAGES, config.replace(seed=8), step) for step in range(30)]


def test_draws_leave_the_global_random_state_alone():
    before = random.getstate()
    sample_subnets(STAGES, GKTConfig(), 3)
    assert random.getstate() == before


@pytest.mark.parametrize("sampler", ["inherit_decay", "uniform", "stochastic_depth", "fixed"])
def test_a_chain_over_steps_is_walked_one_subnet_a_step(sampler):
    """The G steps from a multiple of G on run what a single step of that number runs."""
    depths = ((3, 4, 5, 3), (2, 4, 3, 3), (1, 1, 3, 1))
    fixed = {"subnets": depths} if sampler == "fixed" else {}
    config = GKTConfig(groups=3, sampler=sampler, seed=5, **fixed)
    for number in range(20):
        whole = sample_subnets(STAGES, config, number)
        over_steps = config.replace(chain="steps")
        walked = [sample_subnets(STAGES, over_steps, 3 * number + member) for member in range(3)]
        assert walked == [[subnet] for subnet in whole]
    assert sample_subnets(STAGES, GKTConfig(groups=0, chain="steps"), 4) == []


def test_no_groups():
    assert sample_subnets(STAGES, GKTConfig(groups=0), 0) == []


@pytest.mark.parametrize(
    "min_depth, expected",
    [
        (0, (0, 1, 1, 1)),
        (1, (1, 1, 1, 1)),
        (3, (3, 3, 3, 3)),
        (5, (3, 4, 5, 3)),
        ((3, 0, 6, 2), (3, 1, 6, 2)),
    ],
)
def test_min_depth_forms(min_depth, expected):
    """One number holds for every stage as far as it goes; never fewer than can't be dropped."""
    config = GKTConfig(min_depth=min_depth)
    assert minimum_depths(STAGES, config) == expected
    for step in range(50):
        for subnet in sample_subnets(STAGES, config, step):
            assert all(d >= least for d, least in zip(subnet.depths, expected, strict=True))


@pytest.mark.parametrize(
    "min_depth, message",
    [
        ((1, 1), r"min_depth is \(1, 1\); it must have one entry for each of 4 stages"),
        ((1, 1, 7, 1), r"min_depth is \(1, 1, 7, 1\); a stage has only 6 blocks"),
    ],
)
def test_min_depth_that_does_not_fit(min_depth, message):
    with pytest.raises(ValueError, match=message):
        sample_subnets(STAGES, GKTConfig(min_depth=min_depth), 0)


def test_fixed_repeats_in_every_loop_or_lists_them_all():
    depths = ((3, 3, 3, 3), (1, 2, 3, 1))
    config = GKTConfig(groups=2, loops=2, sampler="fixed", subnets=depths)
    assert [s.depths for s in sample_subnets(STAGES, config, 5)] == [*depths, *depths]
    more = (*depths, (2, 2, 2, 2), (1, 1, 1, 1))
    config = config.replace(subnets=more)
    assert [s.depths for s in sample_subnets(STAGES, config, 0)] == list(more)


@pytest.mark.parametrize(
    "depths, message",
    [
        (((1, 1, 1, 1), (2, 1, 1, 1)), r"subnets\[1\] is 2-1-1-1; it must lie within 1-1-1-1"),
        (((1, 1), (1, 1)), "one entry for each of 4 stages"),
        (((9, 1, 1, 1), (1, 1, 1, 1)), "entry 0 must be between 0 and 3"),
    ],
)
def test_fixed_subnets_that_do_not_fit(depths, message):
    with pytest.raises(ValueError, match=message):
        sample_subnets(STAGES, GKTConfig(groups=2, sampler="fixed", subnets=depths), 0)


def test_unknown_sampler():
    with pytest.raises(ValueError, match="sampler is 'best'; it must be one of inherit_decay, uniform"):
        sample_subnets(STAGES, GKTConfig(sampler="best"), 0)


@pytest.mark.parametrize("step", [1.0, "1", None, True])
def test_a_step_that_is_no_integer(step):
    with pytest.raises(TypeError, match=r"step is .*; it must be an integer"):
        sample_subnets(STAGES, GKTConfig(), step)


def test_a_sampler_of_ones_own(monkeypatch):
    def halves(parent, stages, config, index, draw):
        pairs = zip(parent.depths, stages, strict=True)
        return Subnet.ordered([max(stage.least_depth, depth // 2) for depth, stage in pairs], stages)

    monkeypatch.setitem(SAMPLERS, "halves", halves)
    subnets = sample_subnets(STAGES, GKTConfig(groups=2, sampler="halves"), 0)
    assert [s.depths for s in subnets] == [(1, 2, 3, 1), (0, 1, 1, 1)]
