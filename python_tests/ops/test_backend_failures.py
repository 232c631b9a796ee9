"""What happens where a backend can't run after all: the GPU or its driver doesn't fit, or Triton fails to compile.

There is no such GPU, driver or compiler here. Errors are planted: in the module that says what GPU there is, in the
host runtime's launches, or in what Triton raises. Not proven is that CUDA and Triton report these conditions in these
ways, and that torch's own kernels still run on a GPU after one.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from cuda_host import build
from helpers.backends import unavailable
from helpers.ghost_batch_norm_formula import make

from gkt_fast import GKT, GKTConfig, ghost_batch_norm, group_knowledge_loss, use_backend
from gkt_fast.models import cifar_resnet
from gkt_fast.ops import BackendError, explain, native, registry
from gkt_fast.ops.ghost_batch_norm.native import CudaBackend
from gkt_fast.ops.ghost_batch_norm.reference import TorchBackend
from gkt_fast.ops.triton import reporting_failures

OPS = ("ghost_batch_norm", "group_knowledge_loss")
INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE, UNSUPPORTED_PTX, ILLEGAL_ADDRESS = 35, 209, 222, 700


@pytest.fixture(autouse=True)
def private_registry():
    with registry.isolated():
        yield


class Failing:
    """A backend of either op that fails whenever it is called, and counts how often that was.

    Args:
        error: what it raises.
        forward: a function for the forward pass of ghost_batch_norm, so that only the backward pass fails.
    """

    def __init__(self, error: Exception, forward=None) -> None:
        self.calls, self._error, self._forward = 0, error, forward

    def __call__(self, *arguments: object):
        self.calls += 1
        raise self._error

    def forward(self, *arguments: object):
        return self(*arguments) if self._forward is None else self._forward(*arguments)

    backward = __call__

    def replace(self, op: str, backend: str = "cpp") -> Failing:
        """Puts it in the place of a backend that CPU tensors would run on."""
        dtypes = registry.find(op, "torch").dtypes
        registry.register(registry.Implementation(op, backend, ("cpu",), dtypes, lambda: self))
        return self


def loss_and_gradient(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = logits.clone().requires_grad_()
    loss, terms = group_knowledge_loss(logits, torch.arange(logits.shape[1]), loops=2, normalize_logits=True)
    return loss.detach(), terms, torch.autograd.grad(3 * loss, logits)[0]


def norm_and_gradients() -> tuple[torch.Tensor, ...]:
    tensors = make((6, 3, 4, 4))
    inputs = [tensors[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]
    y, mean, var = ghost_batch_norm(*inputs[:3], ghosts=2, residual=inputs[3])
    return y.detach(), mean, var, *torch.autograd.grad(y, inputs, tensors["grad_y"])


def test_the_environment_is_asked_at_every_call(monkeypatch):
    x = torch.randn(4, 3)
    backend = registry.select("ghost_batch_norm", x.device, x.dtype)
    assert registry.requested_backend() is None
    for name in ("torch", "cpp"):
        monkeypatch.setenv("GKT_BACKEND", name)
        assert registry.requested_backend() == name
    monkeypatch.setenv("GKT_BACKEND", "torch")
    assert isinstance(registry.select("ghost_batch_norm", x.device, x.dtype), TorchBackend)
    monkeypatch.setenv("GKT_BACKEND", "abacus")
    with pytest.raises(ValueError, match="GKT_BACKEND is 'abacus'"):
        norm_and_gradients()
    monkeypatch.delenv("GKT_BACKEND")
    assert registry.select("ghost_batch_norm", x.device, x.dtype) is backend


@pytest.mark.parametrize("error", [BackendError("no compiler"), NotImplementedError("no kernel image")])
def test_a_failing_backend_is_given_up_once_in_training(error, caplog):
    """The step goes on with the next backend and gives its numbers; later steps don't try the other one again."""
    failing = [Failing(error).replace(op) for op in OPS]
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    losses = []
    for backend in (None, "torch"):
        torch.manual_seed(0)
        gkt = GKT(cifar_resnet(14, num_classes=4, width=4), GKTConfig(execution="stacked"))
        with use_backend(backend), caplog.at_level(logging.WARNING, "gkt_fast"):
            for step in range(3):
                output = gkt(images, targets, step=step)
                output.loss.backward()
                losses.append(output.loss.detach())
        losses += [p.grad for p in gkt.model.parameters()]
    half = len(losses) // 2
    for actual, wanted in zip(losses[:half], losses[half:], strict=True):
        torch.testing.assert_close(actual, wanted)
    assert [backend.calls for backend in failing] == [1, 1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    for op, message in zip(OPS, sorted(messages), strict=True):
        assert message == f"{op} on cpu torch.float32 no longer runs on 'cpp', which failed: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_call_that_fails_gives_the_result_of_the_next_backend(dtype):
    """Without autograd and with it, in a step that has begun on the backend that fails."""
    logits = torch.randn(7, 5, 9).to(dtype)
    with use_backend("torch"):
        wanted = loss_and_gradient(logits)
    Failing(BackendError("x")).replace("group_knowledge_loss")
    for actual, reference in zip(loss_and_gradient(logits), wanted, strict=True):
        torch.testing.assert_close(actual, reference)
    Failing(BackendError("x")).replace("group_knowledge_loss")
    loss, _ = group_knowledge_loss(logits, torch.arange(5), loops=2, normalize_logits=True)
    torch.testing.assert_close(loss, wanted[0])


def test_a_failure_inside_a_compiled_graph_falls_back():
    failing = Failing(BackendError("x")).replace("group_knowledge_loss")
    logits = torch.randn(4, 5, 9, requires_grad=True)
    targets = torch.arange(5)
    compiled = torch.compile(
        lambda z: group_knowledge_loss(2 * z, targets)[0], fullgraph=True, backend="aot_eager"
    )
    gradients = [torch.autograd.grad(compiled(logits), logits)[0] for _ in range(2)]
    with use_backend("torch"):
        wanted = torch.autograd.grad(group_knowledge_loss(2 * logits, targets)[0], logits)[0]
    for gradient in gradients:
        torch.testing.assert_close(gradient, wanted)
    assert failing.calls == 1


def test_a_backward_pass_that_fails_falls_back():
    with use_backend("torch"):
        wanted = norm_and_gradients()
    failing = Failing(BackendError("only backward"), TorchBackend().forward).replace("ghost_batch_norm")
    for _ in range(2):
        for actual, reference in zip(norm_and_gradients(), wanted, strict=True):
            torch.testing.assert_close(actual, reference)
    assert failing.calls == 1


def test_an_explicit_choice_raises_with_the_reason_and_fails_once(caplog):
    failing = Failing(BackendError("the compiler is missing")).replace("group_knowledge_loss")
    message = "backend 'cpp' can't run group_knowledge_loss on cpu tensors of torch.float32: the compiler is missing"
    for _ in range(2):
        with use_backend("cpp"), pytest.raises(BackendError, match=f"^{message}$"):
            loss_and_gradient(torch.randn(7, 5, 9))
    assert failing.calls == 1
    assert not caplog.records
    loss_and_gradient(torch.randn(7, 5, 9))
    assert failing.calls == 1


def test_what_failed_is_told_by_env_and_forgotten_when_registered_anew():
    failing = Failing(BackendError("no room")).replace("ghost_batch_norm")
    norm_and_gradients()
    status = {(row["op"], row["backend"]): row["status"] for row in explain()}
    assert status["ghost_batch_norm", "cpp"] == "failed for torch.float32 on cpu: no room"
    assert status["group_knowledge_loss", "torch"] == "ok"
    failing.replace("ghost_batch_norm")
    norm_and_gradients()
    assert failing.calls == 2


def test_other_errors_are_not_taken_for_a_backend_that_does_not_work():
    failing = Failing(RuntimeError("illegal memory access")).replace("group_knowledge_loss")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            loss_and_gradient(torch.randn(7, 5, 9))
    assert failing.calls == 2


def test_a_backend_whose_loading_breaks_is_unavailable():
    def load():
        raise AttributeError("half an installation")

    dtypes = registry.find("ghost_batch_norm", "cpp").dtypes
    registry.register(registry.Implementation("ghost_batch_norm", "cpp", ("cpu",), dtypes, load))
    norm_and_gradients()
    with use_backend("cpp"), pytest.raises(BackendError, match="AttributeError: half an installation"):
        norm_and_gradients()


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ("80, 90, 100", (8, 0), True),
        ("80, 90, 100", (8, 6), True),
        ("80, 90, 100", (12, 0), True),  # PTX of 10.0
        ("80, 90, 100", (7, 5), False),
        ("90-real", (9, 0), True),
        ("90-real", (10, 0), False),
        ("86-real", (8, 0), False),
        ("80-virtual", (9, 0), True),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
        ("native", (7, 5), True),  # not known before the launch
    ],
)
def test_compute_capability(architectures, capability, fits, monkeypatch):
    module = types.SimpleNamespace(build_info=lambda: {"cuda": "13.0", "cuda_architectures": architectures})
    monkeypatch.setattr(native, "native_module", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    native.check_capability.cache_clear()
    if fits:
        assert native.native_cuda_module() is module
    else:
        version = f"{capability[0]}.{capability[1]}"
        with pytest.raises(
            BackendError, match=f"compute capability {version}, .* built for {architectures} "
        ):
            native.native_cuda_module()


def test_each_gpu_is_asked_once_for_its_capability(monkeypatch):
    """On a machine with different GPUs the kernels run on those that they were built for."""
    asked = []

    def capability(device: int) -> tuple[int, int]:
        asked.append(device)
        return (9, 0) if device == 0 else (7, 5)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    native.check_capability.cache_clear()
    for _ in range(3):
        native.check_capability("80-real, 90", 0)
    with pytest.raises(BackendError, match=r"compute capability 7\.5"):
        native.check_capability("80-real, 90", 1)
    assert asked == [0, 1]
    native.check_capability.cache_clear()


def test_one_of_two_gpus_is_enough(monkeypatch):
    module = types.SimpleNamespace(build_info=lambda: {"cuda": "13.0", "cuda_architectures": "80-real, 90"})
    monkeypatch.setattr(native, "native_module", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (9, 0)][device])
    native.check_capability.cache_clear()
    assert native.native_cuda_module() is module
    native.check_capability.cache_clear()


def test_a_gpu_that_no_kernel_fits_is_given_up_alone_and_named_once(caplog, monkeypatch):
    """Two GPUs, of which one is too old: all ops leave the backend there, none on the other one."""
    devices, calls = [torch.device("cuda", index) for index in (0, 1)], []

    class Native:
        def forward(self, device):
            if device.index == 1:
                raise registry.UnfitDevice("compute capability 7.5")
            return "native"

    class Torch:
        def forward(self, device):
            return "torch"

    monkeypatch.setitem(registry.ORDER, "cuda", ("cuda", "torch"))
    dtypes = (torch.float32, torch.bfloat16)
    for op in OPS:
        registry.register(registry.Implementation(op, "cuda", ("cuda",), dtypes, Native))
        registry.register(registry.Implementation(op, "torch", ("cuda",), dtypes, Torch))

    def run(op, device, dtype):
        def call(backend):
            calls.append((op, dtype, device.index, type(backend).__name__))
            return backend.forward(device)

        return registry.run(op, device, dtype, call)

    with caplog.at_level(logging.WARNING, "gkt_fast"):
        for _ in range(2):
            for op in OPS:
                for dtype in dtypes:
                    assert [run(op, device, dtype) for device in devices] == ["native", "torch"]
    assert [call for call in calls if call[2:] == (1, "Native")] == [(OPS[0], torch.float32, 1, "Native")]
    assert [record.getMessage() for record in caplog.records] == [
        "no op runs on 'cuda' on cuda:1: compute capability 7.5"
    ]
    assert registry.reason_against(OPS[1], "cuda", devices[1], torch.bfloat16) == "compute capability 7.5"
    assert registry.reason_against(OPS[1], "cuda", devices[0], torch.bfloat16) is None
    told = {row["op"]: row["status"] for row in explain() if row["backend"] == "cuda"}
    assert told[OPS[0]].startswith("no op runs on cuda:1: compute capability 7.5")
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match=r"on cuda:1 tensors of .*: compute capability 7\.5"),
    ):
        run(OPS[0], devices[1], torch.float32)


@pytest.mark.parametrize(
    ("code", "unsupported"),
    [(INSUFFICIENT_DRIVER, True), (NO_KERNEL_IMAGE, True), (UNSUPPORTED_PTX, True), (ILLEGAL_ADDRESS, False)],
)
def test_a_launch_that_the_driver_refuses(code, unsupported):
    """From the launch through the C interface and the bindings to the registry, by the host runtime."""
    if reason := build.missing_tools():
        unavailable("cuda-host", reason)
    build.register("ghost_batch_norm", CudaBackend)
    with build.refusing_launches(build.native_module(), code), use_backend("cuda-host"):
        error = BackendError if unsupported else RuntimeError
        with pytest.raises(error, match="kernel launch: ") as raised:
            norm_and_gradients()
    assert (raised.type is BackendError) == unsupported
    with use_backend("torch"):
        wanted = norm_and_gradients()
    if not unsupported:
        with use_backend("cuda-host"):  # the next launch works again
            for actual, reference in zip(norm_and_gradients(), wanted, strict=True):
                torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "C compiler",
        ),
        (FileNotFoundError("[Errno 2] No such file or directory: 'ptxas'"), "ptxas"),
        (IndexError("map::at"), "IndexError: map::at"),
        (
            ValueError("at 3:4:\n    x = tl.load(p)\n        ^\nbf16 is not supported\n"),
            "bf16 is not supported$",
        ),
    ],
)
def test_what_triton_raises_is_the_reason(error, reason):
    def launch(*arguments: object):
        raise error

    with pytest.raises(BackendError, match=reason) as raised:
        reporting_failures(launch)(1)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    ("message", "transient"),
    [
        ("an illegal memory access was encountered", True),
        ("out of memory", True),
        ("unspecified launch failure", True),
        ("no kernel image is available for execution on the device", False),
        ("device kernel image is invalid", False),
        ("the provided PTX was compiled with an unsupported toolchain.", False),
        ("a PTX JIT compilation failed", False),
    ],
)
def test_what_the_driver_reports_is_not_tritons_fault_unless_kernels_do_not_fit(message, transient):
    def launch():
        raise RuntimeError(f"Triton Error [CUDA]: {message}")

    with pytest.raises(RuntimeError, match="Triton Error") as raised:
        reporting_failures(launch)()
    assert (raised.type is BackendError) == (not transient)


def test_running_out_of_memory_is_not_tritons_fault():
    def launch():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        reporting_failures(launch)()


SCRIPT = """
import logging, torch
logging.basicConfig(format="%(message)s")
from gkt_fast import ghost_batch_norm, group_knowledge_loss
from gkt_fast.ops import registry
registry.ORDER["cpu"] = ("triton", "torch")
for op in ("ghost_batch_norm", "group_knowledge_loss"):
    found = registry.find(op, "triton")
    registry.register(registry.Implementation(op, "triton", ("cpu",), found.dtypes, found.load))
for _ in range(2):
    x = torch.randn(6, 3, 4, 4, requires_grad=True)
    ghost_batch_norm(x, None, None, ghosts=2)[0].square().sum().backward()
    logits = torch.randn(4, 5, 9, requires_grad=True)
    group_knowledge_loss(logits, torch.arange(5))[0].backward()
    print(bool(x.grad.isfinite().all() and logits.grad.isfinite().all()))
"""


def test_triton_that_really_fails():
    """On a machine without a GPU Triton finds no driver when it launches: a failure of its own, not planted."""
    if torch.cuda.is_available():
        unavailable("triton", "a GPU is here, on which Triton works")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "True"]
    told = [line for line in result.stderr.splitlines() if "no longer runs on 'triton'" in line]
    assert len(told) == 2 and all("RuntimeError" in line for line in told), result.stderr
