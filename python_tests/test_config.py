"""GKTConfig: what it rejects and how, and its way to and from plain values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import yaml

from gkt_fast import GKTConfig

NUMBERS = (
    "decay", "ema", "temperature", "ce_weight", "kd_weight", "subnet_ce_weight", "drop_rate", "subnet_share",
    "label_smoothing",
)  # fmt: skip
BOOLEANS = ("normalize_logits", "train_full", "distill_ignored", "fuse_blocks", "independent_noise")

WRONG_VALUES = [
    ("groups", -1, "at least 0"),
    ("loops", 0, "at least 1"),
    ("decay", 0.0, r"in \(0, 1\]"),
    ("decay", 1.5, r"in \(0, 1\]"),
    ("min_depth", -1, "at least 0"),
    ("min_depth", (1, -2), "at least 0"),
    ("ema", -0.1, r"in \[0, 1\]"),
    ("ema", 1.1, r"in \[0, 1\]"),
    ("temperature", 0.0, r"in \(0, inf\)"),
    ("temperature", math.inf, r"in \(0, inf\)"),
    ("ce_weight", -1.0, r"in \[0, inf\)"),
    ("kd_weight", -1.0, r"in \[0, inf\)"),
    ("kd_weight", math.inf, r"in \[0, inf\)"),
    ("subnet_ce_weight", -1.0, r"in \[0, inf\)"),
    ("drop_rate", 1.0, r"in \[0, 1\)"),
    ("subnet_share", 0.0, r"in \(0, 1\]"),
    ("subnet_share", 1.01, r"in \(0, 1\]"),
    ("label_smoothing", 1.5, r"in \[0, 1\]"),
    ("batch_norm", "none", "one of full, all_streams"),
    ("budget", 0.99, r"in \[1, inf\)"),
    ("budget", math.nan, "must be in"),
    ("execution", "fast", "one of auto, sequential, shared"),
    ("distillation", "tanh", "one of softmax, sigmoid"),
    ("chain", "epoch", "one of step, steps"),
    ("knowledge", "sample", "one of batch, dataset"),
    *((name, math.nan, "must be in") for name in NUMBERS),
]  # fmt: skip

WRONG_TYPES = [
    *((name, value, "an integer") for name in ("groups", "loops", "ignore_index", "seed")
      for value in (1.0, "1", None, True)),
    ("min_depth", 1.5, "an integer"),
    ("min_depth", (1, "2"), "an integer"),
    *((name, value, "a number") for name in NUMBERS for value in ("0.5", None, True)),
    *((name, value, "True or False") for name in BOOLEANS for value in (1, "yes")),
    *(("budget", value, "a number") for value in ("1.5", True)),
    *(("subnet_resolution", value, "an integer") for value in (8.0, "8", (4, 8.0), True)),
    ("sampler", 3, "a string"),
    ("sampler", ["uniform"], "a string"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, must", WRONG_VALUES)
def test_values_out_of_range(name, value, must):
    with pytest.raises(ValueError, match=rf"^{name} is .*must be.*{must.removeprefix('must be ')}"):
        GKTConfig(**{name: value})


@pytest.mark.parametrize("name, value, must", WRONG_TYPES)
def test_wrong_types(name, value, must):
    with pytest.raises(TypeError, match=rf"^{name} is .*must be {must}"):
        GKTConfig(**{name: value})


def test_every_field_is_checked():
    """A field that is added must be added here too."""
    checked = {name for name, _, _ in [*WRONG_VALUES, *WRONG_TYPES]} | {"subnets"}
    assert checked == {field.name for field in dataclasses.fields(GKTConfig)}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"sampler": "fixed"}, ValueError, "subnets is None and sampler is 'fixed'.*needs subnets"),
        ({"subnets": ((1, 1),)}, ValueError, "sampler is 'inherit_decay'.*no other takes them"),
        (
            {"sampler": "fixed", "subnets": ((1, 1),), "groups": 2, "loops": 2},
            ValueError,
            r"subnets has 1 entries; it must have groups \(2\) or loops \* groups \(4\)",
        ),
        ({"sampler": "fixed", "subnets": 3}, TypeError, "subnets is 3; it must be a sequence of depths"),
        (
            {"sampler": "fixed", "subnets": "abc"},
            TypeError,
            "subnets is 'abc'; it must be a sequence of depths",
        ),
        (
            {"sampler": "fixed", "subnets": (1, 2, 3)},
            TypeError,
            r"subnets is \(1, 2, 3\).*sequence of depths",
        ),
        ({"sampler": "fixed", "subnets": ("12", "1", "1")}, TypeError, "subnets is .*sequence of depths"),
        (
            {"sampler": "fixed", "subnets": ((1.5,),), "groups": 1},
            TypeError,
            "subnets is 1.5; it must be an integer",
        ),
        ({"sampler": "fixed", "subnets": ((-1,),), "groups": 1}, ValueError, "subnets is -1"),
    ],
)
def test_fixed_subnets(changes, error, message):
    with pytest.raises(error, match=message):
        GKTConfig(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chain": "steps", "loops": 2}, "loops is 2 with chain='steps'.*must be 1"),
        ({"knowledge": "dataset", "groups": 1}, "groups is 1 with knowledge='dataset'.*must be at least 2"),
    ],
)
def test_chains_over_steps_and_knowledge_by_sample(changes, message):
    with pytest.raises(ValueError, match=message):
        GKTConfig(**changes)


def test_streams_of_a_step():
    assert GKTConfig(groups=3, loops=2).streams == 7
    assert GKTConfig(groups=3, chain="steps").streams == 2
    assert GKTConfig(groups=0, chain="steps").streams == 1


def test_edges_of_the_ranges_are_allowed():
    GKTConfig(groups=0, decay=1.0, ema=0, drop_rate=0, label_smoothing=1, ce_weight=0, kd_weight=0, seed=-3)
    GKTConfig(ema=1.0, min_depth=0, temperature=1e-3, drop_rate=0.99)


def test_defaults():
    config = GKTConfig()
    assert (config.groups, config.loops, config.decay, config.min_depth) == (3, 1, 0.5, 1)
    assert (config.ema, config.temperature, config.normalize_logits) == (0.5, 1.0, False)
    assert (config.ce_weight, config.kd_weight, config.subnet_ce_weight) == (1.0, 1.0, 0.0)
    assert (config.sampler, config.batch_norm, config.execution) == ("inherit_decay", "full", "auto")
    assert config.streams == 4
    assert config.replace(groups=2, loops=3).streams == 7


def test_lists_become_tuples_and_configs_compare_and_hash():
    config = GKTConfig(sampler="fixed", subnets=[[3, 2], [1, 1]], groups=2, min_depth=[1, 1])
    assert config.subnets == ((3, 2), (1, 1)) and config.min_depth == (1, 1)
    assert config == GKTConfig(sampler="fixed", subnets=((3, 2), (1, 1)), groups=2, min_depth=(1, 1))
    assert len({config, config.replace(), config.replace(seed=1)}) == 2


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GKTConfig().groups = 2


@pytest.mark.parametrize(
    "config",
    [
        GKTConfig(),
        GKTConfig(groups=2, loops=2, min_depth=(1, 2, 1), temperature=3.5, normalize_logits=True, seed=9),
        GKTConfig(
            sampler="fixed", subnets=((3, 3), (1, 2)), groups=2, batch_norm="all_streams", ignore_index=255
        ),
    ],
)
def test_round_trip(config, tmp_path):
    values = config.to_dict()
    assert set(values) == {field.name for field in dataclasses.fields(config)}
    assert GKTConfig.from_dict(values) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert GKTConfig.from_yaml(path) == config


def test_a_file_with_some_of_the_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("groups: 2\nmin_depth: [1, 2]\n")
    assert GKTConfig.from_yaml(path) == GKTConfig(groups=2, min_depth=(1, 2))
    path.write_text("")
    assert GKTConfig.from_yaml(str(path)) == GKTConfig()


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n- 2\n", "holds list; it must be a mapping"),
        ("group: 2\n", r"unknown keys \['group'\]; known are .*'groups'"),
        ("1: 2\n", r"unknown keys \[1\]"),
        ("1: 2\ngroup: 3\n", "unknown keys"),
    ],
)
def test_files_that_are_wrong(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        GKTConfig.from_yaml(path)


@pytest.mark.parametrize(
    "share, batch, rows",
    [
        (1.0, 7, 7),
        (0.5, 7, 4),
        (0.5, 8, 4),
        (0.25, 9, 3),
        (0.01, 64, 2),
        (0.5, 2, 2),
        (0.5, 1, 1),
        (0.07, 100, 7),
    ],
)
def test_rows_of_subnets(share, batch, rows):
    assert GKTConfig(subnet_share=share).subnet_rows(batch) == rows


def test_a_share_needs_the_full_network():
    with pytest.raises(ValueError, match=r"^subnet_share is 0\.5 with train_full=False.*must be 1"):
        GKTConfig(groups=1, train_full=False, subnet_share=0.5)


def test_configurations_of_older_versions_have_no_share(tmp_path):
    values = GKTConfig(groups=2).to_dict()
    del values["subnet_share"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert GKTConfig.from_yaml(path) == GKTConfig(groups=2)
    pickled = GKTConfig.__new__(GKTConfig)
    pickled.__setstate__(values)
    assert pickled.subnet_share == 1.0
