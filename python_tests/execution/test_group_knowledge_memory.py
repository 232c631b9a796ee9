"""Chains over steps, and knowledge that is kept by sample: every mode against a plain loop over samples, in float64."""

from __future__ import annotations

import copy
import functools
import logging
import math
import pickle
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import (
    MODES,
    assert_same,
    one_thread,  # noqa: F401
    outcome_of,
    reference_cross_entropy,
    reference_step,
)
from helpers.small_nets import CLASSES, Net, batch
from torch import Tensor

from gkt_fast import GKT, GKTConfig, GroupKnowledgeMemory

SAMPLES = 7


def loss_by_sample(
    logits: Sequence[Tensor],
    targets: Tensor,
    config: GKTConfig,
    *,
    step: int,
    indices: Tensor,
    knowledge: dict[tuple[int, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """The loss and the terms, sample by sample; `knowledge`, by group and sample, moves on as the step does."""

    def n(z: Tensor) -> Tensor:
        if not config.normalize_logits:
            return z
        return (z - z.mean()) / torch.sqrt(z.var(unbiased=False) + 1e-7)

    over_steps = config.chain == "steps"
    temperature = config.temperature
    rows = [{0: n(z).detach()} for z in logits[0]]
    terms = [reference_cross_entropy(logits[0], targets, config)]
    loss = config.ce_weight * terms[0]
    for stream, of_subnet in enumerate(logits[1:]):
        group = (step if over_steps else stream) % config.groups + 1
        kd = 0.0
        for z, sample, row in zip(of_subnet, indices.tolist(), rows, strict=False):
            above = row.get(group - 1, knowledge.get((group - 1, sample), row[0]))
            p, q = torch.softmax(above / temperature, 0), torch.softmax(n(z) / temperature, 0)
            kd = kd + (p * (p.log() - q.log())).sum()
            before, new = row.get(group, knowledge.get((group, sample))), n(z).detach()
            row[group] = new if before is None else config.ema * before + (1 - config.ema) * new
        terms.append(temperature**2 * kd / len(of_subnet))
        loss = loss + config.kd_weight * terms[-1]
        if config.subnet_ce_weight:
            loss = loss + config.subnet_ce_weight * reference_cross_entropy(
                of_subnet, targets[: len(of_subnet)], config
            )
    for group in range(1, config.groups):
        for sample in set(indices.tolist()):
            learnt = [
                row[group]
                for row, i in zip(rows, indices.tolist(), strict=True)
                if i == sample and group in row
            ]
            if learnt:
                knowledge[group, sample] = torch.stack(learnt).mean(0)
    return loss, torch.stack(terms)


def batches(steps: int, size: int = 5) -> list[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """Images, targets and indices, of which some come twice in a batch."""
    generator = torch.Generator().manual_seed(1)
    return [
        (*batch(size, seed), torch.randint(SAMPLES, (size,), generator=generator)) for seed in range(steps)
    ]


def make(config: GKTConfig, **options) -> GKT:
    gkt = GKT(Net(), config)
    gkt.memory = GroupKnowledgeMemory(SAMPLES, None, config.groups, torch.float64, **options)
    return gkt


def assert_holds(
    memory: GroupKnowledgeMemory, knowledge: dict[tuple[int, int], Tensor], tolerance: float
) -> None:
    for group in range(1, memory.groups):
        assert memory.known(group).tolist() == [(group, sample) in knowledge for sample in range(SAMPLES)]
        for sample in memory.known(group).nonzero().flatten().tolist():
            torch.testing.assert_close(
                memory.knowledge(group)[sample], knowledge[group, sample], rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "config",
    [
        GKTConfig(knowledge="dataset", ema=0.7),
        GKTConfig(
            knowledge="dataset", groups=2, loops=2, normalize_logits=True, temperature=2.0, kd_weight=0.5
        ),
        GKTConfig(knowledge="dataset", chain="steps", ema=0.7, batch_norm="all_streams"),
        GKTConfig(knowledge="dataset", chain="steps", groups=2, normalize_logits=True, subnet_ce_weight=0.3),
        GKTConfig(knowledge="dataset", chain="steps", ema=0.0, seed=3),
        GKTConfig(knowledge="dataset", ema=1.0),
        GKTConfig(knowledge="dataset", subnet_share=0.5, ema=0.7, subnet_ce_weight=0.3),
        GKTConfig(knowledge="dataset", chain="steps", subnet_share=0.5),
    ],
)
def test_every_mode_equals_a_loop_over_samples(mode, config, tmp_path):
    config = config.replace(execution=mode)
    gkt, model = make(config, path=tmp_path / "memory"), Net()
    knowledge: dict[tuple[int, int], Tensor] = {}
    for step, (inputs, targets, indices) in enumerate(batches(7)):
        dropped = [frozenset(), *(subnet.dropped(gkt.stages) for subnet in gkt.sample(step))]
        loss_of = functools.partial(loss_by_sample, step=step, indices=indices, knowledge=knowledge)
        expected = reference_step(model, inputs, targets, dropped, config, loss_of=loss_of)
        output = gkt(inputs, targets, indices=indices)
        output.loss.backward()
        terms = torch.cat([output.ce[None], output.kd])
        actual = outcome_of(gkt.model, inputs, output.loss, terms, output.logits)
        assert_same(actual, expected, 1e-10, floor=1e-13)
        assert_holds(gkt.memory, knowledge, 1e-10)
        for network in (gkt.model, model):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
    assert {group for group, _ in knowledge} == set(range(1, config.groups))


@pytest.mark.parametrize("mode", MODES)
def test_with_chains_over_steps_and_knowledge_of_the_batch_the_full_network_teaches(mode):
    config = GKTConfig(chain="steps", execution=mode)
    gkt, model = GKT(Net(), config), Net()
    for step, (inputs, targets, _) in enumerate(batches(4)):
        dropped = [frozenset(), *(subnet.dropped(gkt.stages) for subnet in gkt.sample(step))]
        expected = reference_step(model, inputs, targets, dropped, config.replace(groups=1, chain="step"))
        output = gkt(inputs, targets)
        output.loss.backward()
        terms = torch.cat([output.ce[None], output.kd])
        assert_same(
            outcome_of(gkt.model, inputs, output.loss, terms, output.logits), expected, 1e-11, floor=1e-13
        )


def test_what_is_not_finite_is_never_kept():
    """Neither rows of NaN, nor those beyond float16; their samples keep what was known of them."""
    memory = GroupKnowledgeMemory(4, 2, 2)
    memory.write(torch.tensor([0, 1]), {1: torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    learnt = torch.tensor([[math.nan, 0.0], [5.0, 6.0], [7.0, 1e6], [9.0, 10.0], [math.inf, 0.0]])
    memory.write(torch.tensor([0, 1, 1, 2, 3]), {1: learnt})
    assert memory.known(1).tolist() == [True, True, True, False]
    assert memory.knowledge(1)[:3].tolist() == [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]]


def test_a_step_that_breaks_leaves_only_finite_knowledge():
    gkt = make(GKTConfig(knowledge="dataset"))
    (inputs, targets, indices), (broken, _, _) = batches(2)
    gkt(inputs, targets, indices=indices)
    before = copy.deepcopy(gkt.memory.state_dict())
    broken[0][0] = math.nan  # BatchNorm spreads it over the batch
    gkt(broken, targets, indices=(indices + 1) % SAMPLES)
    assert torch.equal(gkt.memory.state_dict()["known"], before["known"])
    assert torch.equal(gkt.memory.state_dict()["values"], before["values"])


def test_evaluation_mode_reads_and_writes_nothing():
    gkt = make(GKTConfig(knowledge="dataset", chain="steps"))
    for inputs, targets, indices in batches(2):
        gkt(inputs, targets, indices=indices)
    before = copy.deepcopy(gkt.memory.state_dict())
    gkt.eval()
    inputs, targets, indices = batches(1)[0]
    taught_by_the_past = gkt(inputs, targets, step=1, indices=indices)
    taught_by_the_full_network = gkt(inputs, targets, step=1)
    assert not torch.equal(taught_by_the_past.kd, taught_by_the_full_network.kd)
    assert torch.equal(gkt.memory.state_dict()["values"], before["values"])


def test_calls_that_can_not_be_remembered_are_refused():
    inputs, targets, indices = batches(1)[0]
    config = GKTConfig(knowledge="dataset")
    with pytest.raises(ValueError, match=r"no memory is attached; set gkt.memory = GroupKnowledgeMemory"):
        GKT(Net(), config)(inputs, targets, indices=indices)
    gkt = make(config)
    shares = F.softmax(torch.randn(5, CLASSES, dtype=torch.float64), 1)
    for changes, error, message in (
        ({"indices": None}, ValueError, "indices is None and knowledge is 'dataset'.*Indexed"),
        ({"indices": indices.tolist()}, TypeError, "indices is list; it must be an int64 tensor"),
        ({"indices": indices.float()}, TypeError, "indices is torch.float32; it must be an int64 tensor"),
        ({"indices": indices[:3]}, ValueError, r"indices has shape \(3,\); it must be \(5,\)"),
        ({"indices": indices + SAMPLES}, ValueError, r"indices has \d+; it must lie in \[0, 7\)"),
        ({"indices": indices - SAMPLES}, ValueError, r"indices has -\d+; it must lie in \[0, 7\)"),
        ({"targets": shares}, ValueError, "shares of classes between 0 and 1, as mixup and cutmix"),
    ):
        with pytest.raises(error, match=message):
            gkt(inputs, **{"targets": targets, "indices": indices} | changes)
    assert not gkt.memory.known(1).any()
    gkt(inputs, F.one_hot(targets, CLASSES).double(), indices=indices)  # shares, but not mixed
    assert gkt.memory.known(1).any()
    narrow = make(config)
    narrow.memory = GroupKnowledgeMemory(SAMPLES, CLASSES + 1, 3)
    with pytest.raises(ValueError, match="logits have 4 classes; the memory has 5"):
        narrow(inputs, targets, indices=indices)


def test_dense_predictions_are_refused():
    class Dense(Net):
        def forward(self, x):
            return super().forward(x)[:, :, None].expand(-1, -1, 3)

    gkt = GKT(Dense(), GKTConfig(knowledge="dataset", execution="shared"))
    gkt.memory = GroupKnowledgeMemory(SAMPLES, None, 3)
    inputs, targets, indices = batches(1)[0]
    with pytest.raises(ValueError, match=r"logits have shape \(5, 4, 3\).*Use knowledge='batch' for dense"):
        gkt(inputs, targets[:, None].expand(-1, 3), indices=indices)


def test_indices_that_nobody_needs_are_said_once(caplog):
    gkt = GKT(Net(), GKTConfig(execution="shared"))
    inputs, targets, indices = batches(1)[0]
    with caplog.at_level(logging.WARNING, "gkt_fast"):
        for _ in range(2):
            gkt(inputs, targets, indices=indices)
    assert [r.message for r in caplog.records if "indices" in r.message] == [
        "indices are given and knowledge is 'batch', which makes no use of them"
    ]


def test_memories_that_do_not_fit_are_refused(tmp_path):
    for arguments, error, message in (
        ((0, 4, 3), ValueError, "samples is 0; it must be at least 1"),
        ((5, 1, 3), ValueError, "classes is 1; it must be at least 2"),
        ((5, 4, 1), ValueError, "groups is 1; it must be at least 2"),
        ((5.0, 4, 3), TypeError, "samples is 5.0; it must be an integer"),
        ((5, 4, 3, torch.bfloat16), ValueError, "dtype is torch.bfloat16; it must be one of"),
        ((5, 4, 3, torch.float16, tmp_path / "m", "meta"), ValueError, "device is meta with a path"),
    ):
        with pytest.raises(error, match=message):
            GroupKnowledgeMemory(*arguments)
    gkt = GKT(Net(), GKTConfig(knowledge="dataset"))
    with pytest.raises(ValueError, match="memory has groups=2; the configuration has 3"):
        gkt.memory = GroupKnowledgeMemory(5, 4, 2)
    with pytest.raises(TypeError, match="memory is dict"):
        gkt.memory = {}
    with pytest.raises(ValueError, match="knowledge is 'batch'; it must be 'dataset'"):
        GKT(Net()).memory = GroupKnowledgeMemory(5, 4, 3)
    with pytest.raises(ValueError, match="group is 3; what is remembered is of group 1 to 2"):
        GroupKnowledgeMemory(5, 4, 3).known(3)
    with pytest.raises(ValueError, match="samples=6; here it has samples=5"):
        GroupKnowledgeMemory(5, 4, 3).load_state_dict(GroupKnowledgeMemory(6, 4, 3).state_dict())


def test_copies_and_pickles_write_nowhere_else(tmp_path):
    gkt = make(GKTConfig(knowledge="dataset"), path=tmp_path / "memory")
    inputs, targets, indices = batches(1)[0]
    gkt(inputs, targets, indices=indices)
    content = (tmp_path / "memory").read_bytes()
    for other in (copy.deepcopy(gkt), pickle.loads(pickle.dumps(gkt))):
        assert torch.equal(other.memory.knowledge(1), gkt.memory.knowledge(1))
        other(inputs, targets, indices=(indices + 1) % SAMPLES)
        assert not torch.equal(other.memory.knowledge(1), gkt.memory.knowledge(1))
    assert (tmp_path / "memory").read_bytes() == content


def test_explain_says_what_the_memory_takes():
    gkt = GKT(Net(), GKTConfig(knowledge="dataset", chain="steps", execution="shared"))
    gkt.cost([], batch()[0])
    gkt.network.remember(batch()[0])
    assert "no memory is attached yet" in gkt.explain()
    gkt.memory = GroupKnowledgeMemory(2**20, 8, 3)
    for step, group, moved in ((0, 1, 2), (1, 2, 3), (2, 3, 1)):  # read and written: 1, 1; 1 and 2, 2; 2
        text = gkt.explain(step)
        assert f"1 subnet {gkt.sample(step)[0]} (group {group} of 3)" in text
        assert "knowledge of 1048576 samples: 2 groups, classes: 8, torch.float16, on cpu, 32.00 MiB" in text
        assert f"the step reads and writes {moved * 16} bytes of it per sample" in text
