"""ghost_batch_norm that updates running statistics itself: every backend, as torch does it and as the formula says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.backends import combinations
from helpers.ghost_batch_norm_formula import (
    BACKENDS,
    affordable,
    expected,
    make,
    on_backend,
    relative_norm,
)

from gkt_fast import ghost_batch_norm
from gkt_fast.ops import ghost_batch_norm_reference

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
SHAPES = [(6, 5, 3, 5), (4, 16, 4, 4), (24, 70), (5, 35, 7), (2, 1, 3, 3), (3, 3, 70, 80)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on_backend(request.param):
        yield request.param


def running_statistics(channels, dtype):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.3


@pytest.mark.parametrize(
    ("backend", "shape", "dtype", "layout"),
    [
        row
        for name in BACKENDS
        for row in combinations(
            name, SHAPES, [torch.float32, torch.float64, torch.bfloat16], ["planes", "channels_last"]
        )
    ],
    ids=str,
    indirect=["backend"],
)
def test_values_gradients_and_running_statistics(backend, shape, dtype, layout):
    shape = affordable(shape, backend, layout)
    tensors = make(shape, dtype, layout)
    wanted = expected(tensors, 1)
    statistics_dtype = tensors["weight"].dtype
    mean, var = running_statistics(shape[1], statistics_dtype)
    values = tensors["x"].numel() / shape[1]
    for momentum in (0.1, 1.0, 0):
        wanted_mean = (1 - momentum) * mean.double() + momentum * wanted["mean"][0]
        wanted_var = (1 - momentum) * var.double() + momentum * wanted["var"][0] * values / (values - 1)
        own = mean.clone(), var.clone()
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "grad_y"}
        y, *_ = ghost_batch_norm(
            leaves["x"], leaves["weight"], leaves["bias"], ghosts=1, residual=leaves["residual"],
            running_mean=own[0], running_var=own[1], momentum=momentum,
        )  # fmt: skip
        plain = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "grad_y"}
        plain_y, *_ = ghost_batch_norm(
            plain["x"], plain["weight"], plain["bias"], ghosts=1, residual=plain["residual"]
        )
        assert torch.equal(y, plain_y)
        y.backward(tensors["grad_y"])
        plain_y.backward(tensors["grad_y"])
        assert all(torch.equal(leaves[name].grad, plain[name].grad) for name in leaves)
        tolerance = TOLERANCE[statistics_dtype]
        assert relative_norm(own[0], wanted_mean) <= tolerance
        assert relative_norm(own[1], wanted_var) <= tolerance


def test_as_torch_updates_them(backend):
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64)
    ours, theirs = running_statistics(5, x.dtype), None
    theirs = tuple(r.clone() for r in ours)
    ghost_batch_norm(x, None, None, ghosts=1, running_mean=ours[0], running_var=ours[1], momentum=0.3)
    F.batch_norm(x, *theirs, training=True, momentum=0.3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_running_statistics_with_gaps_between_channels(backend):
    x = torch.randn(6, 5, 4, 4)
    dense, large = running_statistics(5, x.dtype), torch.full((10, 2), 7.0)
    large[::2, 0], large[1::2, 1] = dense
    for running in (dense, (large[::2, 0], large[1::2, 1])):
        ghost_batch_norm(
            x, None, None, ghosts=1, running_mean=running[0], running_var=running[1], momentum=0.3
        )
    assert torch.equal(large[::2, 0], dense[0]) and torch.equal(large[1::2, 1], dense[1])
    assert (large[1::2, 0] == 7).all() and (large[::2, 1] == 7).all()


def test_autograd_is_told_of_the_change(backend):
    x, (mean, var) = torch.randn(6, 5, 4, 4), running_statistics(5, torch.float32)
    factor = torch.ones(5, requires_grad=True)
    product = factor * mean
    ghost_batch_norm(x, None, None, ghosts=1, running_mean=mean, running_var=var, momentum=0.3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_an_empty_batch_leaves_them_alone(backend):
    mean, var = running_statistics(3, torch.float32)
    before = mean.clone(), var.clone()
    ghost_batch_norm(
        torch.empty(0, 3, 4, 4), None, None, ghosts=1, running_mean=mean, running_var=var, momentum=0.5
    )
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_the_reference_updates_them_too():
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    ours = running_statistics(5, x.dtype)
    theirs = tuple(r.clone() for r in ours)
    for function, (mean, var) in ((ghost_batch_norm, ours), (ghost_batch_norm_reference, theirs)):
        function(x, None, None, ghosts=1, running_mean=mean, running_var=var, momentum=0.3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck's own copies
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_opcheck(backend, layout):
    tensors = make((6, 3, 4, 4), layout=layout)
    x, weight, bias, residual = (tensors[n].requires_grad_() for n in ("x", "weight", "bias", "residual"))
    keep = torch.tensor([True])
    for arguments in (
        (x, weight, bias, residual, keep, *running_statistics(3, x.dtype), 0.1, True, 1e-5),
        (x, None, None, None, None, *running_statistics(3, x.dtype), 1.0, False, 1e-5),
    ):
        torch.library.opcheck(torch.ops.gkt_fast.ghost_batch_norm_tracking.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(backend, dynamic):
    def block(x, weight, bias, mean, var):
        y = ghost_batch_norm(x * 2, weight, bias, ghosts=1, running_mean=mean, running_var=var, momentum=0.1)[
            0
        ]
        return y + mean[:, None, None]

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    running = running_statistics(5, torch.float32)
    pairs = [[tuple(r.clone() for r in running), function] for function in (compiled, block)]
    for rows in (6, 8):  # the second step begins with what the first wrote
        tensors = make((rows, 5, 4, 4), layout="channels_last")
        inputs = [tensors[n].requires_grad_() for n in ("x", "weight", "bias")]
        results = []
        for (mean, var), function in pairs:
            y = function(*inputs, mean, var)
            results.append((y, mean, var, *torch.autograd.grad(y, inputs, tensors["grad_y"])))
        for a, w in zip(*results, strict=True):
            torch.testing.assert_close(a, w)
    assert not torch.equal(pairs[0][0][0], running[0])


RUNNING = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "momentum is 'x'; it must be a float or None", {"momentum": "x"}),
        (ValueError, "momentum is nan; it must be finite", {"momentum": float("nan")}),
        (ValueError, "momentum is given without running_mean", {"running_mean": None, "running_var": None}),
        (ValueError, "momentum is given with ghosts=2", {"ghosts": 2}),
        (TypeError, "running_mean is a tensor of torch.bfloat16; to be updated",
         {"x": torch.randn(4, 3, 2).bfloat16(), "running_mean": torch.zeros(3).bfloat16()}),
        (ValueError, "running_var requires grad", {"running_var": torch.ones(3, requires_grad=True)}),
        (ValueError, "one value per channel and ghost batch", {"x": torch.randn(1, 3)}),
    ],
)  # fmt: skip
def test_bad_input(error, message, changes):
    arguments = {"x": torch.randn(4, 3, 2), "ghosts": 1, "momentum": 0.1, **RUNNING, **changes}
    with pytest.raises(error, match=message):
        ghost_batch_norm(arguments.pop("x"), None, None, **arguments)
