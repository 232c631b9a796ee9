"""What a call of group_knowledge_loss launches on a GPU, and what it does there about class indices out of range."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_host import build
from helpers.backends import running_on, unavailable
from torch.utils._python_dispatch import TorchDispatchMode

from gkt_fast import GKTTrainer, group_knowledge_loss
from gkt_fast.instruments.op_counts import NO_KERNEL
from gkt_fast.models import cifar_resnet
from gkt_fast.ops import GroupKnowledge, LossOptions, wrong_class_index
from gkt_fast.ops.group_knowledge_loss.class_indices import report_on
from gkt_fast.ops.group_knowledge_loss.native import CudaBackend
from gkt_fast.ops.group_knowledge_loss.problem import Problem, outputs
from gkt_fast.training.nonfinite import NonFiniteLossError


@pytest.fixture(params=["triton", "cuda-host"])
def backend(request):
    if request.param == "cuda-host":
        if reason := build.missing_tools():
            unavailable("cuda-host", reason)
        build.register("group_knowledge_loss", CudaBackend)
    wrong_class_index("cpu")
    with running_on("group_knowledge_loss", request.param):
        yield request.param
    wrong_class_index("cpu")


class Kernels(TorchDispatchMode):
    """Notes the torch ops that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not (name in NO_KERNEL or name == "aten::detach" or function.is_view):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def arguments(probabilities: bool, apart: bool) -> tuple:
    logits, full = torch.randn(3, 4, 9), torch.randn(6, 9) if apart else None
    batch = 6 if apart else 4
    targets = torch.rand(batch, 9) if probabilities else torch.arange(batch)
    report_on(logits)  # made once per device
    options = LossOptions(groups=3 if apart else 2, normalize_logits=True, subnet_ce_weight=0.5)
    loss, terms, gradient, full_gradient = outputs(logits, full, with_gradient=True)
    gradients = gradient, full_gradient if apart else None
    return Problem(options, 1.0), logits, targets, full, loss, terms, *gradients


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("probabilities", "launches"), [(False, 3), (True, 2)])
def test_launches_of_the_cuda_kernels(probabilities, launches, apart):
    """Rows are counted, the loss is computed, its parts are added up; probabilities need no counting."""
    if reason := build.missing_tools():
        unavailable("cuda-host", reason)
    module = build.native_module()
    given = arguments(probabilities, apart)
    with build.count_traffic(module) as rows, Kernels() as kernels:
        CudaBackend(module).forward(*given)
    assert len({row.kernel for row in rows}) == launches
    assert kernels.names == []


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("probabilities", "launches"), [(False, 3), (True, 2)])
def test_launches_of_the_triton_kernels(monkeypatch, probabilities, launches, apart):
    from gkt_fast.kernels.triton import group_knowledge_loss as launcher

    from gkt_fast.ops.group_knowledge_loss.triton import TritonBackend

    launched = []

    class Launcher:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(self.name)

    for name in ("count_kernel", "group_knowledge_loss_kernel", "finish_kernel"):
        monkeypatch.setattr(launcher, name, Launcher(name))
    backend, given = TritonBackend(), arguments(probabilities, apart)
    with Kernels() as kernels:
        backend.forward(*given)
    assert len(launched) == launches
    assert kernels.names == []


@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 2, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_a_class_index_out_of_range(backend, shape, wrong):
    """The loss and every gradient of a cross entropy are NaN, whatever counts; the index is told, once."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    targets = torch.randint(0, shape[2], (shape[1], *shape[3:]), generator=generator)
    assert group_knowledge_loss(logits, targets)[0].isfinite() and wrong_class_index("cpu") is None
    targets.view(-1)[1] = wrong
    for options in ({}, {"ce_weight": 0.0}, {"subnet_ce_weight": 0.5}):
        leaf = logits.clone().requires_grad_()
        loss, terms = group_knowledge_loss(leaf, targets, **options)
        loss.backward()
        assert loss.isnan() and terms[0].isnan()
        assert leaf.grad[0].isnan().all() or options == {"ce_weight": 0.0}
        assert not options.get("subnet_ce_weight") or leaf.grad.isnan().all()
        words = f"targets has class index {wrong}; it must lie in [0, {shape[2]}) or equal ignore_index"
        assert wrong_class_index("cpu") == words
        assert wrong_class_index("cpu") is None


def test_a_wrong_class_index_among_the_rows_of_the_full_network_alone(backend):
    logits, full = torch.randn(3, 2, 7), torch.randn(5, 7)
    loss, _ = group_knowledge_loss(logits, torch.tensor([0, 1, 2, 9, 3]), full_logits=full)
    assert loss.isnan() and "class index 9" in wrong_class_index("cpu")


def test_overflow_of_the_variance_shows(backend, monkeypatch):
    """On the CPU it is refused before; on a GPU nothing is read."""
    from gkt_fast.ops.group_knowledge_loss import op

    monkeypatch.setattr(op, "check_values", lambda *arguments, **options: None)
    logits = torch.randn(4, 3, 7)
    logits[1, 2, 4] = -1e30
    assert group_knowledge_loss(logits, torch.arange(3), normalize_logits=True)[0].isnan()
    assert group_knowledge_loss(logits, torch.arange(3))[0].isfinite()


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 3)


def test_plain_torch_on_a_gpu_tells_as_well():
    leaf = torch.randn(4, 7, requires_grad=True)
    targets = torch.tensor([0, 9, 12, -100])
    logits, targets = leaf.as_subclass(OnGpu), targets.as_subclass(OnGpu)
    knowledge = GroupKnowledge()
    assert knowledge.cross_entropy(logits, targets.clamp(max=6)).isfinite()
    assert wrong_class_index("cuda:3") is None
    loss = knowledge.cross_entropy(logits, targets)
    loss.backward()
    assert loss.isnan() and leaf.grad[:3].isnan().all()
    assert "class index 12; it must lie in [0, 7)" in wrong_class_index("cuda:3")
    assert wrong_class_index("cuda:3") is None


def test_training_stops_with_the_class_index():
    """The report is read where the losses are: when one of them was NaN."""
    model = cifar_resnet(8, num_classes=5, width=4)
    trainer = GKTTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = [(torch.full((4, 3, 8, 8), math.nan), torch.zeros(4, dtype=torch.int64))]
    report_on(torch.zeros(1)).copy_(torch.tensor([7, 5]))
    with pytest.raises(NonFiniteLossError, match=r"On rank 0 targets has class index 7; .* \[0, 5\)"):
        trainer.fit(batches, epochs=1)
