"""group_knowledge_loss with the full network's logits apart, subnets on the first m of the batch: every backend against
the float64 formula."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_host import build
from helpers.backends import running_on, unavailable
from helpers.group_knowledge_loss_formula import expected, relative_norm, rounding_error

from gkt_fast import GroupKnowledgeLoss, group_knowledge_loss
from gkt_fast.ops import GroupKnowledge, LossOptions, group_knowledge_loss_reference, wrong_class_index
from gkt_fast.ops.group_knowledge_loss.native import CudaBackend
from gkt_fast.ops.registry import find

BACKENDS = ["torch", "cpp", "triton", "cuda-host"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cuda-host":
        if reason := build.missing_tools():
            unavailable("cuda-host", reason)
        build.register("group_knowledge_loss", CudaBackend)
    with running_on("group_knowledge_loss", request.param):
        yield request.param


def make(subnets, batch, share, classes, spatial=(), dtype=torch.float64, seed=0, probabilities=False):
    """Logits of the subnets (subnets, share, C, *spatial), targets, logits of the full network (batch, C, *spatial)."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(batch, classes, *spatial, generator=generator, dtype=torch.float64) * 2
    logits = full[:share] + torch.randn(
        subnets, share, classes, *spatial, generator=generator, dtype=torch.float64
    )
    if probabilities:
        targets = torch.randn(full.shape, generator=generator, dtype=torch.float64).softmax(1)
        targets = targets.to(dtype if dtype == torch.float64 else torch.float32)
    else:
        targets = torch.randint(0, classes, (batch, *spatial), generator=generator)
        targets.view(-1)[1::3] = -100
    return logits.to(dtype), targets, full.to(dtype)


def run(logits, targets, full, grad_output=1.0, function=group_knowledge_loss, **options):
    leaves = logits.detach().requires_grad_(), full.detach().requires_grad_()
    loss, terms = function(leaves[0], targets, full_logits=leaves[1], **options)
    assert not terms.requires_grad
    loss.backward(torch.tensor(grad_output, dtype=loss.dtype))
    return loss.detach(), terms, leaves[0].grad, leaves[1].grad


def check(logits, targets, full, grad_output=1.0, **options):
    loss, terms, *gradients = run(logits, targets, full, grad_output, **options)
    options.pop("loops", None)
    wanted_loss, wanted_terms, *wanted = expected(logits, targets, full_logits=full, **options)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6}.get(logits.dtype)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=limit or 2e-6, atol=1e-8)
    torch.testing.assert_close(terms.double(), wanted_terms, rtol=10 * (limit or 2e-7), atol=1e-7)
    for gradient, want, given in zip(gradients, wanted, (logits, full), strict=True):
        assert gradient.shape == given.shape and gradient.dtype == given.dtype
        want = want * grad_output
        assert relative_norm(gradient, want) <= (limit or 1.5 * rounding_error(want, given.dtype))


OPTIONS = {
    "plain": {},
    "normalized": {"normalize_logits": True, "temperature": 2.0},
    "subnet-ce": {"subnet_ce_weight": 0.3, "label_smoothing": 0.1, "distill_ignored": False},
    "normalized-subnet-ce": {"normalize_logits": True, "subnet_ce_weight": 0.3, "ce_weight": 0.5},
    "kd-only": {"ce_weight": 0.0},
    "ce-only": {"kd_weight": 0.0},
    "ema-0.9": {"ema": 0.9},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def skip_without(backend, dtype):
    if dtype not in find("group_knowledge_loss", backend).dtypes:
        pytest.skip(f"{backend} has no {dtype}, by design")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("share", [1, 4, 7], ids="m={}".format)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_matches_the_formula(backend, dtype, share, options):
    skip_without(backend, dtype)
    shapes = [(5, ()), (130, ()), (11, (3, 5))]
    if backend == "triton":  # slow: one of the shapes, such that each meets all shares and all options
        shapes = [shapes[(share // 3 + list(OPTIONS).index(options)) % 3]]
    for classes, spatial in shapes:
        for probabilities in (False, True):
            tensors = make(4, 7, share, classes, spatial, dtype, probabilities=probabilities)
            check(*tensors, groups=2, loops=2, **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "share"), [(37, 19), (18, 2), (9, 9)])
def test_rows_that_fill_no_vector(backend, dtype, batch, share):
    skip_without(backend, dtype)
    for classes in (3, 40, 1100):
        check(*make(3, batch, share, classes, dtype=dtype), groups=3)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("loops", [1, 3])
def test_groups_and_loops(backend, groups, loops):
    for ema in (0.0, 0.3, 1.0):
        for normalize in (False, True):
            tensors = make(groups * loops, 6, 4, 23, dtype=torch.float32, seed=groups)
            check(*tensors, groups=groups, loops=loops, ema=ema, normalize_logits=normalize)


LAYOUTS = {
    "classes last": lambda z, dim: z.movedim(dim, -1).contiguous().movedim(-1, dim),
    "slice": lambda z, dim: z.repeat_interleave(2, dim=dim).narrow(dim, 3, z.shape[dim]),
    "every second class": lambda z, dim: z.movedim(dim, 0).repeat_interleave(2, dim=0)[::2].movedim(0, dim),
    "reversed": lambda z, dim: z.permute(*range(z.dim())[::-1]).contiguous().permute(*range(z.dim())[::-1]),
    "equal rows": lambda z, dim: z.narrow(dim - 1, 0, 1).expand_as(z),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spatial", [(), (4, 5)], ids=str)
def test_layouts_of_one_tensor_and_of_both(backend, layout, spatial):
    slow = backend == "triton"
    for classes in (11 if spatial else 70,) if slow else (11, 70):
        logits, targets, full = make(4, 7, 5, classes, spatial, torch.float32)
        for i, (subnets, network) in enumerate(
            (
                (layout(logits, 2), full),
                (logits, layout(full, 1)),
                (layout(logits, 2), layout(full, 1)),
            )
        ):
            for normalize in [i % 2 == 0] if slow else [False, True]:
                check(subnets, targets, network, groups=2, loops=2, normalize_logits=normalize)
        batch = torch.cat([full[:5][None], logits])
        check(batch[1:], targets, torch.cat([batch[0], full[5:]]), groups=4)


@pytest.mark.parametrize("grad_output", [-2.5, 0.0, 65536.0])
def test_grad_output(backend, grad_output):
    check(*make(3, 9, 5, 19, dtype=torch.float32), grad_output, groups=3)


@pytest.mark.parametrize("only", ["logits", "full_logits"])
def test_gradient_of_one_alone(backend, only):
    logits, targets, full = make(3, 9, 5, 19, dtype=torch.float32)
    wanted = expected(logits, targets, groups=3, full_logits=full)[2:]
    leaf = (logits if only == "logits" else full).requires_grad_()
    group_knowledge_loss(logits, targets, full_logits=full)[0].backward()
    assert relative_norm(leaf.grad, wanted[only == "full_logits"]) <= 2e-6


def test_the_whole_batch_apart_is_the_same_as_together(backend):
    logits, targets, full = make(3, 9, 9, 19, dtype=torch.float32)
    together = torch.cat([full[None], logits]).requires_grad_()
    loss, terms = group_knowledge_loss(together, targets, normalize_logits=True)
    loss.backward()
    results = run(logits, targets, full, normalize_logits=True)
    for got, want in zip(results, (loss.detach(), terms, together.grad[1:], together.grad[0]), strict=True):
        assert torch.equal(got, want)


def test_full_network_alone(backend):
    logits, targets, full = make(0, 9, 5, 19, dtype=torch.float32)
    loss, terms, gradient, full_gradient = run(logits, targets, full, groups=0)
    wanted = torch.nn.functional.cross_entropy(full, targets)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(terms, wanted[None])
    assert gradient.shape == logits.shape and full_gradient.any()


def test_every_ignored_row_in_the_share(backend):
    """The subnets' means are over their own rows: none of them counts, all of the full network's do."""
    logits, targets, full = make(3, 6, 2, 9, dtype=torch.float32)
    targets = torch.tensor([-100, -100, 0, 1, 2, 3])
    _, terms, *_ = run(logits, targets, full, distill_ignored=False)
    assert terms[0].isfinite() and terms[1:].isnan().all()
    loss, terms, *_ = run(logits, targets, full)
    assert loss.isfinite() and terms.isfinite().all()
    loss, *_ = run(logits, targets, full, subnet_ce_weight=0.5)
    assert loss.isnan()


def test_overflow_in_the_variance_of_the_full_network_alone():
    logits, targets, full = make(3, 6, 2, 9, dtype=torch.float32)
    full[5, 3] = -1e30
    with pytest.raises(ValueError, match=r"logits reach 1e\+30"):
        group_knowledge_loss(logits, targets, full_logits=full, normalize_logits=True)


@pytest.mark.parametrize("options", ["plain", "normalized-subnet-ce", "ema-0.9", "subnet-ce"])
def test_stepwise_form(options):
    """GroupKnowledge's terms add up to the loss, with targets for the batch or for the share."""
    logits, targets, full = make(6, 9, 5, 19)
    o = {"ce_weight": 1.0, "kd_weight": 1.0, "subnet_ce_weight": 0.0} | OPTIONS[options]
    weights = {name: o.pop(name) for name in ("ce_weight", "kd_weight", "subnet_ce_weight")}
    wanted = expected(logits, targets, groups=3, full_logits=full, **OPTIONS[options])
    for given in (targets, targets[:5]):
        knowledge = GroupKnowledge(**o)
        leaves = logits.clone().requires_grad_(), full.clone().requires_grad_()
        loss = weights["ce_weight"] * knowledge.full(leaves[1], targets)
        for s, subnet in enumerate(leaves[0]):
            loss = loss + weights["kd_weight"] * knowledge.subnet(subnet, given, group=s % 3 + 1)
            loss = loss + weights["subnet_ce_weight"] * knowledge.cross_entropy(subnet, targets[:5])
        loss.backward()
        torch.testing.assert_close(loss.detach(), wanted[0])
        for leaf, want in zip(leaves, wanted[2:], strict=True):
            torch.testing.assert_close(leaf.grad, want)


def test_stepwise_form_refuses_batches_that_do_not_fit():
    logits, targets, full = make(3, 6, 4, 5)
    knowledge = GroupKnowledge()
    knowledge.full(full, targets)
    knowledge.subnet(logits[0, :3], targets, group=1)
    with pytest.raises(ValueError, match=r"a batch of 4; it must be at most that of group 1, 3"):
        knowledge.subnet(logits[1], targets, group=2)
    with pytest.raises(ValueError, match=r"targets has shape \(5,\)"):
        knowledge.subnet(logits[1], targets[:5], group=1)


def test_sigmoid_distillation():
    logits, targets, full = make(3, 6, 4, 5)
    loss, terms, *gradients = run(logits, targets, full, distillation="sigmoid", temperature=2.0)
    knowledge = GroupKnowledge(distillation="sigmoid", temperature=2.0)
    leaves = logits.clone().requires_grad_(), full.clone().requires_grad_()
    parts = [knowledge.full(leaves[1], targets)]
    parts += [knowledge.subnet(subnet, targets, group=s + 1) for s, subnet in enumerate(leaves[0])]
    torch.testing.assert_close(terms, torch.stack(parts).detach())
    torch.testing.assert_close(loss, terms.sum())
    for gradient, want in zip(gradients, torch.autograd.grad(sum(parts), leaves), strict=True):
        torch.testing.assert_close(gradient, want)
    bernoulli = torch.distributions.Bernoulli
    pairs = zip((full[:4], *logits[:2]), logits, strict=True)
    wanted = [
        4 * torch.distributions.kl_divergence(bernoulli(logits=p / 2), bernoulli(logits=q / 2)).sum(1).mean()
        for p, q in pairs
    ]
    torch.testing.assert_close(terms[1:], torch.stack(wanted))


def test_module_and_reference(backend):
    tensors = make(3, 6, 4, 5, dtype=torch.float32)
    wanted = run(*tensors, temperature=2.0)
    by_reference = run(*tensors, function=group_knowledge_loss_reference, temperature=2.0)
    module = GroupKnowledgeLoss(temperature=2.0)
    by_module = run(*tensors, function=lambda z, t, full_logits: module(z, t, full_logits))
    for got in (by_reference, by_module):
        for value, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(value, want)


def test_opcheck(backend):
    op = torch.ops.gkt_fast.group_knowledge_loss.default
    for spatial in ((), (3, 2)):
        logits, targets, full = make(3, 5, 3, 7, spatial, torch.float32)
        arguments = logits, targets, full, *LossOptions(normalize_logits=True).flatten(), True, 1.0
        torch.library.opcheck(op, arguments)


def test_compiles_without_graph_break(backend):
    logits, targets, full = make(3, 6, 4, 5, dtype=torch.float32)
    leaves = logits.requires_grad_(), full.requires_grad_()

    def training_loss(logits, full):
        return group_knowledge_loss(logits * 2, targets, full_logits=full * 2)[0]

    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(training_loss(*leaves), leaves)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)
    by_func = torch.func.grad(training_loss, argnums=(0, 1))(*leaves)
    for got, want in zip(by_func, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_differentiating_twice_is_refused(backend):
    logits, targets, full = make(3, 6, 4, 5, dtype=torch.float32)
    leaves = logits.requires_grad_(), full.requires_grad_()
    loss, _ = group_knowledge_loss(logits, targets, full_logits=full)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="can't be differentiated twice"):
            gradient.square().sum().backward(retain_graph=True)


LOGITS, TARGETS, FULL = make(3, 6, 4, 5, dtype=torch.float32)
BAD = {
    "no tensor": ({"full_logits": [1.0]}, TypeError, "full_logits is a list"),
    "streams": ({"groups": 2}, ValueError, r"3 streams .* beside full_logits .* loops \* groups = 2"),
    "dtype": ({"full_logits": FULL.double()}, ValueError, "full_logits has dtype torch.float64"),
    "device": ({"full_logits": FULL.to("meta")}, ValueError, "full_logits has device meta"),
    "classes": ({"full_logits": FULL[:, :4]}, ValueError, r"full_logits has shape \(6, 4\).*\(B, 5\)"),
    "dimensions": ({"full_logits": FULL[..., None]}, ValueError, r"full_logits has shape \(6, 5, 1\)"),
    "batch": ({"full_logits": FULL[:3], "targets": TARGETS[:3]}, ValueError, "a batch of 3; the subnets' 4"),
    "targets": ({"targets": TARGETS[:4]}, ValueError, r"targets has shape \(4,\).*full_logits of shape \(6, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(backend, changed, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS, "full_logits": FULL} | changed
    with pytest.raises(error, match=message):
        group_knowledge_loss(**arguments)


def test_class_indices_out_of_range(backend):
    targets = TARGETS * 0 + 7
    if backend in ("cpp", "torch"):
        with pytest.raises(ValueError, match="class index 7"):
            group_knowledge_loss(LOGITS, targets, full_logits=FULL)
        return
    loss, _ = group_knowledge_loss(
        LOGITS, targets, full_logits=FULL
    )  # as on a GPU: named when it is asked for
    assert loss.isnan() and "class index 7" in wrong_class_index("cpu")


def test_no_rows(backend):
    loss, terms, gradient, full_gradient = run(*make(3, 0, 0, 5, dtype=torch.float32))
    assert loss.isnan() and terms.isnan().all()
    assert gradient.shape == (3, 0, 5) and full_gradient.shape == (0, 5)
    loss, terms, _, full_gradient = run(*make(3, 5, 0, 5, dtype=torch.float32))
    assert math.isnan(loss) and terms[0].isfinite() and terms[1:].isnan().all() and full_gradient.any()
