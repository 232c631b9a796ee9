"""Values and gradients of ghost_batch_norm on every backend, against the float64 formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.backends import combinations
from helpers.ghost_batch_norm_formula import (
    BACKENDS,
    affordable,
    channels_last,
    expected,
    make,
    on_backend,
    relative_norm,
)

from gkt_fast import ghost_batch_norm
from gkt_fast.ops import ghost_batch_norm_reference

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
SHAPES = [(6, 5, 3, 5), (4, 16, 4, 4), (24, 70), (12, 3, 1, 1), (6, 35, 7), (2, 1, 3, 3), (4, 33, 2, 3, 5)]
BIG_SHAPES = [(4, 16, 33, 32), (2, 3, 70, 80), (6, 129, 20, 11), (2, 300, 7, 9)]


def first(shapes, backend, emulated):
    """All of the shapes; the first few with backends that are emulated, hence slow."""
    return shapes[:emulated] if backend in ("triton", "cuda-host") else shapes


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on_backend(request.param):
        yield request.param


def run(tensors, grad_y, ghosts, with_residual=True, relu=True, running=None, **options):
    """The op's results and gradients by name; checks that nothing was written into the inputs."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "grad_y"}
    before = {name: t.clone() for name, t in tensors.items()}
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
    assert not mean.requires_grad and not var.requires_grad
    y.backward(grad_y)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape
    return {"y": y.detach(), "mean": mean, "var": var, **gradients}


def check(tensors, ghosts, tolerance=None, **options):
    wanted = expected(tensors, ghosts, **options)
    actual = run(tensors, wanted.pop("grad_y"), ghosts, **options)
    assert actual.keys() == wanted.keys()
    tolerance = tolerance or TOLERANCE[tensors["x"].dtype]
    errors = {name: relative_norm(actual[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= tolerance, errors
    return actual


LAYOUTS, FLAGS = ["planes", "channels_last"], [True, False]


@pytest.mark.parametrize(
    ("backend", "shape", "dtype", "layout", "with_residual", "relu"),
    [
        row
        for name in BACKENDS
        for row in combinations(name, first(SHAPES, name, 4), list(TOLERANCE), LAYOUTS, FLAGS, FLAGS)
    ],
    ids=str,
    indirect=["backend"],
)
def test_values_and_gradients(backend, shape, dtype, layout, with_residual, relu):
    tensors = make(shape, dtype, layout)
    for ghosts in {1, 2 if shape[0] > 4 or len(shape) > 2 else 1}:
        actual = check(tensors, ghosts, with_residual=with_residual, relu=relu)
        assert actual["y"].stride() == tensors["x"].stride()


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize(
    ("backend", "shape"),
    [(name, shape) for name in BACKENDS for shape in first(BIG_SHAPES, name, 2)],
    ids=str,
    indirect=["backend"],
)
@pytest.mark.parametrize("ghosts", [1, 2])
def test_tensors_of_several_tiles(backend, shape, layout, ghosts):
    check(make(affordable(shape, backend, layout), layout=layout), ghosts)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("keep", [[True, False, True], [False, False, False], [True, True, True]], ids=str)
def test_a_dropped_ghost_batch_passes_its_residual_through(backend, keep, relu, layout):
    tensors = make(affordable((6, 19, 3, 5), backend, layout), layout=layout)
    actual = check(tensors, 3, keep=torch.tensor(keep), relu=relu)
    for g, kept in enumerate(keep):
        rows = slice(2 * g, 2 * g + 2)
        if not kept:
            assert torch.equal(actual["y"][rows], tensors["residual"][rows])
            assert actual["x"][rows].count_nonzero() == 0


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_make_it_an_affine_map(backend, dtype, relu, layout):
    tensors = make(affordable((6, 19, 3, 5), backend, layout), dtype, layout)
    channels = tensors["x"].shape[1]
    running = (torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64) + 0.3)
    wanted = expected(tensors, 2, relu=relu, running=running)
    running = tuple(r.to(tensors["weight"].dtype) for r in running)
    actual = run(tensors, wanted.pop("grad_y"), 2, relu=relu, running=running)
    for name in wanted:
        assert relative_norm(actual[name], wanted[name]) <= TOLERANCE[dtype], name
    assert actual["mean"].shape == (2, channels)


def test_one_value_per_channel_is_enough_in_eval_mode(backend):
    tensors = make((1, 19, 1, 1))
    check_running = (torch.zeros(19), torch.ones(19))
    actual = run(tensors, tensors["grad_y"], 1, running=check_running)
    wanted = expected(tensors, 1, running=tuple(r.double() for r in check_running))
    assert relative_norm(actual["y"], wanted["y"]) <= 2e-6


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_large_mean_with_small_variance(backend, layout):
    """In float32 the mean alone is off by 5e-4; results are not."""
    check(make(affordable((8, 20, 9, 7), backend, layout), layout=layout, mean=1e4, std=1.0), 2)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_constant_channels_have_no_variance(backend, value, layout):
    tensors = make((6, 5, 4, 4), layout=layout)
    tensors["x"][:, 2] = value
    actual = run(tensors, tensors["grad_y"], 2, with_residual=False, relu=False)
    assert actual["var"][:, 2].abs().max() <= 1e-12 * max(1.0, value**2)
    wanted = tensors["bias"][2].expand(6, 4, 4)
    torch.testing.assert_close(actual["y"][:, 2], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_eager(backend, dtype, layout):
    tensors = make(affordable((8, 21, 5, 6), backend, layout), dtype, layout)
    wanted = expected(tensors, 1)
    grad_y = wanted.pop("grad_y")
    actual = run(tensors, grad_y, 1)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "grad_y"}
    y = F.batch_norm(leaves["x"], None, None, leaves["weight"], leaves["bias"], training=True)
    y = torch.relu(y + leaves["residual"])
    y.backward(grad_y)
    eager = {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    for name in eager:
        floor = relative_norm(wanted[name].to(tensors[name if name != "y" else "x"].dtype), wanted[name])
        error = relative_norm(actual[name], wanted[name])
        allowed = max(1.2 * floor, relative_norm(eager[name], wanted[name]), 2e-6)
        if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
            allowed *= 2.5  # Triton's interpreter truncates to bfloat16 where a GPU rounds
        assert error <= allowed, name
    assert actual["mean"].dtype == torch.float32
    assert relative_norm(actual["mean"], wanted["mean"]) <= 2e-6


def test_parameters_in_low_precision_get_gradients_in_it(backend):
    tensors = make((6, 5, 4, 4), torch.bfloat16)
    tensors["weight"], tensors["bias"] = tensors["weight"].bfloat16(), tensors["bias"].bfloat16()
    assert run(tensors, tensors["grad_y"], 1)["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("cut", ["batch", "channels", "rows", "every second", "transposed", "mixed layouts"])
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_strided_inputs(backend, layout, cut):
    large = make(affordable((12, 20, 6, 8), backend, layout), layout=layout)
    pick = {
        "batch": lambda t: t[3:9],
        "channels": lambda t: t[:, 2:-1],
        "rows": lambda t: t[:, :, 1:5],
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
    check(tensors, 2)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_expanded_and_strided_grad_output(backend, layout):
    tensors = make((4, 6, 3, 5), layout=layout)
    for grad_y in (
        torch.ones(()).expand(4, 6, 3, 5),
        torch.randn(4, 6, 1, 1).expand(4, 6, 3, 5),
        torch.randn(4, 6, 3, 10)[..., ::2],
        torch.randn(4, 6, 3, 5) * -2.5,
    ):
        check({**tensors, "grad_y": grad_y}, 2)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_every_output_is_written(backend, layout):
    """torch fills what is allocated with NaN while it is deterministic."""
    shape = affordable((6, 19, 3, 5), backend, layout)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        check(make(shape, layout=layout), 2, keep=torch.tensor([True, False]))
        check(make(shape, layout=layout), 2, with_residual=False, relu=False)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
def test_without_parameters(backend, absent):
    tensors = make((6, 5, 4, 4), torch.float64)
    weight = None if absent != "bias" else tensors["weight"]
    bias = None if absent != "weight" else tensors["bias"]
    x = tensors["x"].requires_grad_()
    options = {"ghosts": 2, "residual": tensors["residual"]}
    y, mean, var = ghost_batch_norm(x, weight, bias, **options)
    (gradient,) = torch.autograd.grad(y, x, tensors["grad_y"])
    wanted = ghost_batch_norm_reference(x, weight, bias, **options)
    (wanted_gradient,) = torch.autograd.grad(wanted[0], x, tensors["grad_y"])
    for actual, reference in zip((y, mean, var, gradient), (*wanted, wanted_gradient), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_gradient_of_one_input_alone(backend, wanted):
    tensors = make((6, 5, 4, 4))
    full = expected(tensors, 2)
    leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
    y, _, _ = ghost_batch_norm(
        leaves["x"], leaves["weight"], leaves["bias"], ghosts=2, residual=leaves["residual"]
    )
    y.backward(full["grad_y"])
    assert relative_norm(leaves[wanted].grad, full[wanted]) <= 2e-6
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 3, 0, 4), (0, 3), (4, 0, 3, 3)], ids=str)
def test_empty_batches(backend, shape):
    tensors = make(shape)
    actual = run(tensors, tensors["grad_y"], 2)
    assert actual["y"].shape == shape and actual["mean"].shape == (2, shape[1])
    assert all(value.count_nonzero() == 0 for value in actual.values())


def test_nan_and_infinity_reach_the_output(backend):
    tensors = make((4, 3, 2, 2))
    tensors["residual"][0, 0, 0, 0] = float("nan")
    tensors["residual"][1, 1, 0, 0] = float("inf")
    y = run(tensors, tensors["grad_y"], 1)["y"]
    assert y[0, 0, 0, 0].isnan() and y[1, 1, 0, 0].isinf() and y.isfinite().sum() == y.numel() - 2


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_repeated_runs_give_the_same_bits(backend, layout):
    tensors = make(affordable((6, 70, 9, 9), backend, layout), layout=layout)
    first, second = (run(tensors, tensors["grad_y"], 2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
