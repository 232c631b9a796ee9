"""A criterion of one's own, and soft labels of sigmoids, in every execution mode against formulas in float64."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkt_fast import (
    GKT,
    GKTConfig,
    GKTTrainer,
    NormalizedCrossEntropy,
    active_subnet,
    evaluate,
    group_knowledge_loss,
    use_backend,
)
from gkt_fast.models import cifar_resnet
from gkt_fast.ops import BackendError, registry

MODES = ["sequential", "shared", "stacked", "lean"]
CLASSES = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(14, CLASSES, width=4).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, class indices, labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (6,), generator=generator)
    return images, targets, torch.rand(6, CLASSES, generator=generator, dtype=torch.float64).round()


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    return F.multi_margin_loss(logits, targets)


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0], dtype=torch.float64))
CRITERIA = {
    "bce": (F.binary_cross_entropy_with_logits, "labels"),
    "focal": (focal, "targets"),
    "margin": (margin, "targets"),
    "weighted": (WEIGHTED, "targets"),
}


def normalized(logits: Tensor, config: GKTConfig) -> Tensor:
    if not config.normalize_logits:
        return logits
    variance = logits.var(1, unbiased=False, keepdim=True)
    return (logits - logits.mean(1, keepdim=True)) / (variance + 1e-7).sqrt()


def divergence(teacher: Tensor, student: Tensor, config: GKTConfig) -> Tensor:
    """T^2 times the mean over rows, written as the definitions are."""
    t = config.temperature
    if config.distillation == "softmax":
        p, q = (teacher / t).softmax(1), (student / t).softmax(1)
        per_row = (p * (p.log() - q.log())).sum(1)
    else:
        p, q = (teacher / t).sigmoid(), (student / t).sigmoid()
        per_row = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    return t**2 * per_row.mean()


def expected(
    model: nn.Module, gkt: GKT, criterion: Callable[..., Tensor], images: Tensor, targets: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """The loss and its terms, the streams one by one."""
    config, knowledge = gkt.config, {}
    logits = model(images)
    knowledge[0] = normalized(logits, config).detach()
    terms = [criterion(logits, targets)]
    loss = config.ce_weight * terms[0]
    for i, subnet in enumerate(gkt.sample(step)):
        group = i % config.groups + 1
        with active_subnet(model, subnet):
            logits = model(images)
        student = normalized(logits, config)
        terms.append(divergence(knowledge[group - 1], student, config))
        old = knowledge.get(group)
        new = student.detach()
        knowledge[group] = new if old is None else config.ema * old + (1 - config.ema) * new
        loss = loss + config.kd_weight * terms[-1]
        loss = loss + config.subnet_ce_weight * criterion(logits, targets)
    return loss, torch.stack(terms).detach()


def compare(
    config: GKTConfig, criterion: Callable[..., Tensor] | None, targets: Tensor, step: int = 2
) -> None:
    images, *_ = batch()
    model, reference = network(), network()
    gkt = GKT(model, config, criterion=criterion).train()
    output = gkt(images, targets, step=step)
    output.loss.backward()
    plain = GKT(reference, config.replace(fuse_blocks=False)).train()
    loss, terms = expected(reference.train(), plain, criterion or F.cross_entropy, images, targets, step)
    loss.backward()
    torch.testing.assert_close(output.loss.detach(), loss.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([output.ce[None], output.kd]), terms, rtol=1e-9, atol=1e-12)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_in_every_mode(name, execution):
    criterion, kind = CRITERIA[name]
    targets = batch()[1 if kind == "targets" else 2]
    config = GKTConfig(
        groups=2, loops=2, execution=execution, subnet_ce_weight=0.3, ce_weight=0.7, kd_weight=1.3
    )
    compare(config, criterion, targets)


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_distillation_in_every_mode(execution, normalize):
    config = GKTConfig(
        groups=2,
        loops=2,
        execution=execution,
        distillation="sigmoid",
        temperature=2.5,
        normalize_logits=normalize,
        subnet_ce_weight=0.3,
    )
    compare(config, F.binary_cross_entropy_with_logits, batch()[2])
    compare(config, None, batch()[1])


@pytest.mark.parametrize("weights", [{"ce_weight": 0.0}, {"kd_weight": 0.0}, {"groups": 0}])
def test_weights_of_zero_and_plain_training(weights):
    options = {"groups": 2, "execution": "shared"} | weights
    compare(GKTConfig(**options), focal, batch()[1])


def test_stochastic_depth_takes_a_criterion():
    images, targets, _ = batch()
    config = GKTConfig(groups=1, sampler="stochastic_depth", train_full=False)
    gkt = GKT(network(), config, criterion=focal)
    output = gkt(images, targets, step=1)
    torch.testing.assert_close(output.ce, focal(output.logits, targets))
    assert output.kd.shape == (0,)


def test_the_gradient_of_sigmoid_soft_labels():
    """T (q - p), over the rows."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    options = {"groups": 1, "ce_weight": 0.0, "temperature": 1.7, "distillation": "sigmoid"}
    loss, _ = group_knowledge_loss(logits, torch.zeros(3, dtype=torch.int64), **options)
    (2.5 * loss).backward()
    p, q = (logits.detach() / 1.7).sigmoid()
    torch.testing.assert_close(logits.grad[1], 2.5 * 1.7 * (q - p) / 3, rtol=1e-12, atol=1e-14)
    assert not logits.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 5, 9), (4, 2, 3, 4, 2)])
def test_sigmoid_soft_labels_of_other_dtypes_and_dense_predictions(dtype, shape):
    torch.manual_seed(0)
    logits = (4 * torch.randn(shape)).to(dtype).movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
    targets = torch.randint(shape[2], shape[1:2] + shape[3:])
    exact = logits.detach().double().requires_grad_()
    for tensor in (logits, exact):
        group_knowledge_loss(tensor, targets, distillation="sigmoid", temperature=2.0)[0].backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * 1e-2)


def test_large_logits_stay_finite():
    logits = torch.tensor([[[300.0, -300.0]], [[-300.0, 300.0]]], requires_grad=True)
    loss, terms = group_knowledge_loss(
        logits, torch.zeros(1, dtype=torch.int64), groups=1, distillation="sigmoid"
    )
    loss.backward()
    torch.testing.assert_close(terms[1].item(), 600.0)
    assert logits.grad.isfinite().all()


def test_sigmoid_soft_labels_run_in_plain_torch_which_is_said_once(caplog):
    logits, targets = torch.randn(4, 2, 3), torch.tensor([0, 1])
    with registry.isolated(), caplog.at_level(logging.INFO, "gkt_fast"):
        for _ in range(2):
            group_knowledge_loss(logits, targets, distillation="sigmoid")
    assert caplog.text.count("group_knowledge_loss with distillation='sigmoid' runs on 'torch'") == 1
    with use_backend("torch"):
        group_knowledge_loss(logits, targets, distillation="sigmoid")
    with use_backend("cpp"), pytest.raises(BackendError, match="only 'torch' can"):
        group_knowledge_loss(logits, targets, distillation="sigmoid")
    with pytest.raises(ValueError, match="distillation is 'tanh'; it must be 'softmax' or 'sigmoid'"):
        group_knowledge_loss(logits, targets, distillation="tanh")
    with pytest.raises(ValueError, match="distillation is 'tanh'"):
        GKTConfig(distillation="tanh")


def test_the_op_with_sigmoids_passes_torchs_own_checks():
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (4,))

    def loss(x: Tensor) -> Tensor:
        return group_knowledge_loss(x, targets, groups=2, distillation="sigmoid")[0]

    assert torch.isfinite(torch.func.grad(loss)(logits)).all()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), loss(logits))


@pytest.mark.parametrize(
    "field, value", [("label_smoothing", 0.1), ("ignore_index", 3), ("distill_ignored", False)]
)
def test_options_of_cross_entropy_are_refused_beside_a_criterion(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value} and there is a criterion"):
        GKT(network(), GKTConfig(**{field: value}), criterion=focal)


def test_what_is_no_criterion():
    images, targets, labels = batch()
    with pytest.raises(TypeError, match="criterion is 'bce'"):
        GKT(network(), criterion="bce")
    with pytest.raises(ValueError, match="criterion is Linear, which has parameters"):
        GKT(network(), criterion=nn.Linear(2, 2))
    unreduced = GKT(
        network(), criterion=lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none")
    )
    with pytest.raises(ValueError, match=r"tensor of shape \(6, 5\); it must be a scalar"):
        unreduced(images, labels)
    with pytest.raises(TypeError, match="criterion returned float"):
        GKT(network(), criterion=lambda x, y: 1.0)(images, targets)


def test_copies_of_data_parallel_are_refused():
    images, targets, _ = batch()
    replica = GKT(network())._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        replica(images, targets)


def test_the_trainer_takes_it_and_evaluates_by_it():
    images, _, labels = batch()
    model = network()
    config = GKTConfig(groups=2, distillation="sigmoid")
    trainer = GKTTrainer(
        model,
        torch.optim.SGD(model.parameters(), 0.01),
        config,
        criterion=F.binary_cross_entropy_with_logits,
    )
    history = trainer.fit([(images, labels)], epochs=2, val_loader=[(images, labels)], progress=False)
    logits = model.eval()(images)
    loss = F.binary_cross_entropy_with_logits(logits, labels).item()
    assert history[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
    right = ((logits > 0) == (labels > 0.5)).double().mean().item()
    assert history[-1]["val_accuracy"] == pytest.approx(right)
    with pytest.raises(TypeError, match="accuracy is counted over class indices"):
        evaluate(model, [(images, labels)])


def test_normalized_cross_entropy():
    """The mean and the biased variance of every row are 0 and 1."""
    _, targets, _ = batch()
    logits = torch.randn(6, CLASSES, dtype=torch.float64) * 7 + 3
    standardised = F.layer_norm(logits, (CLASSES,), eps=1e-7)
    loss = NormalizedCrossEntropy(label_smoothing=0.1)(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(standardised, targets, label_smoothing=0.1))
    compare(
        GKTConfig(groups=2, normalize_logits=True, execution="stacked"), NormalizedCrossEntropy(), targets
    )
