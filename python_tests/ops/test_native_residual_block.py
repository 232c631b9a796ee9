"""Residual blocks that the native module runs: which they are, that Python runs them alike, what a failure leaves."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.ghost_batch_norm_formula import on_backend
from helpers.residual_block_formula import CASES, make

from gkt_fast import residual_block
from gkt_fast.ops import native_tensors
from gkt_fast.ops.ghost_batch_norm.running_statistics import RunningUpdate
from gkt_fast.ops.residual_block import (
    Convolution,
    Norm,
    native,
    op,
    run_plain_residual_block,
)
from gkt_fast.ops.residual_block.problem import describe, parameters_of


@pytest.fixture(params=["cpp", "cuda-host"])
def backend(request):
    with on_backend(request.param):
        yield request.param


@pytest.fixture
def taken(monkeypatch):
    """For each pass that has run, whether the native module ran it."""
    passes: list[bool] = []

    def heard(function):
        def run(*arguments):
            results = function(*arguments)
            passes.append(results is not None)
            return results

        return run

    monkeypatch.setattr(op, "native_forward", heard(op.native_forward))
    monkeypatch.setattr(op, "native_backward", heard(op.native_backward))
    return passes


def results(inputs, **options) -> list[torch.Tensor]:
    """y, statistics and gradients."""
    y, statistics = residual_block(inputs.x, inputs.convolutions, inputs.norms, **inputs.options, **options)
    grad_y = torch.arange(1, y.numel() + 1, dtype=torch.float64).reshape(y.shape).cos().to(y.dtype)
    return [
        y,
        *(t for pair in statistics for t in pair),
        *torch.autograd.grad(y, [*inputs.leaves.values()], grad_y),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "saved"])
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if not (case.preactivation or case.frozen)]
)
def test_python_runs_it_alike(backend, case, layout, recompute, dtype, taken, monkeypatch):
    """To the last bit: the same kernels on the same values."""
    inputs = make(CASES[case], dtype, layout, seed=5)
    found = results(inputs, recompute=recompute)
    vectors_fit = dtype is not torch.bfloat16  # a norm's weight has the dtype of the statistics
    assert taken == [vectors_fit] * 2
    monkeypatch.setattr(op, "native_forward", lambda *_: None)
    monkeypatch.setattr(op, "native_backward", lambda *_: None)
    for ours, theirs in zip(found, results(inputs, recompute=recompute), strict=True):
        assert ours.dtype is theirs.dtype and ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.preactivation or case.frozen])
def test_what_python_runs(case, taken):
    with on_backend("cpp"):
        results(make(CASES[case], torch.float32))
    assert taken == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["bottleneck, projection", "basic, skip"])
def test_under_autocast(backend, case, dtype, taken, monkeypatch):
    inputs = make(CASES[case], torch.float32, "channels_last", seed=6)
    skip = inputs.options.get("skip")
    if skip is not None:  # the residual has the dtype of the last convolution's output
        inputs.options["skip"] = inputs.leaves["skip"] = skip.detach().to(dtype).requires_grad_()

    def run():
        with torch.autocast("cpu", dtype):
            return results(inputs)

    found = run()
    assert taken == [True, True]
    monkeypatch.setattr(op, "native_forward", lambda *_: None)
    monkeypatch.setattr(op, "native_backward", lambda *_: None)
    for ours, theirs in zip(found, run(), strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)


def test_activations_of_other_layouts(backend, taken):
    """A residual and a gradient that lie otherwise than what convolutions give are copied."""
    inputs = make(CASES["basic"], torch.float64, "channels_last", seed=7)
    inputs.options["skip"] = inputs.leaves["x"].detach().contiguous()
    y, _ = residual_block(inputs.x, inputs.convolutions, inputs.norms, **inputs.options)
    gradients = [
        torch.autograd.grad(y, [*inputs.leaves.values()], grad_y, retain_graph=True)
        for grad_y in (torch.ones_like(y), torch.ones(()).double().expand_as(y))
    ]
    assert taken == [True] * 3
    assert all(map(torch.equal, *gradients))


def plain(widths, dtype=torch.float32, kernels=(3, 3)):
    """The problem and the tensors of a block without shortcut."""
    convolutions = [
        Convolution(torch.randn(widths[i + 1], widths[i], k, k, dtype=dtype), padding=(k // 2, k // 2))
        for i, k in enumerate(kernels)
    ]
    norms = [Norm(torch.ones(width), torch.zeros(width)) for width in widths[1:]]
    problem = describe(
        convolutions, norms, shortcut=False, preactivation=False, ghosts=1, lead_rows=None,
        recompute=True, pointwise=False, dtype=None,
    )  # fmt: skip
    return problem, parameters_of(convolutions, norms)


def test_running_statistics_are_updated_once_where_a_later_convolution_fails(backend):
    problem, parameters = plain((5, 5, 5))
    parameters[6] = torch.randn(5, 4, 3, 3)  # for an input of four channels
    x = torch.randn(4, 5, 6, 6)
    running = [(torch.zeros(5), torch.ones(5)) for _ in range(2)]
    counters = [torch.tensor(7), torch.tensor(7)]
    updates = [RunningUpdate(*pair, 0.5, counter) for pair, counter in zip(running, counters, strict=True)]
    written = [tensor for update in updates for tensor in (update.mean, update.var, update.counter)]
    versions = [tensor._version for tensor in written]
    with pytest.raises(RuntimeError, match="channels"):
        run_plain_residual_block(problem, x, None, None, parameters, updates)
    c = torch.nn.functional.conv2d(x, parameters[0], padding=1)
    torch.testing.assert_close(running[0][0], 0.5 * c.mean((0, 2, 3)))
    torch.testing.assert_close(running[0][1], 0.5 + 0.5 * c.var((0, 2, 3)))
    assert torch.equal(running[1][0], torch.zeros(5)) and torch.equal(running[1][1], torch.ones(5))
    assert updates[0] is None and updates[1] is not None
    assert [*map(int, counters)] == [8, 7]
    assert [t._version for t in written] == [v + (i < 3) for i, v in enumerate(versions)]


@pytest.mark.parametrize("which", ["whole", "wrong channels", "without strides"])
def test_no_tensor_is_kept_after_a_call(backend, which):
    """A handle that is left would hold its tensor, and that its storage."""
    uses = lambda storage: torch._C._storage_Use_Count(storage._cdata)  # noqa: E731
    problem, parameters = plain((5, 5, 5))
    given = [torch.randn(4, 5, 6, 6, requires_grad=True), *(p for p in parameters if p is not None)]
    if which == "wrong channels":
        parameters[6] = torch.randn(5, 4, 3, 3)
    elif which == "without strides":
        parameters[6] = torch.randn(5, 5, 3, 3).to_sparse()
    if which == "whole":
        y, statistics = run_plain_residual_block(problem, given[0], None, None, parameters, None)
        given += [y.detach(), *statistics, *y.grad_fn.saved_tensors]
        given += torch.autograd.grad(y.sum(), given[0])
        del y, statistics
    else:
        with pytest.raises(RuntimeError):
            run_plain_residual_block(problem, given[0], None, None, parameters, None)
    storages = [tensor.untyped_storage() for tensor in given if tensor is not None]
    parameters.clear(), given.clear()
    assert {uses(storage) for storage in storages} == {uses(torch.empty(1).untyped_storage())}


def test_a_torch_without_the_functions_is_told_of_once(monkeypatch, caplog, taken):
    class Native:
        def load_torch(self, cpu, cuda):
            return "aoti_torch_copy_"

    with caplog.at_level(logging.INFO, "gkt_fast"):
        assert not native_tensors.finds_torch(Native())
    assert (
        "Python runs residual blocks and updates running statistics, which takes longer: this torch has no "
        "aoti_torch_copy_" in caplog.text
    )
    monkeypatch.setattr(native, "_find_block", lambda *_: None)
    inputs = make(CASES["basic"], torch.float32)
    with on_backend("cpp"):
        results(inputs)
    assert taken == [False, False]
