"""Running statistics of many norms in one native call: as torch updates them, and what it leaves to Python."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gkt_fast import GKT, GKTConfig, use_backend
from gkt_fast.batch_norm import statistics as batch_norm_statistics
from gkt_fast.batch_norm.layer import Report
from gkt_fast.batch_norm.statistics import StreamStatistics
from gkt_fast.models import cifar_resnet
from gkt_fast.ops.ghost_batch_norm.running_statistics import FoundStatistics, RunningUpdate, update_on_cpu

MOMENTUM = 0.3


def found(dtype: torch.dtype, together: bool, ghost: int = 1, channels: int = 7) -> FoundStatistics:
    """Of three ghost batches."""
    values = torch.rand(3, 3, channels, dtype=dtype)
    if together:
        return FoundStatistics(values, None, ghost, 1.25)
    return FoundStatistics(values[0], values[2], ghost, 1.25)


def update(dtype: torch.dtype, channels: int = 7) -> RunningUpdate:
    mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype)
    return RunningUpdate(mean, var, MOMENTUM, torch.tensor(4))


def tensors(updates: list[RunningUpdate]) -> list[torch.Tensor]:
    return [tensor for u in updates for tensor in (u.mean, u.var, u.counter) if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("together", [True, False])
def test_by_the_formula_and_in_their_order(dtype, together):
    """One norm twice, and one without a counter."""
    first, silent = update(dtype), update(dtype)._replace(counter=None)
    given = [found(dtype, together, ghost) for ghost in (0, 2, 1)]
    updates = [first, silent, first]
    expected = [tensor.double().clone() for tensor in (first.mean, first.var, silent.mean, silent.var)]
    for f, place in zip(given, (0, 2, 0), strict=True):
        mean = f.mean[0, f.ghost] if together else f.mean[f.ghost]
        var = f.mean[2, f.ghost] if together else f.var[f.ghost]
        expected[place] = (1 - MOMENTUM) * expected[place] + MOMENTUM * mean.double()
        expected[place + 1] = (1 - MOMENTUM) * expected[place + 1] + MOMENTUM * 1.25 * var.double()
    versions = [tensor._version for tensor in tensors([first, silent])]
    assert update_on_cpu(given, updates)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    for ours, theirs in zip((first.mean, first.var, silent.mean, silent.var), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    assert int(first.counter) == 6
    assert all(now._version > before for now, before in zip(tensors([first, silent]), versions, strict=True))


def of_another_dtype(f, u):
    return f, u._replace(mean=u.mean.double())


def strided(f, u):
    return f, u._replace(var=torch.ones(14)[::2])


def of_another_size(f, u):
    return f, u._replace(mean=torch.ones(6), var=torch.ones(6))


def counted_in_floats(f, u):
    return f, u._replace(counter=torch.tensor(4.0))


def no_such_ghost(f, u):
    return f._replace(ghost=3), u


def transposed(f, u):
    return f._replace(mean=torch.rand(3, 7, 3).mT), u


def in_half_precision(f, u):
    return f._replace(mean=f.mean.half()), u


def a_subclass(f, u):
    return f, u._replace(mean=u.mean.as_subclass(type("Own", (torch.Tensor,), {})))


def negated(f, u):
    return f, u._replace(mean=torch.zeros(7, dtype=torch.complex64).conj().imag)


ODD = [
    of_another_dtype, strided, of_another_size, counted_in_floats, no_such_ghost, transposed,
    in_half_precision, a_subclass, negated,
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
def test_nothing_is_written_where_one_does_not_fit(odd):
    """The one before it neither."""
    given = [(found(torch.float32, True), update(torch.float32)) for _ in range(2)]
    given[1] = odd(*given[1])
    updates = [u for _, u in given]
    before = [tensor.clone() for tensor in tensors(updates)]
    assert not update_on_cpu([f for f, _ in given], updates)
    assert all(map(torch.equal, tensors(updates), before))


def test_another_backend_does_not_run_it():
    u = update(torch.float32)
    with use_backend("torch"):
        assert not update_on_cpu([found(torch.float32, True)], [u])
    assert int(u.counter) == 4


@pytest.mark.parametrize("momentum", [0.1, None, 1])
@pytest.mark.parametrize("policy", ["full", "all_streams"])
def test_a_stacked_step_updates_them_as_python_does(policy, momentum, monkeypatch):
    network = cifar_resnet(20, width=4).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    twin = copy.deepcopy(network)
    images, targets = torch.randn(4, 3, 8, 8).double(), torch.arange(4)
    config = GKTConfig(groups=2, execution="stacked", batch_norm=policy)
    heard = []

    def hear(*arguments):
        heard.append(update_on_cpu(*arguments))
        return heard[-1]

    monkeypatch.setattr(batch_norm_statistics, "update_on_cpu", hear)
    gkt = GKT(network, config)
    for step in range(2):
        gkt(images, targets, step=step)
    assert heard[-2:] == (
        [] if momentum is None else [True, True]
    )  # before them a step on trial, under a mode
    monkeypatch.setattr(batch_norm_statistics, "update_on_cpu", lambda *_: False)
    other = GKT(twin, config)
    for step in range(2):
        other(images, targets, step=step)
    for (name, ours), theirs in zip(network.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-14, atol=1e-14, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("execution", ["sequential", "shared", "stacked", "lean", "auto"])
def test_statistics_that_are_no_buffers_are_refused(execution):
    """Subnets, or a step on trial, would write them."""
    network = cifar_resnet(8, width=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            buffers = dict(module._buffers)
            module._buffers.clear()
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
    gkt = GKT(network, GKTConfig(groups=1, execution=execution))
    with pytest.raises((ValueError, RuntimeError), match="running statistics as plain attributes"):
        gkt(torch.randn(4, 3, 8, 8), torch.arange(4), step=0)
    assert not any(m.running_mean.any() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_unbiased_variances_are_taken_as_they_are():
    layer = nn.BatchNorm2d(3)
    statistics = StreamStatistics(all_update=False)
    receive = statistics.receiver([(0, 1), (2,)])
    receive(Report(layer, (torch.full((2, 3), 2.0), torch.full((2, 3), 5.0)), None))
    statistics.update()
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 0.2))
    torch.testing.assert_close(layer.running_var, torch.full((3,), 1.4))
    assert int(layer.num_batches_tracked) == 1
