"""ghost_batch_norm as a torch op: compilation, autocast, autograd, threads, instruction sets, bad input."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from cuda_host import build
from helpers.backends import running_on, unavailable
from helpers.ghost_batch_norm_formula import BACKENDS, make, on_backend
from helpers.processes import environment

from gkt_fast import ghost_batch_norm, use_backend
from gkt_fast.ops import ghost_batch_norm_reference, native


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on_backend(request.param):
        yield request.param


def leaves(*shape, **options):
    tensors = make(shape, **options)
    return [tensors[name].requires_grad_() for name in ("x", "weight", "bias", "residual")], tensors["grad_y"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck's own copies
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_opcheck(backend, layout):
    (x, weight, bias, residual), _ = leaves(8, 3, 4, 4, layout=layout)
    running = torch.zeros(3), torch.ones(3)
    for arguments in (
        (x, weight, bias, residual, None, None, None, 2, True, 1e-5),
        (x, None, None, None, None, None, None, 1, False, 1e-5),
        (x, weight, bias, residual, torch.tensor([True, False]), None, None, 2, True, 1e-5),
        (x, weight, bias, residual, None, *running, 2, True, 1e-5),
        (x.detach()[:, :, 1:3], weight, bias, None, None, None, None, 2, True, 1e-5),
    ):
        torch.library.opcheck(torch.ops.gkt_fast.ghost_batch_norm.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(backend, dynamic):
    (x, weight, bias, residual), grad_y = leaves(6, 5, 4, 4, layout="channels_last")

    def block(x, weight, bias, residual):
        return ghost_batch_norm(x * 2, weight, bias, ghosts=2, residual=residual)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual, wanted = compiled(x, weight, bias, residual), block(x, weight, bias, residual)
    inputs = (x, weight, bias, residual)
    for a, w in zip(
        (*actual, *torch.autograd.grad(actual[0], inputs, grad_y)),
        (*wanted, *torch.autograd.grad(wanted[0], inputs, grad_y)),
        strict=True,
    ):
        torch.testing.assert_close(a, w)


def test_autocast(backend):
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    convolution = torch.nn.Conv2d(3, 5, 3)
    weight, bias = torch.ones(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, _ = ghost_batch_norm(convolution(x), weight, bias, ghosts=2)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and mean.dtype == torch.float32
    assert weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_reference_gradients():
    tensors = make((4, 2, 3), torch.float64)
    x, weight, bias, residual = (tensors[n].requires_grad_() for n in ("x", "weight", "bias", "residual"))

    def run(x, weight, bias, residual):
        return ghost_batch_norm_reference(
            x, weight, bias, ghosts=2, residual=residual, activation="identity"
        )[0]

    assert torch.autograd.gradcheck(run, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias, residual))


def test_differentiating_twice_is_refused(backend):
    (x, weight, bias, residual), _ = leaves(6, 5, 4, 4)
    y, _, _ = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="ghost_batch_norm_reference"):
        gradient.sum().backward()


def test_changing_x_before_backward_is_noticed(backend):
    x = torch.randn(6, 5, 4, 4)
    weight = torch.ones(5, requires_grad=True)
    y, _, _ = ghost_batch_norm(x, weight, None, ghosts=1)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backwards", BACKENDS)
@pytest.mark.parametrize("forwards", BACKENDS)
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 19, 3, 5), (4, 3, 7, 9)])
def test_backends_share_what_is_saved(forwards, backwards, layout, shape):
    (x, weight, bias, residual), grad_y = leaves(*shape, layout=layout)
    keep = torch.tensor([True, False])
    with on_backend(forwards):
        y, _, mask = torch.ops.gkt_fast.ghost_batch_norm(
            x, weight, bias, residual, keep, None, None, 2, True, 1e-5
        )
    with running_on("ghost_batch_norm", "torch"):
        _, _, wanted_mask = torch.ops.gkt_fast.ghost_batch_norm(
            x, weight, bias, residual, keep, None, None, 2, True, 1e-5
        )
        wanted = torch.autograd.grad(y, (x, weight, residual), grad_y, retain_graph=True)
    assert torch.equal(mask, wanted_mask)
    with on_backend(backwards):
        for actual, reference in zip(
            torch.autograd.grad(y, (x, weight, residual), grad_y), wanted, strict=True
        ):
            torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 70, 9, 9), (6, 8, 40, 40)], ids=str)
def test_threads_don_t_change_a_bit(layout, shape):
    (x, weight, bias, residual), grad_y = leaves(*shape, layout=layout)
    before, results = torch.get_num_threads(), []
    with running_on("ghost_batch_norm", "cpp"):
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                y, mean, var = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
                results.append((y, mean, var, *torch.autograd.grad(y, (x, weight, bias, residual), grad_y)))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_outputs_are_streamed_past_the_cache():
    """Above 16 MiB whole registers are written past the cache; results are those of the two halves."""
    (x, weight, bias, residual), grad_y = leaves(2, 64, 184, 184, layout="channels_last")
    inputs = (x, residual)
    with running_on("ghost_batch_norm", "cpp"):
        y, _, _ = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
        gradients = torch.autograd.grad(y, inputs, grad_y)
        for half in (0, 1):
            rows = slice(half, half + 1)
            part = [t.detach()[rows].requires_grad_() for t in inputs]
            part_y, _, _ = ghost_batch_norm(part[0], weight, bias, ghosts=1, residual=part[1])
            assert torch.equal(y[rows], part_y)
            part_gradients = torch.autograd.grad(part_y, part, grad_y[rows])
            assert all(torch.equal(g[rows], p) for g, p in zip(gradients, part_gradients, strict=True))


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_cuda_blocks_may_run_in_any_order(layout):
    (x, weight, bias, residual), grad_y = leaves(6, 70, 19, 9, layout=layout)
    results = []
    with on_backend("cuda-host"):
        for order in (nullcontext(), build.last_first(build.native_module())):
            with order:
                y, mean, var = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
                results.append((y, mean, var, *torch.autograd.grad(y, (x, weight, bias, residual), grad_y)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa):
    """Each is run by a process of its own, since the choice is made once."""
    built = str(native.build_info().get("instruction_sets", ""))
    if isa not in built:
        unavailable("cpp", f"the native module has no kernels for {isa}, but for: {built}")
    script = "import test_ghost_batch_norm_op as t; t.compare_with_torch()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(GKT_ISA=isa),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != isa:
        unavailable("cpp", f"this processor can't run {isa}")


def compare_with_torch() -> None:
    """Runs all dtypes on the C++ kernel and prints the instruction set it used."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout in ("planes", "channels_last"):
            for channels in (3, 40, 129):
                (x, weight, bias, residual), grad_y = leaves(4, channels, 5, 7, dtype=dtype, layout=layout)
                x.data[0, 0, 0] = torch.tensor([0.0, -0.0, 1e-7, 6e-5, -3e-6, 2048.5, -65504.0])
                results = []
                for backend in ("cpp", "torch"):
                    with use_backend(backend):
                        y, mean, var = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
                        gradients = torch.autograd.grad(y, (x, weight, bias, residual), grad_y)
                        results.append((y, mean, var, *gradients))
                for actual, wanted in zip(*results, strict=True):
                    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(actual.dtype, 2e-2)
                    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    print(native.build_info()["active_instruction_set"])


X, WEIGHT = torch.randn(4, 3, 2, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "x is a list", {"x": [1.0]}),
        (TypeError, "x is a tensor of torch.int64", {"x": torch.ones(4, 3, dtype=torch.int64)}),
        (ValueError, r"x has shape \(4,\)", {"x": torch.ones(4)}),
        (ValueError, "ghosts is 0; it must be at least 1", {"ghosts": 0}),
        (ValueError, "ghosts is 3; it must .* divide the 4 rows", {"ghosts": 3}),
        (TypeError, "ghosts is 2.0; it must be an int", {"ghosts": 2.0}),
        (ValueError, "activation is 'gelu'", {"activation": "gelu"}),
        (ValueError, "eps is nan", {"eps": float("nan")}),
        (ValueError, "eps is -1.0", {"eps": -1.0}),
        (ValueError, r"weight has shape \(4,\); it must be \(3,\)", {"weight": torch.ones(4)}),
        (TypeError, "bias is a tensor of torch.float64", {"bias": torch.ones(3, dtype=torch.float64)}),
        (ValueError, r"residual has shape \(4, 3, 2, 1\)", {"residual": X[..., :1]}),
        (TypeError, "residual is a tensor of torch.bfloat16", {"residual": X.bfloat16()}),
        (ValueError, "keep is given without residual", {"keep": torch.ones(2, dtype=torch.bool)}),
        (TypeError, "keep is a tensor of torch.float32", {"keep": torch.ones(2), "residual": X}),
        (ValueError, r"keep has shape \(3,\)", {"keep": torch.ones(3, dtype=torch.bool), "residual": X}),
        (ValueError, "running_mean and running_var must be given together", {"running_mean": WEIGHT}),
        (ValueError, "one value per channel and ghost batch", {"x": torch.randn(2, 3, 1, 1)}),
        (ValueError, "weight is on meta; it must be on cpu", {"weight": torch.ones(3, device="meta")}),
    ],
)
def test_bad_input(error, message, changes):
    arguments = {"x": X, "weight": WEIGHT, "bias": None, "ghosts": 2, **changes}
    with pytest.raises(error, match=message):
        ghost_batch_norm(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_hooks_on_saved_tensors_that_change_layouts(backend, layout):
    (x, weight, bias, residual), grad_y = leaves(6, 5, 4, 3, layout=layout)
    other = torch.contiguous_format if layout == "channels_last" else torch.channels_last

    def gradients():
        y, _, _ = ghost_batch_norm(x, weight, bias, ghosts=2, residual=residual)
        return torch.autograd.grad(y, (x, weight, bias, residual), grad_y)

    def pack(tensor):
        return tensor.contiguous(memory_format=other) if tensor.dim() == 4 else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = gradients()
    torch.testing.assert_close(found, gradients())
