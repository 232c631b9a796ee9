"""Blocks compiled one by one: new subnets need no new graphs, and the numbers stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from helpers.reference_step import assert_same, one_thread, outcome_of  # noqa: F401
from torch import nn
from torch._dynamo.testing import CompileCounter

from gkt_fast import GKT, GKTConfig, compile_blocks, extract_subnet
from gkt_fast.execution import StackingError
from gkt_fast.models import cifar_resnet

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
"""torch's compiler raises it by itself, and hides it by a filter that an error passes."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


class PreNorm(nn.Module):
    """A block without BatchNorm, which can be stacked though it is compiled."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def mlp():
    """Two stages of different width."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.Sequential(*(PreNorm(8) for _ in range(4))),
        nn.Linear(8, 6), nn.Sequential(*(PreNorm(6) for _ in range(3))), nn.Linear(6, 10),
    )  # fmt: skip


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
    return images, torch.randint(10, (4,), generator=generator)


def resnet():
    return cifar_resnet(20, width=4)


@pytest.mark.parametrize(
    "build, execution, shapes",
    [
        (resnet, "shared", 5),
        (resnet, "lean", 5),
        (mlp, "shared", 2),
        (mlp, "stacked", 2),
    ],
)
def test_a_hundred_steps_recompile_no_more_than_block_shapes(build, execution, shapes):
    """A graph for each block shape; where the batch varies (stacked), the last is dynamic. The check of the first step
    compiles nothing."""
    model = build()
    gkt = GKT(model, GKTConfig(groups=2, execution=execution))
    backend = CompileCounter()
    compile_blocks(model, gkt.stages, backend=backend)
    images, targets = batch()
    subnets = set()
    for step in range(100):
        output = gkt(images, targets, step=step)
        output.loss.backward()
        subnets.update(map(str, output.subnets))
    assert len(subnets) > 10
    assert backend.frame_count == shapes


@pytest.mark.parametrize("execution", ["sequential", "shared", "lean"])
@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_compiled_blocks_give_the_same_numbers(execution, fuse_blocks):
    torch.manual_seed(0)
    plain = cifar_resnet(14, width=4).double()
    compiled = copy.deepcopy(plain)
    paths = compile_blocks(compiled, backend="eager")
    assert paths == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    assert list(compiled.state_dict()) == list(plain.state_dict())
    config = GKTConfig(groups=2, execution=execution, fuse_blocks=fuse_blocks)
    outcomes = []
    images, targets = batch(torch.float64)
    for model in (compiled, plain):
        output = GKT(model, config)(images, targets, step=1)
        output.loss.backward()
        terms = torch.cat([output.ce.reshape(1), output.kd])
        outcomes.append(outcome_of(model, (images,), output.loss, terms, output.logits))
    assert_same(*outcomes, 1e-11)


def test_the_limit_of_graphs_is_raised_to_what_the_blocks_need():
    """All blocks of a class are one function for torch, which otherwise gives up after 8 graphs."""
    compile_blocks(resnet(), backend="eager")
    assert torch._dynamo.config.recompile_limit == 8 * 5
    compile_blocks(mlp(), backend="eager")
    assert torch._dynamo.config.recompile_limit == 8 * 5


def test_copies_are_not_compiled():
    model = cifar_resnet(14, width=4)
    compile_blocks(model, backend=CompileCounter())
    small = extract_subnet(model, (1, 2, 1))
    assert all(module._compiled_call_impl is None for module in small.modules())
    small(batch()[0])


def test_what_compiled_batch_norm_does_not_go_with():
    images, targets = batch()
    model = cifar_resnet(14, width=4)
    compile_blocks(model, backend="eager")
    with pytest.raises(
        StackingError, match=r"'layer1\.0' is compiled, so that the BatchNorm inside can't be run"
    ):
        GKT(model, GKTConfig(execution="stacked"))(images, targets)
    auto = GKT(model, GKTConfig())
    auto(images, targets).loss.backward()
    assert "execution: shared (states can't be stacked: 'layer1.0' is compiled" in auto.explain()
    for execution in ("shared", "lean"):
        config = GKTConfig(execution=execution, batch_norm="all_streams")
        with pytest.raises(ValueError, match=r"batch_norm is 'all_streams', and 'layer1\.0' is compiled"):
            GKT(model, config)(images, targets)
    GKT(model, GKTConfig(execution="sequential", batch_norm="all_streams"))(images, targets).loss.backward()


def test_a_model_that_is_compiled_as_a_whole_is_refused():
    images, targets = batch()
    model = cifar_resnet(14, width=4)
    with pytest.raises(ValueError, match=r"model is compiled as a whole.*compile_blocks\(model\)"):
        GKT(torch.compile(model, backend="eager"))(images, targets)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"model is compiled as a whole"):
        GKT(model)(images, targets)
