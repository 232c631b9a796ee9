"""The plan: states and costs against counting by brute force; and that planning needs no torch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import gkt_fast
from gkt_fast import GKTConfig, Stage, Subnet
from gkt_fast.subnets.plan import Cost, Layer, make_plan
from gkt_fast.subnets.sampling import sample_subnets


def network(depths=(3, 2, 3), seed=0):
    """Layers of a net with a stem, transitions and a head, at random costs; and its stages."""
    draw = random.Random(seed)
    layers, stages = [Layer("stem", False, draw.randint(1, 99))], []
    for i, depth in enumerate(depths):
        paths = tuple(f"stage{i}.{j}" for j in range(depth))
        layers += [Layer(path, True, draw.randint(1, 99)) for path in paths]
        layers.append(Layer(f"transition{i}", False, draw.randint(1, 99)))
        stages.append(Stage(paths, (True,) * depth))
    return [*layers, Layer("head", False, draw.randint(1, 99))], stages


def brute_force(layers, dropped):
    """All distinct sequences of executed layers, as tuples of indices."""
    runs = [tuple(i for i, layer in enumerate(layers) if layer.path not in paths) for paths in dropped]
    return runs, {run[:end] for run in runs for end in range(1, len(run) + 1)}


def random_drops(stages, streams, seed):
    draw = random.Random(seed)
    blocks = [path for stage in stages for path in stage.blocks]
    return [
        frozenset(),
        *(frozenset(b for b in blocks if draw.random() < 0.3) for _ in range(streams - 1)),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_states_and_costs(seed):
    layers, stages = network(seed=seed)
    if seed % 2:
        dropped = random_drops(stages, 6, seed)
    else:
        config = GKTConfig(groups=2, loops=2, seed=seed)
        subnets = sample_subnets(stages, config, 0)
        dropped = [frozenset(), *(subnet.dropped(stages) for subnet in subnets)]
    plan = make_plan(layers, dropped)
    runs, states = brute_force(layers, dropped)

    assert len(plan.parents) == len(plan.layer_of) == 1 + len(states)
    assert plan.states_per_layer() == tuple(
        sum(state[-1] == index for state in states) for index in range(len(layers))
    )
    cost = plan.cost()
    assert cost.plain == sum(layer.flops for layer in layers)
    assert cost.sequential == sum(layers[i].flops for run in runs for i in run)
    assert cost.shared == sum(layers[state[-1]].flops for state in states)
    for path, run in zip(plan.paths, runs, strict=True):
        assert tuple(plan.layer_of[state] for state in path) == run
        assert [plan.parents[state] for state in path] == [0, *path[:-1]]
    assert all(parent < state for state, parent in enumerate(plan.parents))


@pytest.mark.parametrize("seed", range(6))
def test_states_of_subnets_alone_cost_their_share(seed):
    layers, stages = network(seed=seed)
    dropped = random_drops(stages, 5, seed)
    cost = make_plan(layers, dropped, share=0.25).cost()
    runs, states = brute_force(layers, dropped)
    full = {runs[0][:end] for end in range(1, len(layers) + 1)}

    def of(states):
        return sum(layers[state[-1]].flops * (1 if state in full else 0.25) for state in states)

    assert cost.plain == sum(layer.flops for layer in layers)
    assert cost.shared == pytest.approx(of(states), abs=0.5)
    streams = [of(run[:end] for end in range(1, len(run) + 1)) for run in runs]
    assert cost.sequential == pytest.approx(sum(streams), abs=0.5 * len(streams))


def test_a_plain_step_has_one_state_per_layer():
    layers, _ = network()
    plan = make_plan(layers, [frozenset()])
    assert plan.states_per_layer() == (1,) * len(layers)
    assert plan.cost().shared_ratio == plan.cost().sequential_ratio == 1.0


def test_equal_streams_share_everything():
    layers, _ = network()
    plan = make_plan(layers, [frozenset()] * 3)
    assert plan.cost().shared == plan.cost().plain and plan.cost().sequential_ratio == 3.0


def test_subnets_that_leave_in_the_last_stage_cost_only_what_follows():
    layers, stages = network(depths=(2, 4))
    small = Subnet.ordered((2, 1), stages).dropped(stages)
    cost = make_plan(layers, [frozenset(), small]).cost()
    assert cost.shared - cost.plain == layers[-1].flops + layers[-2].flops


def test_a_layer_called_twice_is_two_states():
    layers = [Layer("relu", False, 1), Layer("block", True, 10), Layer("relu", False, 1)]
    plan = make_plan(layers, [frozenset(), frozenset(["block"])])
    assert plan.states_per_layer() == (1, 1, 2)
    assert plan.cost() == Cost(plain=12, sequential=14, shared=13)


@pytest.mark.parametrize(
    "depths, shared, one_by_one", [((3, 4, 6, 3), 2.00, 3.15), ((9, 9, 9), 1.97, 3.36), ((12,), 1.0, 3.50)]
)
def test_expected_costs_by_block_counts(depths, shared, one_by_one):
    """The means over many draws for three groups, of blocks that cost the same: to a few per cent."""
    stages = [
        Stage(tuple(f"{i}.{j}" for j in range(depth)), (len(depths) == 1,) + (True,) * (depth - 1))
        for i, depth in enumerate(depths)
    ]
    layers = [Layer(path, True, 1) for stage in stages for path in stage.blocks]
    config = GKTConfig(groups=3)
    costs = []
    for step in range(2000):
        subnets = sample_subnets(stages, config, step)
        costs.append(make_plan(layers, [frozenset(), *(s.dropped(stages) for s in subnets)]).cost())
    assert sum(cost.shared_ratio for cost in costs) / len(costs) == pytest.approx(shared, rel=0.02)
    assert sum(cost.sequential_ratio for cost in costs) / len(costs) == pytest.approx(one_by_one, rel=0.02)


BLOCK_TORCH = """
import importlib.util, sys, types

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, NoTorch())
package = types.ModuleType("gkt_fast")
package.__path__ = [sys.argv[1]]
sys.modules["gkt_fast"] = package
from gkt_fast.config import GKTConfig
from gkt_fast.subnets.plan import Layer, make_plan
from gkt_fast.subnets.sampling import sample_subnets
from gkt_fast.subnets.subnet import Stage
stage = Stage(("a", "b", "c"), (True, True, True))
subnets = sample_subnets([stage], GKTConfig(groups=2), step=4)
plan = make_plan([Layer(p, True, 1) for p in "abc"], [frozenset(), *(s.dropped([stage]) for s in subnets)])
assert plan.cost().plain == 3 and "torch" not in sys.modules
print(*subnets)
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_planning_needs_no_torch_and_draws_the_same_subnets_in_every_process(hash_seed):
    """In a process where torch can't be imported; the package's own __init__, which needs it, is left out."""
    folder = Path(gkt_fast.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH, str(folder)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    stage = Stage(("a", "b", "c"), (True, True, True))
    assert run.stdout.split() == [str(s) for s in sample_subnets([stage], GKTConfig(groups=2), step=4)]
