"""A training step where no tensor has values: nothing may ask for one, and nothing may cross to or from the host.

Whole steps run on the meta device, and forward passes on fake CUDA tensors (FakeTensorMode), whose backward pass
autograd doesn't start without a GPU. Both run the host's side of everything, with shapes, dtypes and devices but
without memory or kernels, and refuse what needs a value: `item()`, `nonzero()`, `if tensor:`. Proves that the package's
own Python and the ops that it calls neither wait for the device nor copy between devices, which a CUDA graph of the
step needs. Does not prove that a graph is captured and replays, nor anything of what runs below the ops: the launchers
of the package's own kernels are in test_streams_and_devices.py.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gkt_fast import GKT, GKTConfig, GKTTrainer, LinearWarmup
from gkt_fast.models import cifar_resnet


class Crossings(TorchDispatchMode):
    """Notes every op that has a tensor with dimensions on the CPU and another on the GPU, and what was run at all."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.crossing: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.ops.add(str(function))
        copies = "copy" in str(function)  # a number on the CPU may be an argument, but not be copied
        if len({tensor.device.type for tensor in tensors if tensor.dim() or copies}) > 1:
            self.crossing.add(str(function))
        return result


def note(make_step, device: str) -> Crossings:
    """What step = make_step() runs on a device without values: "meta", or "cuda" for fake CUDA tensors."""
    fake = FakeTensorMode() if device == "cuda" else contextlib.nullcontext()
    with fake, torch.device(device):
        step = make_step()
        with Crossings() as crossings:
            step()
    return crossings


def gkt_step(execution: str, backward: bool, **options):
    model = cifar_resnet(20, num_classes=10).train()
    gkt = GKT(model, GKTConfig(groups=2, loops=2, execution=execution, **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, targets = torch.empty(4, 3, 16, 16), torch.empty(4, dtype=torch.int64)

    def step():
        loss = gkt(images, targets).loss
        if backward:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


@pytest.mark.parametrize("batch_norm", ["full", "all_streams"])
@pytest.mark.parametrize("execution", ["sequential", "shared", "stacked", "lean"])
def test_a_step_neither_waits_nor_copies(execution, batch_norm):
    crossings = note(lambda: gkt_step(execution, True, batch_norm=batch_norm), "meta")
    assert not crossings.crossing
    assert "aten.convolution_backward.default" in crossings.ops
    if execution == "stacked":
        assert "gkt_fast.ghost_batch_norm_backward.default" in crossings.ops


def trainer_step(execution: str, accumulate: int):
    """`GKTTrainer.step` and the metrics of `fit`, with all options; the host's own counters live on the CPU."""
    model = cifar_resnet(20, num_classes=10)
    images, targets = torch.empty(4, 3, 16, 16), torch.empty(4, dtype=torch.int64)
    with torch.device("cpu"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = GKTTrainer(
            model,
            optimizer,
            GKTConfig(groups=2, loops=2, execution=execution),
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
            scheduler_interval="step",
            accumulate=accumulate,
            clip_grad_norm=1.0,
            ema_decay=0.9,
            kd_schedule=LinearWarmup(10),
            skip_nonfinite=True,
        )

    def step():
        for number in range(2 * accumulate):
            trainer.metrics.update(trainer.step(images, targets), number)

    step()  # the first average is a copy, for which torch reads its own counter
    return step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("execution", ["sequential", "shared", "stacked", "lean"])
def test_a_trainers_step_neither_waits_nor_copies(execution, accumulate):
    crossings = note(lambda: trainer_step(execution, accumulate), "meta")
    assert not crossings.crossing
    assert {
        "aten.linalg_vector_norm.default",
        "aten._foreach_lerp_.Scalar",
        "aten.where.self",
    } <= crossings.ops


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by what counts FLOPs, once
@pytest.mark.parametrize("execution", ["shared", "stacked"])
def test_a_forward_pass_on_cuda_neither_waits_nor_copies(execution):
    crossings = note(lambda: gkt_step(execution, False), "cuda")
    assert not crossings.crossing
    norm = "ghost_batch_norm" if execution == "stacked" else "ghost_batch_norm_tracking"
    ours = {f"gkt_fast.{norm}.default", "gkt_fast.group_knowledge_loss.default"}
    assert {*ours, "aten.convolution.default"} <= crossings.ops


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool(x.any())])
def test_what_waits_is_refused(wait, device):
    def make_step():
        value = torch.empty(3)
        return lambda: wait(value)

    with pytest.raises((RuntimeError, NotImplementedError)):
        note(make_step, device)


@pytest.mark.parametrize("copy", [lambda x: x.cpu(), lambda x: x.copy_(torch.ones(3, device="cpu"))])
def test_what_copies_is_noted(copy):
    def make_step():
        value = torch.empty(3)
        return lambda: copy(value)

    assert note(make_step, "cuda").crossing
