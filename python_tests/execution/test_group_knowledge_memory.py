"""Chains over steps, and knowledge that is kept by sample: every mode against a plain loop over samples, in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from helpers.reference_step import (
    MODES,
    assert_same,
    one_thread,  # noqa: F401
    outcome_of,
    reference_cross_entropy,
    reference_step,
)
from helpers.small_nets import Net, batch
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
