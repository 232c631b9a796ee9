"""The expected cost of a step, and the depths that keep it within a budget."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from gkt_fast import GKT, GKTConfig, Stage
from gkt_fast.models import cifar_resnet
from gkt_fast.subnets.budget import expected_cost, expected_sequential_cost, solve_min_depth
from gkt_fast.subnets.plan import Layer, make_plan
from gkt_fast.subnets.sampling import sample_subnets

STAGES = [
    Stage(tuple(f"a.{i}" for i in range(3)), (False, True, True)),
    Stage(tuple(f"b.{i}" for i in range(4)), (False, True, True, True)),
    Stage(tuple(f"c.{i}" for i in range(5)), (True,) * 5),
]
LAYERS = [
    Layer("stem", False, 50),
    *(Layer(path, True, 10 + i) for i, path in enumerate(STAGES[0].blocks)),
    Layer("middle", False, 7),
    *(Layer(path, True, 20 + i) for i, path in enumerate(STAGES[1].blocks)),
    *(Layer(path, True, 9 + i) for i, path in enumerate(STAGES[2].blocks)),
    Layer("head", False, 5),
]


def drawn_cost(config: GKTConfig, draws: int, seed: int = 1234, one_by_one: bool = False) -> float:
    """Mean over draws that the estimate has not seen."""
    config = config.replace(seed=seed)
    ratios = []
    for step in range(draws):
        dropped = [frozenset(), *(s.dropped(STAGES) for s in sample_subnets(STAGES, config, step))]
        cost = make_plan(LAYERS, dropped, config.subnet_share).cost()
        ratios.append(cost.sequential_ratio if one_by_one else cost.shared_ratio)
    return statistics.fmean(ratios)


@pytest.mark.parametrize("sampler", ["inherit_decay", "uniform"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("min_depth, share", [(1, 1.0), ((2, 1, 3), 1.0), ((3, 4, 0), 1.0), (1, 0.5)])
def test_exact_expectation_against_independent_draws(sampler, groups, min_depth, share):
    config = GKTConfig(groups=groups, sampler=sampler, min_depth=min_depth, decay=0.6, subnet_share=share)
    assert expected_cost(STAGES, LAYERS, config) == pytest.approx(drawn_cost(config, 6000), rel=0.01)


@pytest.mark.parametrize("sampler", ["inherit_decay", "uniform"])
@pytest.mark.parametrize("groups", [1, 3])
def test_expectation_of_chains_over_steps_against_independent_draws(sampler, groups):
    config = GKTConfig(groups=groups, sampler=sampler, min_depth=(2, 1, 3), decay=0.6, chain="steps")
    assert expected_cost(STAGES, LAYERS, config) == pytest.approx(drawn_cost(config, 6000), rel=0.01)
    whole = expected_cost(STAGES, LAYERS, config.replace(chain="step"))
    assert (expected_cost(STAGES, LAYERS, config) == pytest.approx(whole)) == (groups == 1)
    depths = solve_min_depth(STAGES, LAYERS, config.replace(budget=1.25))
    kept = config.replace(min_depth=depths)
    assert drawn_cost(kept, 3000) <= 1.25 * 1.01


@pytest.mark.parametrize(
    "config",
    [
        GKTConfig(groups=3, chain="steps", decay=0.6),
        GKTConfig(groups=3, min_depth=(2, 1, 3), decay=0.6),
        GKTConfig(groups=2, loops=2, sampler="uniform"),
        GKTConfig(groups=1, loops=2, sampler="stochastic_depth"),
        GKTConfig(groups=3, subnet_share=0.3),
    ],
)
def test_expectation_one_by_one_against_independent_draws(config):
    expected = expected_sequential_cost(STAGES, LAYERS, config)
    assert expected == pytest.approx(drawn_cost(config, 2000, one_by_one=True), rel=0.01)


def test_expectation_by_hand():
    """One droppable block of cost 4 behind a stem of cost 6, one group, probability 1/3 of dropping it: only the
    head of cost 2 runs twice, when the block is dropped."""
    stages = [Stage(("block",), (True,))]
    layers = [Layer("stem", False, 6), Layer("block", True, 4), Layer("head", False, 2)]
    config = GKTConfig(groups=1, min_depth=0, decay=0.5)
    assert expected_cost(stages, layers, config) == pytest.approx((12 + 2 / 3) / 12)


@pytest.mark.parametrize(
    "config",
    [
        GKTConfig(loops=2),
        GKTConfig(sampler="stochastic_depth"),
        GKTConfig(loops=3, groups=1, sampler="uniform"),
        GKTConfig(chain="steps", sampler="stochastic_depth"),
    ],
)
def test_estimated_expectation_against_independent_draws(config):
    assert expected_cost(STAGES, LAYERS, config) == pytest.approx(drawn_cost(config, 4000), rel=0.02)


def test_layers_between_the_blocks_of_a_stage_are_estimated():
    layers = [*LAYERS[:2], Layer("inside", False, 30), *LAYERS[2:]]
    exact = expected_cost(STAGES, LAYERS, GKTConfig())
    assert expected_cost(STAGES, layers, GKTConfig()) != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("budget", [1.05, 1.25, 1.5, 2.0])
def test_budget_is_kept_by_the_most_varied_subnets(budget, loops):
    config = GKTConfig(budget=budget, loops=loops)
    depths = solve_min_depth(STAGES, LAYERS, config)
    kept = config.replace(budget=None, min_depth=depths)
    assert drawn_cost(kept, 3000) <= budget * 1.01
    if loops == 1:
        for stage, depth in enumerate(depths):  # one block less anywhere costs too much, or wasn't allowed
            if depth > max(1, STAGES[stage].least_depth):
                less = tuple(d - (i == stage) for i, d in enumerate(depths))
                assert expected_cost(STAGES, LAYERS, kept.replace(min_depth=less)) > budget


@pytest.mark.parametrize("loops", [1, 2])
def test_a_share_leaves_more_depths_within_a_budget(loops):
    config = GKTConfig(groups=3, loops=loops, budget=1.4)
    depths = solve_min_depth(STAGES, LAYERS, config.replace(subnet_share=0.5))

    def variety(depths):
        return math.prod(stage.depth - depth + 1 for stage, depth in zip(STAGES, depths, strict=True))

    assert variety(depths) > variety(solve_min_depth(STAGES, LAYERS, config))
    kept = config.replace(min_depth=depths, budget=None, subnet_share=0.5)
    assert drawn_cost(kept, 3000) <= 1.4 * 1.01


def test_a_loose_budget_changes_nothing():
    assert solve_min_depth(STAGES, LAYERS, GKTConfig(budget=50.0)) == (1, 1, 1)
    assert solve_min_depth(STAGES, LAYERS, GKTConfig(budget=50.0, min_depth=(2, 1, 3))) == (2, 1, 3)


def test_an_impossible_budget_names_the_least_possible_one():
    with pytest.raises(
        ValueError, match=r"budget is 1\.001; the least possible for this model, 3 groups"
    ) as error:
        solve_min_depth(STAGES, LAYERS, GKTConfig(budget=1.001))
    least = float(str(error.value).split(" is ")[-1].split()[0])
    depths = solve_min_depth(STAGES, LAYERS, GKTConfig(budget=least * 1.001))
    assert expected_cost(STAGES, LAYERS, GKTConfig(min_depth=depths)) == pytest.approx(least, rel=1e-3)


def test_a_budget_of_one_shares_all_stages_but_the_last_whatever_the_classifiers_cost():
    layers = [*LAYERS[:-1], Layer("classifier", False, 0.0001 * sum(layer.flops for layer in LAYERS))]
    assert solve_min_depth(STAGES, layers, GKTConfig(budget=1.0)) == (3, 4, 1)


def test_a_budget_needs_ordered_depths_and_a_number_of_at_least_one():
    with pytest.raises(ValueError, match="sampler 'stochastic_depth'; it needs inherit_decay or uniform"):
        solve_min_depth(STAGES, LAYERS, GKTConfig(budget=1.2, sampler="stochastic_depth"))
    with pytest.raises(ValueError, match=r"budget is 0\.9; it must be in \[1, inf\)"):
        GKTConfig(budget=0.9)


def test_gkt_draws_within_the_budget_and_saves_what_it_solved():
    gkt = GKT(cifar_resnet(20, width=4), GKTConfig(budget=1.2))
    with pytest.raises(ValueError, match="the model has not been called yet"):
        gkt.sample(0)
    gkt(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))).loss.backward()
    assert gkt.expected_cost() <= 1.2
    costs = [gkt.cost(gkt.sample(step)).shared_ratio for step in range(400)]
    assert statistics.fmean(costs) <= 1.2 * 1.02
    again = GKT(cifar_resnet(20, width=4), GKTConfig(budget=1.2))
    again.load_state_dict(gkt.state_dict())
    assert again.sample(7) == gkt.sample(7)
