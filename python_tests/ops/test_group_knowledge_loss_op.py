"""group_knowledge_loss as a torch op: compile, transforms, autocast, backends; and its answers to bad input."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.backends import running_on

import gkt_fast.ops.group_knowledge_loss.op  # noqa: F401  registers the op
from gkt_fast import GroupKnowledgeLoss, group_knowledge_loss, use_backend
from gkt_fast.ops import GroupKnowledge, LossOptions, group_knowledge_loss_reference, registry

OP = torch.ops.gkt_fast.group_knowledge_loss.default


def problem(*shape, requires_grad=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)
    targets = torch.randint(0, shape[2], (shape[1], *shape[3:]), generator=generator)
    return logits, targets


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    with running_on("group_knowledge_loss", request.param):
        yield request.param


def op_arguments(logits, targets, with_gradient=True, full_logits=None, **options):
    return (logits, targets, full_logits, *LossOptions(**options).flatten(), with_gradient, 1.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    with running_on("group_knowledge_loss", "cpp"):
        for shape in [(4, 5, 7), (4, 2, 5, 3, 2)]:
            logits, targets = problem(*shape, requires_grad=requires_grad)
            torch.library.opcheck(OP, op_arguments(logits, targets, normalize_logits=True))
        logits, targets = problem(4, 5, 7)
        torch.library.opcheck(
            OP, op_arguments(logits, targets.new_ones(5, 7).float() / 7, with_gradient=False)
        )


def test_compiles_without_graph_break(backend):
    logits, targets = problem(4, 6, 9, requires_grad=True)
    weight = torch.ones((), requires_grad=True)

    def training_step(logits, weight):
        loss, terms = group_knowledge_loss(logits * weight, targets, normalize_logits=True)
        return loss * 2, terms

    compiled = torch.compile(training_step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (training_step, compiled):
        loss, terms = function(logits, weight)
        gradients = torch.autograd.grad(loss, (logits, weight))
        assert not terms.requires_grad
        results.append((loss.detach(), terms, *gradients))
    for eager, from_graph in zip(*results, strict=True):
        torch.testing.assert_close(from_graph, eager)


def test_func_grad(backend):
    logits, targets = problem(4, 6, 9, requires_grad=True)
    wanted = torch.autograd.grad(group_knowledge_loss(logits, targets)[0], logits)[0]
    got = torch.func.grad(lambda z: group_knowledge_loss(z, targets)[0])(logits.detach())
    torch.testing.assert_close(got, wanted)


def test_autocast(backend):
    features, targets = torch.randn(24, 8, requires_grad=True), torch.arange(6)
    layer = torch.nn.Linear(8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(features).view(4, 6, 9)
        loss, terms = group_knowledge_loss(logits, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == terms.dtype == torch.float32
    loss.backward()
    assert features.grad.dtype == torch.float32 and features.grad.abs().sum() > 0


def test_no_gradient_is_computed_where_none_is_needed():
    with running_on("group_knowledge_loss", "cpp"):
        logits, targets = problem(4, 6, 9)
        loss, _, gradient, _ = OP(*op_arguments(logits, targets, with_gradient=False))
        assert gradient.numel() == 0
        with torch.no_grad():
            again, _ = group_knowledge_loss(logits.requires_grad_(), targets)
        assert not again.requires_grad and torch.equal(loss, again)


def test_differentiating_twice():
    logits, targets = problem(4, 6, 9, requires_grad=True)
    with running_on("group_knowledge_loss", "cpp"):
        loss, _ = group_knowledge_loss(logits, targets)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated twice"):
            gradient.square().sum().backward()
    double, targets = problem(4, 3, 5, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda z: group_knowledge_loss_reference(z, targets, ce_weight=1.0, kd_weight=0.0)[0], double
    )


def test_results_can_be_copied(backend):
    logits, targets = problem(4, 6, 9)
    results = group_knowledge_loss(logits, targets)
    for copied in (copy.deepcopy(results), pickle.loads(pickle.dumps(results))):
        assert all(torch.equal(a, b) for a, b in zip(results, copied, strict=True))


def test_module(backend):
    logits, targets = problem(3, 6, 9, requires_grad=True)
    module = GroupKnowledgeLoss(groups=2, temperature=3.0, normalize_logits=True)
    wanted = group_knowledge_loss(logits, targets, groups=2, temperature=3.0, normalize_logits=True)
    for face in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for got, want in zip(face(logits, targets), wanted, strict=True):
            torch.testing.assert_close(got, want)
    assert "temperature=3.0" in repr(module) and not module.state_dict()


def test_any_number_of_threads_gives_the_same_bits():
    with running_on("group_knowledge_loss", "cpp"):
        before = torch.get_num_threads()
        try:
            for shape in [(4, 611, 150), (4, 700, 21), (4, 3, 21, 37, 41)]:
                logits, targets = problem(*shape, requires_grad=True)
                results = []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    loss, terms = group_knowledge_loss(logits, targets, normalize_logits=True)
                    results.append((loss, terms, *torch.autograd.grad(loss, logits)))
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_lower_instruction_sets(instruction_set):
    """The choice is made once per process, so each gets its own, which runs the cpp tests."""
    with running_on("group_knowledge_loss", "cpp"):
        pass
    selection = "cpp and (formula or dtypes or layouts or large)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection]
    result = subprocess.run(
        [*command, os.path.join(os.path.dirname(__file__), "test_group_knowledge_loss.py")],
        env={**os.environ, "GKT_ISA": instruction_set, "GKT_REQUIRE": "cpp"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_outputs_are_written_whole(monkeypatch):
    """What the allocator hands out is full of NaN."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    with running_on("group_knowledge_loss", "cpp"):
        for shape in [(4, 17, 5), (4, 3, 130), (4, 3, 7, 5, 11)]:
            logits, targets = problem(*shape)
            for result in OP(*op_arguments(logits, targets)):
                assert result.isfinite().all()


def test_explicit_backend_that_does_not_exist():
    logits, targets = problem(4, 6, 9)
    with use_backend("cuda"), pytest.raises(registry.BackendError, match="cuda"):
        group_knowledge_loss(logits, targets)


LOGITS, TARGETS = problem(4, 6, 9)
BAD = {
    "logits not a tensor": ({"logits": [1.0]}, TypeError, "logits is a list"),
    "logits of integers": ({"logits": LOGITS.long()}, TypeError, "logits is torch.int64"),
    "logits of two dimensions": ({"logits": LOGITS[0]}, ValueError, "logits has shape"),
    "no classes": ({"logits": LOGITS[:, :, :0]}, ValueError, "at least one class"),
    "streams": ({"groups": 2}, ValueError, r"4 streams .* 1 \+ loops \* groups = 3"),
    "targets not a tensor": ({"targets": 3}, TypeError, "targets is a int"),
    "targets of int32": ({"targets": TARGETS.int()}, TypeError, "targets is torch.int32"),
    "targets of the wrong batch": ({"targets": TARGETS[:5]}, ValueError, r"targets has shape \(5,\)"),
    "probabilities of the wrong shape": ({"targets": torch.rand(6, 8)}, ValueError, "class probabilities"),
    "targets with gradient": (
        {"targets": torch.rand(6, 9, requires_grad=True)},
        ValueError,
        "targets requires",
    ),
    "targets elsewhere": ({"targets": TARGETS.to("meta")}, ValueError, "targets is on meta"),
    "class index too large": ({"targets": TARGETS * 0 + 9}, ValueError, r"class index 9; .* \[0, 9\)"),
    "class index negative": ({"targets": TARGETS * 0 - 1}, ValueError, "class index -1"),
    "ignore_index with probabilities": (
        {"targets": torch.rand(6, 9), "ignore_index": 2},
        ValueError,
        "ignore_index is 2",
    ),
    "groups negative": ({"groups": -1}, ValueError, "groups is -1"),
    "groups a float": ({"groups": 3.0}, TypeError, "groups is 3.0"),
    "groups a bool": ({"groups": True}, TypeError, "groups is True"),
    "loops 0": ({"loops": 0}, ValueError, "loops is 0"),
    "ema": ({"ema": 1.5}, ValueError, r"ema is 1.5; it must be in \[0, 1\]"),
    "ema nan": ({"ema": math.nan}, ValueError, "ema is nan"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
    "temperature inf": ({"temperature": math.inf}, ValueError, "temperature is inf"),
    "temperature a string": ({"temperature": "1"}, TypeError, "temperature is '1'"),
    "eps": ({"eps": 0.0}, ValueError, "eps is 0.0"),
    "ce_weight": ({"ce_weight": -1.0}, ValueError, "ce_weight is -1.0"),
    "kd_weight nan": ({"kd_weight": math.nan}, ValueError, "kd_weight is nan"),
    "subnet_ce_weight": ({"subnet_ce_weight": math.inf}, ValueError, "subnet_ce_weight is inf"),
    "label_smoothing": ({"label_smoothing": 1.1}, ValueError, "label_smoothing is 1.1"),
    "normalize_logits": ({"normalize_logits": 1}, TypeError, "normalize_logits is 1"),
    "distill_ignored": ({"distill_ignored": None}, TypeError, "distill_ignored is None"),
    "ignore_index a float": ({"ignore_index": -100.0}, TypeError, "ignore_index is -100.0"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("function", [group_knowledge_loss, group_knowledge_loss_reference])
def test_bad_input(backend, function, changed, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS} | changed
    with pytest.raises(error, match=message):
        function(**arguments)


def test_stepwise_form_needs_its_teacher():
    knowledge = GroupKnowledge()
    with pytest.raises(ValueError, match="group is 1"):
        knowledge.subnet(LOGITS[1], TARGETS, group=1)
    knowledge.full(LOGITS[0], TARGETS)
    with pytest.raises(ValueError, match="group is 2"):
        knowledge.subnet(LOGITS[1], TARGETS, group=2)
    with pytest.raises(ValueError, match="group is 0"):
        knowledge.subnet(LOGITS[1], TARGETS, group=0)
    with pytest.raises(ValueError, match="ema is 2"):
        GroupKnowledge(ema=2)
