"""run_batch_norm and ghost_batches: torch's BatchNorm layers per ghost batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gkt_fast.batch_norm.layer import ghost_batches, run_batch_norm
from gkt_fast.batch_norm.statistics import BatchStatistics, update_running_statistics


def layer(rank=2, channels=5, **options):
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    result = kind(channels, dtype=torch.float64, **options)
    if result.affine:
        nn.init.normal_(result.weight), nn.init.normal_(result.bias)
    return result


def batch(rank=2, rows=6, channels=5):
    return torch.randn(rows, channels, *(4, 3, 2)[:rank], dtype=torch.float64)


def assert_same_state(actual: nn.Module, wanted: nn.Module) -> None:
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_outside_a_context_it_is_torch(rank, options):
    wanted = layer(rank, **options)
    actual = copy.deepcopy(wanted)
    for _ in range(3):
        x = batch(rank).requires_grad_()
        y, z = run_batch_norm(actual, x), wanted(x)
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-12)
        weights = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, z))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
        assert_same_state(actual, wanted)
    actual.eval(), wanted.eval()
    x = batch(rank)
    torch.testing.assert_close(run_batch_norm(actual, x), wanted(x), rtol=1e-11, atol=1e-12)
    assert_same_state(actual, wanted)


def test_residual_and_activation():
    norm, x, residual = layer(), batch(), batch()
    wanted = torch.relu(copy.deepcopy(norm)(x) + residual)
    torch.testing.assert_close(run_batch_norm(norm, x, residual=residual, activation="relu"), wanted)


def test_statistics_frozen_by_the_attribute():
    """`track_running_stats` is read at every call: without it the batch's statistics are used, none are updated."""
    norm, x = layer(), batch()
    before = copy.deepcopy(norm.state_dict())
    norm.track_running_stats = False
    torch.testing.assert_close(run_batch_norm(norm, x), norm(x))
    heard = []
    with ghost_batches(2, heard.append):
        run_batch_norm(norm, x)
    assert not heard
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())
    norm.track_running_stats = True
    run_batch_norm(norm, x)
    assert norm.num_batches_tracked == 1


def test_each_ghost_batch_has_its_own_statistics():
    norm, x = layer(), batch(rows=6)
    before = copy.deepcopy(norm.state_dict())
    heard = []
    with ghost_batches(3, heard.append):
        y = run_batch_norm(norm, x)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())
    (report,) = heard
    mean, var = report.mean, report.variance
    assert report.layer is norm and not mean.requires_grad and not var.requires_grad
    for g in range(3):
        rows = slice(2 * g, 2 * g + 2)
        torch.testing.assert_close(y[rows], copy.deepcopy(norm)(x[rows]), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(mean[g], x[rows].mean((0, 2, 3)))
        torch.testing.assert_close(var[g], x[rows].var((0, 2, 3)))


def test_without_a_listener_nothing_is_updated():
    norm = layer()
    before = copy.deepcopy(norm.state_dict())
    with ghost_batches(2):
        run_batch_norm(norm, batch())
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())


def test_eval_mode_inside_a_training_model():
    norm, x = layer().eval(), batch()
    norm.running_mean.normal_()
    heard = []
    with ghost_batches(2, heard.append):
        y = run_batch_norm(norm, x)
    torch.testing.assert_close(y, norm(x))
    assert not heard


def test_contexts_nest_and_end():
    norm, x, heard = layer(), batch(rows=12), []
    with ghost_batches(3, lambda report: heard.append(report.mean.shape[0])):
        run_batch_norm(norm, x)
        with ghost_batches(2, lambda report: heard.append(report.mean.shape[0])):
            run_batch_norm(norm, x)
        run_batch_norm(norm, x)
    run_batch_norm(norm, x)
    assert heard == [3, 2, 3] and norm.num_batches_tracked == 1


def test_an_empty_batch_updates_nothing():
    norm = layer()
    before = norm.running_mean.clone()
    assert run_batch_norm(norm, batch(rows=0)).shape == (0, 5, 4, 3)
    assert torch.equal(norm.running_mean, before)


def test_bad_input():
    with pytest.raises(ValueError, match="ghosts is 0; it must be at least 1"), ghost_batches(0):
        pass
    with ghost_batches(4), pytest.raises(ValueError, match=r"ghosts is 4; it must .* divide the 6 rows"):
        run_batch_norm(layer(), batch())
    with pytest.raises(ValueError, match="one value per channel"):
        run_batch_norm(layer(0), batch(0, rows=1))


class _Ops(TorchDispatchMode):
    """Counts the ops that change or compute values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_need_no_ops_of_their_own(dtype):
    """The kernel writes them; what is left is torch's counter of batches."""
    layer, x = nn.BatchNorm2d(5), torch.randn(4, 5, 3, 3).to(dtype)
    with _Ops() as ops:
        run_batch_norm(layer, x)
    assert ops.seen == ["gkt_fast::ghost_batch_norm_tracking", "aten::add_"]
    assert layer.num_batches_tracked == 1 and layer.running_mean.count_nonzero() == 5


def test_running_statistics_in_another_dtype_than_the_kernels_are_updated_as_torch_does():
    layer = nn.BatchNorm1d(5).double()
    other = copy.deepcopy(layer)
    x = torch.randn(6, 5)
    layer.weight = layer.bias = None
    run_batch_norm(layer, x)
    other.weight = other.bias = None
    other(x.double())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, name), getattr(other, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_updates_of_layers_that_count_no_batches(momentum):
    counting, silent = layer(momentum=momentum), layer(momentum=momentum)
    silent.num_batches_tracked = None
    mean, variance = torch.randn(5).double(), torch.rand(5).double()
    update_running_statistics(BatchStatistics(norm, mean, variance) for norm in (counting, silent))
    assert counting.num_batches_tracked == 1 and silent.num_batches_tracked is None
    rate = 1.0 if momentum is None else momentum
    torch.testing.assert_close(counting.running_mean, rate * mean)
    # Without a counter there is no cumulative average: torch leaves the statistics alone.
    torch.testing.assert_close(silent.running_mean, (0.0 if momentum is None else rate) * mean)
