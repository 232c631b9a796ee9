"""Values and gradients of group_knowledge_loss on every backend, against the float64 formula."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_host import build
from helpers.backends import combinations, running_on, unavailable
from helpers.group_knowledge_loss_formula import expected, relative_norm, rounding_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkt_fast import group_knowledge_loss
from gkt_fast.ops import GroupKnowledge, registry
from gkt_fast.ops.group_knowledge_loss.native import CudaBackend

BACKENDS = ["torch", "cpp", "triton", "cuda-host"]
LOW_PRECISION = [torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cuda-host":
        if reason := build.missing_tools():
            unavailable("cuda-host", reason)
        build.register("group_knowledge_loss", CudaBackend)
    with running_on("group_knowledge_loss", request.param):
        yield request.param


def skip_without(backend, dtype):
    if dtype not in registry.find("group_knowledge_loss", backend).dtypes:
        pytest.skip(f"{backend} has no {dtype}, by design")


def make(shape, dtype=torch.float32, seed=0, probabilities=False, ignore=False):
    """Logits (S, B, C, *spatial) whose streams resemble each other, and targets."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[1:], generator=generator, dtype=torch.float64) * 2
    logits = (common + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if probabilities:
        targets = torch.randn(shape[1:], generator=generator, dtype=torch.float64).softmax(1)
        return logits, targets.to(dtype if dtype == torch.float64 else torch.float32)
    targets = torch.randint(0, shape[2], (shape[1], *shape[3:]), generator=generator)
    if ignore:
        targets.view(-1)[1::3] = -100
    return logits, targets


def run(logits, targets, grad_output=None, **options):
    """Loss, terms, gradient; checks that nothing was written into the inputs."""
    leaf = logits.detach().requires_grad_()
    versions = logits._version, targets._version
    before = logits.clone()
    loss, terms = group_knowledge_loss(leaf, targets, **options)
    assert not terms.requires_grad
    loss.backward(grad_output)
    assert (logits._version, targets._version) == versions
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return loss.detach(), terms, leaf.grad


def check(logits, targets, **options):
    loss, terms, gradient = run(logits, targets, **options)
    options.pop("loops", None)
    wanted_loss, wanted_terms, wanted_gradient = expected(logits, targets, **options)
    assert loss.shape == () and terms.shape == logits.shape[:1] and gradient.shape == logits.shape
    assert gradient.dtype == logits.dtype
    assert loss.dtype == terms.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    double = logits.dtype == torch.float64
    torch.testing.assert_close(
        loss.double(), wanted_loss, rtol=1e-12 if double else 1e-6, atol=1e-15 if double else 1e-8
    )
    torch.testing.assert_close(
        terms.double(), wanted_terms, rtol=1e-11 if double else 2e-6, atol=1e-13 if double else 1e-7
    )
    if logits.dtype in LOW_PRECISION:
        limit = 1.5 * rounding_error(wanted_gradient, logits.dtype)
        assert relative_norm(gradient, wanted_gradient) <= limit
    else:
        assert relative_norm(gradient, wanted_gradient) <= (1e-12 if double else 2e-6)


OPTIONS = {
    "plain": {},
    "normalized": {"normalize_logits": True},
    "normalized-warm": {"normalize_logits": True, "temperature": 4.0, "eps": 1e-3},
    "warm": {"temperature": 10.0, "kd_weight": 0.5},
    "cold": {"temperature": 0.1, "ce_weight": 2.0},
    "subnet-ce": {"subnet_ce_weight": 0.3, "label_smoothing": 0.1},
    "normalized-subnet-ce": {"normalize_logits": True, "subnet_ce_weight": 0.3, "label_smoothing": 0.2},
    "ce-only": {"kd_weight": 0.0},
    "kd-only": {"ce_weight": 0.0, "distill_ignored": False},
    "ema-0": {"ema": 0.0},
    "ema-1": {"ema": 1.0, "normalize_logits": True},
    "ema-0.9": {"ema": 0.9, "normalize_logits": True, "temperature": 2.0},
}
SHAPES = [
    (4, 5, 7),
    (4, 3, 130),
    (2, 17, 64),
    (7, 6, 19),
    (4, 3, 5, 7),
    (3, 2, 11, 5, 3),
    (4, 1, 1),
    (4, 2, 70, 2, 9),
]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(backend, shape, options):
    loops = {7: 2, 3: 2}.get(shape[0], 1)
    groups = (shape[0] - 1) // loops
    logits, targets = make(shape, ignore=shape[1] > 1)
    check(logits, targets, groups=groups, loops=loops, **options)


@pytest.mark.parametrize("shape", [(2, 2, 1101), (3, 1, 4500), (2, 1, 8192)], ids=str)
@pytest.mark.parametrize("options", ["normalized-subnet-ce", "warm"])
def test_long_rows(backend, shape, options):
    """Longer than a warp's share and than a tile, with and without whole 16-byte accesses."""
    logits, targets = make(shape)
    check(logits, targets, groups=1, loops=shape[0] - 1, **OPTIONS[options])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 5, 19), (4, 3, 130), (7, 2, 11, 5, 4)], ids=str)
@pytest.mark.parametrize("options", ["plain", "normalized-subnet-ce", "ema-0.9"])
def test_dtypes(backend, shape, dtype, options):
    skip_without(backend, dtype)
    logits, targets = make(shape, dtype, ignore=True)
    check(logits, targets, groups=3, loops=(shape[0] - 1) // 3, **OPTIONS[options])


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("normalize_logits", [False, True])
def test_low_precision_with_nearly_equal_streams(backend, dtype, normalize_logits):
    base = torch.randn(1, 8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    noise = 0.02 * torch.randn(4, 8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    logits = (base + noise).to(dtype)
    check(logits, torch.arange(8), groups=3, ce_weight=0.0, normalize_logits=normalize_logits)


@pytest.mark.parametrize("options", ["plain", "normalized", "subnet-ce", "normalized-subnet-ce", "ce-only"])
@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 3, 130), (4, 2, 11, 5, 3)], ids=str)
def test_probability_targets(backend, shape, options):
    logits, targets = make(shape, probabilities=True)
    check(logits, targets, groups=3, **OPTIONS[options])
    strided = targets.transpose(0, 1).contiguous().transpose(0, 1)
    check(logits, strided, groups=3, **OPTIONS[options])


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("normalize_logits", [False, True])
def test_groups_and_loops(backend, groups, loops, normalize_logits):
    logits, targets = make((1 + groups * loops, 3, 23), seed=groups)
    for ema in (0.0, 0.3, 1.0):
        check(logits, targets, groups=groups, loops=loops, ema=ema, normalize_logits=normalize_logits)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(backend, data):
    groups, loops = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    spatial = data.draw(st.lists(st.integers(1, 6), max_size=2))
    shape = (1 + groups * loops, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70)), *spatial)
    logits, targets = make(
        shape, seed=data.draw(st.integers(0, 1000)), probabilities=data.draw(st.booleans()), ignore=True
    )
    assume_counted = targets.is_floating_point() or bool((targets != -100).any())
    check(
        logits,
        targets,
        groups=groups,
        loops=loops,
        ema=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        temperature=data.draw(st.floats(0.1, 10)),
        # Two normalised logits are -1 and 1 whatever they were: their gradient is rounding and nothing else.
        normalize_logits=shape[2] > 2 and data.draw(st.booleans()),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1])),
        subnet_ce_weight=data.draw(st.sampled_from([0.0, 0.5])) if assume_counted else 0.0,
        distill_ignored=data.draw(st.booleans()) or not assume_counted,
    )


def test_a_single_class_with_smoothing(backend):
    """Nothing is to be learnt: the gradient is rounding and nothing else."""
    logits, targets = make((2, 7, 1), ignore=True)
    check(logits, targets, groups=1, label_smoothing=0.1)


LAYOUTS = {
    "slice of a bigger tensor": lambda z: torch.cat([z, z], dim=2)[:, :, 3 : 3 + z.shape[2]],
    "every second class": lambda z: z.repeat_interleave(2, dim=2)[:, :, ::2],
    "classes last": lambda z: z.movedim(2, -1).contiguous().movedim(-1, 2),
    "batch first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed dimensions": lambda z: (
        z.permute(*range(z.dim())[::-1]).contiguous().permute(*range(z.dim())[::-1])
    ),
    "equal rows": lambda z: z[:, :1].expand_as(z),
    "equal streams": lambda z: z[:1].expand_as(z),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 19, 11), (4, 5, 70), (4, 3, 9, 4, 7)], ids=str)
def test_layouts(backend, shape, layout):
    logits, targets = make(shape, ignore=True)
    strided = layout(logits)
    for options in ("plain", "normalized"):
        check(strided, targets, groups=3, **OPTIONS[options])


@pytest.mark.parametrize("shape", [(4, 6, 5, 4, 7)], ids=str)
def test_strided_class_indices(backend, shape):
    logits, targets = make(shape, ignore=True)
    strided = torch.stack([targets, targets + 1], dim=-1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2)
    check(logits, strided, groups=3)


def test_int64_offsets(backend):
    """Streams that lie 2^31 elements apart: the memory between them is reserved, never touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    logits = storage.as_strided((2, 3, 5), (2**31, 5, 1))
    logits.copy_(make((2, 3, 5), torch.bfloat16)[0])
    check(logits, torch.tensor([0, 4, 2]), groups=1)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("normalize_logits", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_large_vocabularies(backend, seed, normalize_logits):
    """Rounding errors don't grow with the length of a row."""
    logits, targets = make((4, 1, 131072), seed=seed)
    _, terms, gradient = run(logits, targets, normalize_logits=normalize_logits)
    _, wanted, wanted_gradient = expected(logits, targets, groups=3, normalize_logits=normalize_logits)
    torch.testing.assert_close(terms.double(), wanted, rtol=2e-6, atol=0)
    assert relative_norm(gradient, wanted_gradient) <= 5e-7


GRAD_OUTPUTS = {
    "scalar": torch.tensor(-2.5),
    "0": torch.tensor(0.0),
    "expanded": torch.tensor([0.75]).expand(1)[0],
    "strided": torch.tensor([3.0, 0.5, 7.0])[1::2][0],
}


@pytest.mark.parametrize("grad_output", GRAD_OUTPUTS.values(), ids=GRAD_OUTPUTS)
def test_grad_output(backend, grad_output):
    logits, targets = make((4, 5, 19))
    _, _, gradient = run(logits, targets, grad_output)
    wanted = expected(logits, targets, groups=3)[2] * grad_output.double()
    assert relative_norm(gradient, wanted) <= 2e-6


@pytest.mark.parametrize(
    ("backend", "loss_scale", "dtype", "retain_graph"),
    [
        row
        for name in BACKENDS
        for row in combinations(name, [1.0, 0.1, 65536.0], LOW_PRECISION, [False, True])
    ],
    ids=str,
    indirect=["backend"],
)
def test_loss_scale_reaches_low_precision(backend, loss_scale, dtype, retain_graph):
    """A mean over many rows has gradients that float16 can't hold before they are scaled."""
    logits, targets = make((4, 600, 32), dtype)
    leaf = logits.requires_grad_()
    loss, _ = group_knowledge_loss(leaf, targets)
    (loss * loss_scale).backward(retain_graph=retain_graph)
    wanted = expected(logits, targets, groups=3)[2] * loss_scale
    assert relative_norm(leaf.grad, wanted) <= 1.5 * rounding_error(wanted, dtype)


def test_backward_twice_through_a_retained_graph(backend):
    logits, targets = make((4, 5, 19))
    leaf = logits.requires_grad_()
    loss, _ = group_knowledge_loss(leaf, targets)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.mul_(5)
    loss.backward(torch.tensor(3.0))
    torch.testing.assert_close(leaf.grad, 8 * first)


def test_large_and_tiny_logits(backend):
    for scale in (1e4, 1e-4):
        # torch's own cross entropy loses digits far from 0.
        for offset in (0.0,) if backend == "torch" else (0.0, 1e4):
            logits, targets = make((4, 6, 33), seed=5)
            for options in ("plain", "normalized", "warm"):
                check(logits * scale + offset, targets, groups=3, **OPTIONS[options])


def test_equal_logits(backend):
    """Variance 0 under normalisation."""
    logits = torch.tensor([0.0, 1e4, -3.7, 1e-4]).view(4, 1, 1).expand(4, 3, 17).contiguous()
    for options in ("plain", "normalized"):
        _, terms, gradient = run(logits, torch.tensor([0, 5, 16]), **OPTIONS[options])
        torch.testing.assert_close(terms, torch.tensor([math.log(17), 0, 0, 0]), rtol=1e-6, atol=1e-6)
        wanted = expected(logits, torch.tensor([0, 5, 16]), groups=3, **OPTIONS[options])[2]
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", ["plain", "warm", "ema-0"])
def test_masked_classes(backend, options):
    logits, targets = make((7, 5, 21))
    targets.clamp_(min=2)
    logits[:, :, 1] = -math.inf
    check(logits, targets, groups=3, loops=2, **OPTIONS[options])
    check(logits, targets, groups=3, loops=2, ema=0.7)


def test_class_masked_in_the_student_only(backend):
    logits, targets = make((2, 3, 9))
    logits[1, :, 4] = -math.inf
    loss, terms, gradient = run(logits, torch.zeros_like(targets), groups=1)
    assert loss == math.inf and terms[1] == math.inf
    wanted = expected(logits, torch.zeros_like(targets), groups=1)[2]
    assert relative_norm(gradient, wanted) <= 2e-6


def test_all_rows_ignored(backend):
    logits, _ = make((4, 3, 9))
    targets = torch.full((3,), -100)
    loss, terms, gradient = run(logits, targets)
    assert loss.isnan() and terms[0].isnan() and terms[1:].isfinite().all()
    assert relative_norm(gradient, expected(logits, targets, groups=3)[2]) <= 2e-6
    loss, terms, gradient = run(logits, targets, ce_weight=0.0)
    assert loss.isfinite() and gradient.isfinite().all()
    _, terms, gradient = run(logits, targets, distill_ignored=False)
    assert terms.isnan().all() and not gradient.any()


def test_other_ignore_index(backend):
    logits, targets = make((4, 9, 5))
    check(logits, targets, groups=3, ignore_index=2, distill_ignored=False)


def test_zero_rows(backend):
    for shape in [(4, 0, 5), (4, 2, 5, 0, 3)]:
        loss, terms, gradient = run(
            torch.empty(shape), torch.empty((shape[1], *shape[3:]), dtype=torch.int64)
        )
        assert loss.isnan() and terms.isnan().all() and gradient.shape == shape


def test_nan_logits(backend):
    for shape in [(4, 3, 9), (4, 3, 200), (4, 2, 5, 3, 3)]:
        for stream in (0, 2):
            logits, targets = make(shape)
            logits[stream].view(-1)[4] = math.nan
            for options in ("plain", "normalized"):
                loss, terms, _ = run(logits, targets, **OPTIONS[options])
                assert loss.isnan() and terms.isnan().any()


def test_full_network_alone(backend):
    logits, targets = make((1, 7, 13), ignore=True)
    loss, terms, _ = run(logits, targets, groups=0)
    wanted = torch.nn.functional.cross_entropy(logits[0], targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms, wanted[None], rtol=1e-6, atol=0)
    check(logits, targets, groups=0, ce_weight=0.5, label_smoothing=0.1)


def test_teacher_carries_no_gradient(backend):
    logits, targets = make((2, 4, 10))
    _, _, gradient = run(logits, targets, groups=1, ce_weight=0.0)
    assert not gradient[0].any() and gradient[1].any()


def test_repeats_bit_for_bit(backend):
    logits, targets = make((4, 9 if backend == "triton" else 37, 150))
    first = run(logits, targets, normalize_logits=True)
    for again in (run(logits, targets, normalize_logits=True) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("options", ["plain", "normalized-subnet-ce", "ema-0.9", "kd-only"])
def test_stepwise_form(options):
    """GroupKnowledge's terms, one stream at a time, add up to the loss."""
    logits, targets = make((7, 5, 19), torch.float64, ignore=True)
    o = {"ce_weight": 1.0, "kd_weight": 1.0, "subnet_ce_weight": 0.0} | OPTIONS[options]
    weights = {name: o.pop(name) for name in ("ce_weight", "kd_weight", "subnet_ce_weight")}
    knowledge = GroupKnowledge(**o)
    leaf = logits.clone().requires_grad_()
    loss = weights["ce_weight"] * knowledge.full(leaf[0], targets)
    for s in range(1, 7):
        loss = loss + weights["kd_weight"] * knowledge.subnet(leaf[s], targets, group=(s - 1) % 3 + 1)
        loss = loss + weights["subnet_ce_weight"] * knowledge.cross_entropy(leaf[s], targets)
    loss.backward()
    wanted = expected(logits, targets, groups=3, **OPTIONS[options])
    torch.testing.assert_close(loss.detach(), wanted[0])
    torch.testing.assert_close(leaf.grad, wanted[2])
