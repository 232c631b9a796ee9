"""residual_block against torch's own layers in float64, run on each ghost batch by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.ghost_batch_norm_formula import BACKENDS, on_backend
from helpers.residual_block_formula import CASES, expected, make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gkt_fast import fuse_blocks, residual_block
from gkt_fast.ops import residual_block_reference
from gkt_fast.ops.residual_block.problem import describe, parameters_of

SEEDS = itertools.count()


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on_backend(request.param):
        yield request.param


def run(inputs, function=residual_block, **options):
    return function(inputs.x, inputs.convolutions, inputs.norms, **inputs.options, **options)


def compare(inputs, tolerance, **options):
    """Values, statistics and gradients; grad_y with odd strides."""
    y, statistics = run(inputs, **options)
    grad_y = torch.randn(*y.shape[:-1], 2 * y.shape[-1], dtype=torch.float64)[..., ::2].to(y.dtype)
    wanted_y, wanted_statistics, wanted = expected(inputs, grad_y)
    gradients = torch.autograd.grad(y, [*inputs.leaves.values()], grad_y)

    def close(actual, exact, what):
        scale = exact.abs().max().clamp(min=1)
        assert (actual.double() - exact).abs().max() <= tolerance * scale, what

    close(y, wanted_y, "y")
    assert len(statistics) == len(wanted_statistics)
    for found, exact in zip(statistics, wanted_statistics, strict=True):
        close(found[0], exact[0], "mean"), close(found[1], exact[1], "variance")
    for (name, leaf), gradient in zip(inputs.leaves.items(), gradients, strict=True):
        close(gradient, wanted[name], name)
        assert gradient.dtype == leaf.dtype


@pytest.mark.parametrize("recompute", [True, False, "pointwise"], ids=["recomputed", "saved", "pointwise"])
@pytest.mark.parametrize("layout", ["planes", "channels_last", "strided"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, layout, recompute):
    compare(make(CASES[case], layout=layout, seed=next(SEEDS)), 1e-10, recompute=recompute)


@pytest.mark.parametrize(
    "case",
    [
        "bottleneck, projection", "dropped", "preactivation, bottleneck",
        "first ghost batch larger", "preactivation, first ghost batch smaller",
    ],
)  # fmt: skip
def test_on_every_backend(backend, case):
    dtype = torch.float32 if backend == "triton" else torch.float64
    # Positions at the corner of a ReLU are few here, and float32 decides them as float64 does for these seeds.
    compare(make(CASES[case], dtype, "channels_last", seed=3), 1e-4 if backend == "triton" else 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_the_reference(case):
    inputs = make(CASES[case], seed=next(SEEDS))
    compare(inputs, 1e-10, function=residual_block_reference)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck's own copies
@pytest.mark.parametrize("recompute", [True, False, "pointwise"], ids=["recomputed", "saved", "pointwise"])
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, layout, recompute):
    inputs = make(CASES[case], torch.float32, layout)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.gkt_fast.residual_block.default
    torch.library.opcheck(op, arguments(inputs, recompute), test_utils=checks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("case", ["basic", "preactivation"])
def test_opcheck_of_traced_derivatives(case):
    op = torch.ops.gkt_fast.residual_block.default
    torch.library.opcheck(op, arguments(make(CASES[case], torch.float32)))


def test_an_unknown_recompute_is_refused():
    with pytest.raises(ValueError, match="recompute is 'all'; it must be True, False or 'pointwise'"):
        run(make(CASES["basic"]), recompute="all")
    with pytest.raises(ValueError, match="recompute is None"):
        fuse_blocks(nn.Identity(), recompute=None)


def arguments(inputs, recompute=True) -> tuple:
    """Of the torch op."""
    shortcut = inputs.options.get("shortcut")
    layers = zip(inputs.convolutions, inputs.norms, strict=True)
    layers = [*layers, *([] if shortcut is None else [shortcut])]
    convolutions, norms = zip(*layers, strict=True)
    problem = describe(
        convolutions,
        norms,
        shortcut=shortcut is not None,
        preactivation=inputs.options["preactivation"],
        ghosts=inputs.options["ghosts"],
        lead_rows=inputs.options.get("lead_rows"),
        recompute=recompute is not False,
        pointwise=recompute == "pointwise",
        dtype=None,
    )
    tensors = inputs.x, inputs.options.get("skip"), inputs.options.get("keep")
    return *tensors, parameters_of(convolutions, norms), *problem.flatten()


@pytest.mark.parametrize(("case", "dynamic"), [("bottleneck, projection", False), ("preactivation", True)])
def test_compiles_without_graph_break(case, dynamic):
    inputs = make(CASES[case], torch.float32, "channels_last")
    grad_y = torch.randn_like(run(inputs)[0])
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = [*inputs.leaves.values()]
    actual, wanted = compiled(inputs), run(inputs)
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(actual[0], leaves, grad_y), torch.autograd.grad(wanted[0], leaves, grad_y)
    )


@pytest.mark.parametrize("case", ["basic, strided", "preactivation"])
def test_flops_are_counted(case):
    """Of convolutions, forward and backward: a multiply-add is two, and backward has two convolutions for each."""
    inputs = make(CASES[case], torch.float32)
    places = {"basic, strided": 4 * 3, "preactivation": 7 * 5}[case]
    weights = [leaf for name, leaf in inputs.leaves.items() if name.startswith("convolution")]
    forward = sum(2 * inputs.x.shape[0] * places * weight.numel() for weight in weights)
    with FlopCounterMode(display=False) as counter:
        y, _ = run(inputs)
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward
