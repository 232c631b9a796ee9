"""Which device and stream the launchers of the GPU kernels use, with a fake driver layer below them.

Tensors claim to be on cuda:1 while their memory is the CPU's, torch.cuda's current device and streams are recorded
instead of set, and the kernels are replaced by a note of what they were launched with. Proves that every launch happens
with the tensors' device current and on torch's current stream of that device, that the caller's device is current again
afterwards, that scratch memory lives on the tensors' device and is allocated under the same guard and stream, so that
the caching allocator may reuse it as soon as the launch is queued, and that no launcher reads a value from the device.
Does not prove that a driver accepts the launch, nor what runs on the stream.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from cuda_host import build
from helpers.backends import unavailable
from torch.utils._python_dispatch import TorchDispatchMode

from gkt_fast import group_knowledge_loss, use_backend
from gkt_fast.ops import LossOptions, native
from gkt_fast.ops.ghost_batch_norm.native import CudaBackend as CudaNorm
from gkt_fast.ops.ghost_batch_norm.problem import describe, mask_size
from gkt_fast.ops.group_knowledge_loss.native import CudaBackend as CudaLoss
from gkt_fast.ops.group_knowledge_loss.problem import Problem, outputs
from gkt_fast.ops.group_knowledge_loss.triton import TritonBackend as TritonLoss

DEVICE, CALLERS_DEVICE = 1, 0


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on cuda:1; what is made from it claims the same."""

    is_cuda = True
    device = torch.device("cuda", DEVICE)

    def get_device(self) -> int:
        return DEVICE


def on_gpu(tensor: torch.Tensor) -> OnGpu:
    return tensor.as_subclass(OnGpu)


class Driver:
    """torch.cuda's current device and streams, and the launches."""

    def __init__(self) -> None:
        self.device = CALLERS_DEVICE
        self.streams = {0: 0x1000, 1: 0x2000}
        self.launches: list[tuple[str, int, int | None]] = []

    def exchange(self, device: int) -> int:
        """As torch._C._cuda_exchangeDevice: a negative device changes nothing."""
        previous = self.device
        if device >= 0:
            self.device = device
        return previous

    def current_stream(self, device=None) -> SimpleNamespace:
        index = self.device if device is None else torch.device(device).index
        return SimpleNamespace(cuda_stream=self.streams[index])

    def launch(self, name: str, stream: int | None = None) -> None:
        self.launches.append((name, self.device, stream))


class Waits(TorchDispatchMode):
    """Notes the ops that would wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "item", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.WAITING):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def driver(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(torch.cuda, "_exchange_device", fake.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", fake.exchange)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return fake


def build_info() -> dict[str, str]:
    return {"cuda_architectures": "80"}


@contextlib.contextmanager
def no_waiting():
    with Waits() as waits:
        yield
    assert not waits.found


def loss_inputs():
    logits = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    logits, targets = on_gpu(logits), on_gpu(torch.arange(6))
    loss, terms, gradient, _ = outputs(logits, None, with_gradient=True)
    return Problem(LossOptions(), 1.0), logits, targets, None, loss, terms, gradient, None


def norm_inputs(relu=True):
    x = on_gpu(torch.randn(4, 16, 3, 3).contiguous(memory_format=torch.channels_last))
    problem = describe(x, True, 2, relu, 1e-5, False)
    y, statistics = torch.empty_like(x), x.new_empty(3, 2, 16)
    mask = x.new_empty(mask_size(x.shape, True), dtype=torch.uint8)
    weight, bias = x.new_ones(16), x.new_zeros(16)
    gradients = torch.empty_like(x), torch.empty_like(x), x.new_empty(16), x.new_empty(16)
    forward = problem, x, x, weight, bias, None, y, statistics, mask
    backward = problem, x, x, weight, statistics, mask, None, *gradients
    return forward, backward


def test_what_the_fake_driver_does(driver):
    """The guard that the launchers use reaches the fake; a tensor on the CPU leaves the device alone."""
    tensor = on_gpu(torch.zeros(3))
    assert type(tensor.new_empty(2)) is OnGpu and tensor.new_empty(2).device.index == DEVICE
    with torch.cuda.device_of(tensor):
        assert driver.device == DEVICE
    assert driver.device == CALLERS_DEVICE
    with torch.cuda.device_of(torch.zeros(3)):
        assert driver.device == CALLERS_DEVICE


@pytest.mark.parametrize("stream", [0, 0xABCDEF])
def test_stream_handle(driver, stream):
    """The handle is that of the tensor's device, whichever device is current; 0 for tensors on the CPU."""
    driver.streams[DEVICE] = stream
    assert native.cuda_stream(on_gpu(torch.zeros(1))) == stream
    assert native.cuda_stream(torch.zeros(1)) == 0


def test_cuda_loss(driver):
    recorded = []

    def kernel(parameters, workspace, report, stream):
        driver.launch("loss", stream)
        recorded.extend((workspace, report))

    module = SimpleNamespace(
        build_info=build_info,
        GroupKnowledgeLossParams=native.native_module().GroupKnowledgeLossParams,
        group_knowledge_loss_workspace_cuda=lambda parameters: 100,
        group_knowledge_loss_cuda=kernel,
    )
    backend = CudaLoss(module)
    for handle in (0x2000, 0x3000):  # another stream becomes current, as inside torch.cuda.stream(...)
        driver.streams[DEVICE] = handle
        with no_waiting():
            problem, *tensors = loss_inputs()
            backend.forward(problem, *tensors)
        assert driver.launches.pop() == ("loss", DEVICE, handle)
        assert driver.device == CALLERS_DEVICE
        assert all(tensor.device == OnGpu.device for tensor in tensors if tensor is not None)
    assert all(address % 8 == 0 and address for address in recorded)


def test_triton_loss(driver, monkeypatch):
    """Triton itself asks torch for the current stream of the current device: that part is not run here."""
    from gkt_fast.kernels.triton import group_knowledge_loss as kernels

    tensors_of = {"count_kernel": 2, "group_knowledge_loss_kernel": 8, "finish_kernel": 5}
    for name, count in tensors_of.items():

        def launch(*arguments, name=name, count=count, **options):
            driver.launch(name)
            tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
            assert len(tensors) == count and all(tensor.device == OnGpu.device for tensor in tensors)

        monkeypatch.setattr(kernels, name, Launcher(launch))
    with no_waiting():
        TritonLoss().forward(*loss_inputs())
    assert driver.launches == [(name, DEVICE, None) for name in tensors_of]
    assert driver.device == CALLERS_DEVICE


class Launcher:
    """A stand-in for a `@triton.jit` function: kernel[grid](arguments)."""

    def __init__(self, launch) -> None:
        self.launch = launch

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return self.launch


def test_cuda_norm(driver):
    scratch = []

    def kernel(name):
        def launch(*arguments):
            driver.launch(name, arguments[-1])
            scratch.append(arguments[-2])

        return launch

    prepared = SimpleNamespace(
        forward_cuda=kernel("forward"), backward_cuda=kernel("backward"), workspace_cuda=lambda: 100
    )
    backend = CudaNorm(SimpleNamespace(build_info=build_info, GhostBatchNorm=lambda *_: prepared))
    forward, backward = norm_inputs()
    driver.streams[DEVICE] = 0x3000
    with no_waiting():
        backend.forward(*forward)
        backend.backward(*backward)
    assert driver.launches == [("forward", DEVICE, 0x3000), ("backward", DEVICE, 0x3000)]
    assert driver.device == CALLERS_DEVICE
    assert [memory.numel() for memory in scratch] == [100, 100]


@pytest.mark.parametrize("relu", [True, False])
def test_triton_norm(driver, monkeypatch, relu):
    """Triton itself asks torch for the current stream of the current device: that part is not run here."""
    from gkt_fast.kernels.triton import ghost_batch_norm as kernels

    names = "sums_kernel", "merge_statistics_kernel", "merge_gradients_kernel", "affine_kernel"
    for name in names:

        def launch(*arguments, name=name, **options):
            driver.launch(name)
            tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
            assert tensors and all(tensor.device == OnGpu.device for tensor in tensors)

        monkeypatch.setattr(kernels, name, Launcher(launch))
    forward, backward = norm_inputs(relu)
    with no_waiting():
        kernels.forward(*forward)
        kernels.backward(*backward)
    launched = ["sums", "merge_statistics", "affine", "sums", "merge_gradients", "affine"]
    assert driver.launches == [(f"{name}_kernel", DEVICE, None) for name in launched]
    assert driver.device == CALLERS_DEVICE


def test_the_launches_of_a_repeated_step_are_the_same(driver):
    """What a replayed graph relies on: sizes alone decide what is launched, with which parameters."""
    calls = []

    def prepare(*description):
        def launch(*arguments):
            addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            calls.append((*description, *addresses))

        return SimpleNamespace(forward_cuda=launch, workspace_cuda=lambda: 100)

    backend = CudaNorm(SimpleNamespace(build_info=build_info, GhostBatchNorm=prepare))
    forward, _ = norm_inputs()
    for scale in (1.0, float("nan")):
        forward[1].mul_(scale)
        backend.forward(*forward)
    without_scratch = [(*call[:-2], call[-1]) for call in calls]
    assert without_scratch[0] == without_scratch[1]


def test_more_classes_than_the_cuda_loss_can_count():
    """All classes are one number in memory, which the kernel is never launched to read."""
    if reason := build.missing_tools():
        unavailable("cuda-host", reason)
    build.register("group_knowledge_loss", CudaLoss)
    logits = torch.zeros(1).expand(1, 1, 2**30 + 1)
    with use_backend("cuda-host"), pytest.raises(ValueError, match=r"1073741825 classes.*at most 2\^30"):
        group_knowledge_loss(logits, torch.zeros(1, dtype=torch.int64), groups=0)
