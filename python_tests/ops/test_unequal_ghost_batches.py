"""ghost_batch_norm where the first ghost batch has more or fewer rows than the others."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import combinations
from helpers.ghost_batch_norm_formula import (
    BACKENDS,
    affordable,
    channels_last,
    expected,
    make,
    on_backend,
    relative_norm,
    rows_of_ghosts,
)

from gkt_fast import ghost_batch_norm
from gkt_fast.ops import ghost_batch_norm_reference

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
# (shape of x, ghosts, rows of the first)
SIZES = [
    ((7, 5, 3, 5), 3, 3),  # larger
    ((8, 16, 4, 4), 3, 2),  # smaller
    ((6, 19, 3, 3), 2, 3),  # equal
    ((5, 7, 3, 2), 1, 5),  # one ghost batch has them all
    ((9, 33, 2), 5, 1),
    ((11, 70), 2, 8),
    ((4, 3, 2, 3, 2), 2, 3),
]
BIG_SIZES = [((5, 16, 33, 32), 3, 3), ((4, 3, 70, 80), 2, 1), ((7, 129, 20, 11), 2, 5)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on_backend(request.param):
        yield request.param


def run(tensors, grad_y, ghosts, with_residual=True, relu=True, running=None, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "grad_y"}
    running_mean, running_var = running or (None, None)
    y, mean, var = ghost_batch_norm(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        ghosts=ghosts,
        residual=leaves["residual"] if with_residual else None,
        activation="relu" if relu else "identity",
        running_mean=running_mean,
        running_var=running_var,
        **options,
    )
    y.backward(grad_y)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), "mean": mean, "var": var, **gradients}


def check(tensors, ghosts, lead_rows, **options):
    wanted = expected(tensors, ghosts, lead_rows=lead_rows, **options)
    actual = run(tensors, wanted.pop("grad_y"), ghosts, lead_rows=lead_rows, **options)
    assert actual.keys() == wanted.keys()
    errors = {name: relative_norm(actual[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= TOLERANCE[tensors["x"].dtype], errors
    return actual


FLAGS = [{"with_residual": True, "relu": True}, {"with_residual": False}, {"relu": False}]


@pytest.mark.parametrize(
    ("backend", "sizes", "dtype", "layout", "flags"),
    [
        row
        for name in BACKENDS
        for row in combinations(name, SIZES, list(TOLERANCE), ["planes", "channels_last"], FLAGS)
    ],
    ids=str,
    indirect=["backend"],
)
def test_values_and_gradients(backend, sizes, dtype, layout, flags):
    shape, ghosts, lead_rows = sizes
    shape = affordable(shape, backend, layout)
    tensors = make(shape, dtype, layout)
    actual = check(tensors, ghosts, lead_rows, **flags)
    assert actual["y"].stride() == tensors["x"].stride() and actual["mean"].shape == (ghosts, shape[1])


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize(("shape", "ghosts", "lead_rows"), BIG_SIZES, ids=str)
def test_ghost_batches_of_several_chunks(backend, shape, ghosts, lead_rows, layout):
    check(make(affordable(shape, backend, layout), layout=layout), ghosts, lead_rows)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("keep", [[False, True, True], [True, False, True], [True, True, True]], ids=str)
def test_dropped_ghost_batches(backend, keep, relu, layout):
    tensors = make(affordable((9, 19, 3, 5), backend, layout), layout=layout)
    actual = check(tensors, 3, 5, keep=torch.tensor(keep), relu=relu)
    for kept, y, residual, grad_x in zip(
        keep,
        *(t.split(rows_of_ghosts(9, 3, 5)) for t in (actual["y"], tensors["residual"], actual["x"])),
        strict=True,
    ):
        if not kept:
            assert torch.equal(y, residual) and grad_x.count_nonzero() == 0


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_running_statistics(backend, layout):
    shape = affordable((7, 19, 3, 5), backend, layout)
    running = (torch.randn(shape[1], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64) + 0.3)
    check(make(shape, torch.float64, layout), 3, 3, running=running)


@pytest.mark.parametrize("cut", ["batch", "channels", "every second", "transposed", "mixed layouts"])
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_strided_inputs(backend, layout, cut):
    large = make(affordable((14, 20, 6, 8), backend, layout), layout=layout)
    pick = {
        "batch": lambda t: t[3:10],
        "channels": lambda t: t[:, 2:-1],
        "every second": lambda t: t[::2, :, :, ::2],
        "transposed": lambda t: t.transpose(2, 3),
        "mixed layouts": lambda t: t,
    }[cut]
    tensors = {name: pick(t) if t.dim() == 4 else t for name, t in large.items()}
    if cut == "channels":
        tensors["weight"], tensors["bias"] = large["weight"][2:-1], large["bias"][2:-1]
    if cut == "mixed layouts":
        other = channels_last if layout == "planes" else torch.Tensor.contiguous
        tensors["residual"], tensors["grad_y"] = (other(tensors[name]) for name in ("residual", "grad_y"))
    rows = tensors["x"].shape[0]
    check(tensors, 3, rows - 4)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_a_large_mean_and_every_output_written(backend, layout):
    """torch fills what is allocated with NaN while it is deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        check(make(affordable((9, 19, 5, 7), backend, layout), layout=layout, mean=1e4, std=1.0), 3, 5)
    finally:
        torch.use_deterministic_algorithms(False)


def test_equal_rows_by_name_change_nothing(backend):
    tensors = make((6, 5, 4, 4))
    by_name, without = (run(tensors, tensors["grad_y"], 3, lead_rows=lead) for lead in (2, None))
    assert all(torch.equal(by_name[name], without[name]) for name in without)


def test_the_reference_differentiates_twice():
    tensors = make((5, 2, 3), torch.float64)
    inputs = [tensors[n].requires_grad_() for n in ("x", "weight", "bias", "residual")]

    def reference(x, weight, bias, residual):
        return ghost_batch_norm_reference(
            x, weight, bias, ghosts=2, lead_rows=3, residual=residual, activation="identity"
        )

    assert torch.autograd.gradcheck(lambda *i: reference(*i)[0], inputs)
    assert torch.autograd.gradgradcheck(lambda *i: reference(*i)[0], inputs)
    wanted = expected(tensors, 2, lead_rows=3, relu=False)
    for actual, name in zip(reference(*inputs), ("y", "mean", "var"), strict=True):
        assert relative_norm(actual, wanted[name]) <= 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck's own copies
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_opcheck(backend, layout):
    tensors = make((7, 3, 4, 4), layout=layout)
    x, weight, bias, residual = (tensors[n].requires_grad_() for n in ("x", "weight", "bias", "residual"))
    keep = torch.tensor([True, False, True])
    for arguments in (
        (x, weight, bias, residual, None, None, None, 3, True, 1e-5, 3),
        (x, weight, bias, residual, keep, None, None, 3, True, 1e-5, 1),
        (x, None, None, None, None, None, None, 1, False, 1e-5, 7),
    ):
        torch.library.opcheck(torch.ops.gkt_fast.ghost_batch_norm.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(backend, dynamic):
    def block(x, weight, bias, residual, lead_rows):
        return ghost_batch_norm(x * 2, weight, bias, ghosts=3, lead_rows=lead_rows, residual=residual)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, lead_rows in ((7, 3), (14, 6)):
        tensors = make((rows, 5, 4, 4), layout="channels_last")
        inputs = [tensors[n].requires_grad_() for n in ("x", "weight", "bias", "residual")]
        actual, wanted = compiled(*inputs, lead_rows), block(*inputs, lead_rows)
        for a, w in zip(
            (*actual, *torch.autograd.grad(actual[0], inputs, tensors["grad_y"])),
            (*wanted, *torch.autograd.grad(wanted[0], inputs, tensors["grad_y"])),
            strict=True,
        ):
            torch.testing.assert_close(a, w)


def test_empty_batches(backend):
    for shape, lead_rows in (((0, 3, 4, 4), 0), ((7, 3, 0, 4), 3)):
        tensors = make(shape)
        actual = run(tensors, tensors["grad_y"], 3, lead_rows=lead_rows)
        assert actual["y"].shape == shape and actual["mean"].shape == (3, 3)
        assert all(value.count_nonzero() == 0 for value in actual.values())


@pytest.mark.parametrize(
    ("error", "message", "ghosts", "lead_rows", "positions"),
    [
        (TypeError, "lead_rows is 2.0; it must be an int or None", 2, 2.0, 4),
        (TypeError, "lead_rows is True", 2, True, 4),
        (ValueError, "lead_rows is 0; it must be at least 1", 2, 0, 4),
        (ValueError, "lead_rows is 7; it must .* 7 in all, .* other 1 ghost batches", 2, 7, 4),
        (ValueError, "lead_rows is 2; it must .* other 2 ghost batches can share equally", 3, 2, 4),
        (ValueError, "lead_rows is 4; the one ghost batch has all 7 rows", 1, 4, 4),
        (ValueError, "ghosts is 0", 0, 3, 4),
        (ValueError, "lead_rows=5: one value per channel and ghost batch", 3, 5, 1),
        (ValueError, "lead_rows=1: one value per channel and ghost batch", 3, 1, 1),
    ],
)
def test_bad_input(error, message, ghosts, lead_rows, positions):
    with pytest.raises(error, match=message):
        ghost_batch_norm(torch.randn(7, 3, positions), None, None, ghosts=ghosts, lead_rows=lead_rows)
