"""Subnets on a share of the batch: modes against a plain loop that cuts where a subnet leaves the full network."""

from __future__ import annotations

import pytest
import torch
from helpers.reference_step import (
    MODES,
    POLICIES,
    assert_modes_agree,
    one_thread,  # noqa: F401
)
from helpers.small_nets import CLASSES

from gkt_fast import GKTConfig
from gkt_fast.models import CifarResNet
from gkt_fast.network.discovery import find_stages
from gkt_fast.subnets.sampling import sample_subnets

MODES = [m for m in MODES if m != "stacked"]


def cifar(blocks=(2, 3, 2), width=4):
    torch.manual_seed(0)
    return CifarResNet(blocks, num_classes=CLASSES, width=width).double()


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator)
    return (images,), torch.randint(CLASSES, (size,), generator=generator)


def dropped_of(model, config, step):
    stages = find_stages(model)
    return [frozenset(), *(subnet.dropped(stages) for subnet in sample_subnets(stages, config, step))]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampler, loops", [("inherit_decay", 1), ("uniform", 2), ("stochastic_depth", 1)])
@pytest.mark.parametrize("share, size", [(0.5, 6), (0.25, 7), (0.1, 5), (0.9, 3)])
def test_equals_the_plain_loop(share, size, sampler, loops, policy):
    config = GKTConfig(
        groups=3, loops=loops, batch_norm=policy, sampler=sampler, min_depth=0, subnet_share=share
    )
    model = cifar()
    inputs, targets = batch(size, seed=size)
    assert_modes_agree(model, inputs, targets, dropped_of(model, config, size), config, MODES)
