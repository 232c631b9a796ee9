"""Networks of torchvision, timm and transformers: blocks found without configuration, steps equal to the plain loop."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers.documents import ROOT
from helpers.reference_step import (
    Outcome,
    assert_same,
    choice_of,
    one_thread,  # noqa: F401
    package_step,
    random_drops,
    reference_step,
)
from torch import nn

from gkt_fast import GKT, GKTConfig, Stage, fuse_blocks
from gkt_fast.execution import StackingError
from gkt_fast.instruments.model_table import COMMAND, DOCUMENT, containers, row, table
from gkt_fast.instruments.tables import marked, replace_marked
from gkt_fast.instruments.zoo import CLASSES, ZOO, ZooModel
from gkt_fast.network.discovery import find_stages

CONFIG = GKTConfig(groups=2, loops=1, batch_norm="all_streams")
TOLERANCE = 1e-11
FLOOR = 1e-14
"""Gradients that vanish but for rounding, such as a bias before BatchNorm, may differ by this much."""


@functools.cache
def small(zoo_model: ZooModel) -> tuple[nn.Module, list[Stage]]:
    """The small network in float64 with weights that let no branch vanish, and its stages."""
    torch.manual_seed(0)
    model = zoo_model.build_small().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, find_stages(model)


@functools.cache
def plain_loop(zoo_model: ZooModel) -> Outcome:
    """What the plain loop makes of a step that drops some blocks."""
    model, stages = small(zoo_model)
    images, targets = batch(zoo_model)
    model = copy.deepcopy(model)
    if (
        zoo_model.library == "transformers"
    ):  # returns an object that holds the logits; the plain loop wants a tensor
        model.register_forward_hook(lambda module, inputs, output: output.logits)
    return reference_step(model, (images,), targets, drops(stages), CONFIG)


def drops(stages: list[Stage]) -> list[frozenset[str]]:
    dropped = random_drops(stages, CONFIG.streams, seed=0, rate=0.5)
    assert all(dropped[1:])
    return dropped


def batch(zoo_model):
    generator = torch.Generator().manual_seed(1)
    size = zoo_model.small_pixels
    images = torch.randn(3, 3, size, size, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (3,), generator=generator)


@pytest.mark.parametrize("zoo_model", ZOO, ids=str)
def test_stages_are_found(zoo_model):
    _, stages = small(zoo_model)
    assert (
        " ".join("".join("x" if d else "." for d in stage.droppable) for stage in stages) == zoo_model.found
    )


@pytest.mark.parametrize("zoo_model", ZOO, ids=str)
def test_blocks_that_change_shape_are_not_droppable(zoo_model):
    model, stages = small(zoo_model)
    droppable = {p: d for stage in stages for p, d in zip(stage.blocks, stage.droppable, strict=True)}
    shapes = {}

    def remember(path, inputs, output):
        shapes[path] = (inputs[0].shape, (output[0] if isinstance(output, tuple) else output).shape)

    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _, i, o, path=path: remember(path, i, o))
        for path in droppable
    ]
    with torch.no_grad():
        copy.deepcopy(model).eval()(batch(zoo_model)[0])
    for hook in hooks:
        hook.remove()
    assert shapes.keys() == droppable.keys()
    for path, (before, after) in shapes.items():
        assert not droppable[path] or before == after, path


@pytest.mark.parametrize("mode", ["shared", "stacked", "lean"])
@pytest.mark.parametrize("zoo_model", ZOO, ids=str)
def test_step_equals_the_plain_loop(zoo_model, mode):
    model, stages = small(zoo_model)
    images, targets = batch(zoo_model)
    assert choice_of("auto", model, (images,), stages).mode == "stacked"
    model = copy.deepcopy(model)
    actual = package_step(mode, model, (images,), targets, drops(stages), CONFIG, stages=stages)
    assert_same(actual, plain_loop(zoo_model), TOLERANCE, FLOOR)


FUSED = [z for z in ZOO if z.name in ("resnet18", "resnet50", "resnext50_32x4d", "resnet50d", "resnetv2_50")]


@pytest.mark.parametrize("zoo_model", FUSED, ids=str)
def test_step_with_fused_blocks_equals_the_plain_loop(zoo_model):
    model, stages = small(zoo_model)
    images, targets = batch(zoo_model)
    model = copy.deepcopy(model)
    assert fuse_blocks(model)
    actual = package_step("stacked", model, (images,), targets, drops(stages), CONFIG, stages=stages)
    assert_same(actual, plain_loop(zoo_model), TOLERANCE, FLOOR)


@functools.cache
def cached_row(zoo_model: ZooModel) -> str:
    return row(zoo_model)


@pytest.mark.parametrize("zoo_model", ZOO, ids=str)
def test_row_of_the_table(zoo_model):
    """`python bench/model_table.py --update` writes the rows anew."""
    lines = marked((ROOT / DOCUMENT).read_text(), COMMAND).splitlines()
    assert lines.count(cached_row(zoo_model)) == 1


def test_the_table_holds_no_other_rows():
    rows = [cached_row(zoo_model) for zoo_model in ZOO]
    text = (ROOT / DOCUMENT).read_text()
    assert marked(text, COMMAND) == table(rows)
    assert marked(replace_marked(text, COMMAND, "| other |\n"), COMMAND) == "| other |\n"
    with pytest.raises(ValueError, match="no table between"):
        marked("text", COMMAND)


def test_containers_of_one_and_several_stages():
    def stage(path):
        return Stage((path,), (True,))

    assert containers([stage("blocks.0")]) == containers([stage("blocks.0"), stage("blocks.4")]) == "`blocks`"
    assert containers([stage("a.x.0"), stage("b.x.0"), stage("c.x.0")]) == "`a.x` ... `c.x`"


class NamedNorm(nn.BatchNorm2d):
    """A BatchNorm whose forward may do anything."""


def test_a_norm_of_ones_own_is_refused_by_stacked_and_run_shared_by_auto():
    zoo_model = next(z for z in ZOO if z.name == "mobilenet_v2")
    model = copy.deepcopy(small(zoo_model)[0])
    path = find_stages(model)[0].blocks[0] + ".conv.0.1"
    model.set_submodule(path, NamedNorm(model.get_submodule(path).num_features).double())
    images, targets = batch(zoo_model)
    reason = rf"{path!r} \(NamedNorm\) looks across the batch in a way of its own"
    with pytest.raises(StackingError, match=reason):
        GKT(model, GKTConfig(execution="stacked"))(images, targets)
    auto = GKT(model, GKTConfig())
    auto(images, targets).loss.backward()
    assert auto.explain().splitlines()[-1].startswith("execution: shared (states can't be stacked")
