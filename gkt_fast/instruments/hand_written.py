"""A shared step written by hand for one network: what the package's execution of any network is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkt_fast import GKTConfig, group_knowledge_loss
from gkt_fast.models import CifarResNet


def hand_written_step(
    model: CifarResNet,
    norms: Sequence[nn.BatchNorm2d],
    images: Tensor,
    targets: Tensor,
    depths: Sequence[tuple[int, ...]],
    config: GKTConfig,
) -> tuple[Tensor, Tensor]:
    """Loss and terms of a step: the full network, then the subnets that keep the first blocks of each stage.

    Args:
        model: the network.
        norms: its BatchNorm layers; only the full network updates their running statistics.
        images: (B, C, H, W).
        targets: (B,).
        depths: of the subnets.
        config: weights of the loss.
    """
    stages = (model.layer1, model.layer2, model.layer3)
    full = tuple(map(len, stages))
    activations: dict[tuple[int, ...], Tensor] = {}

    def run_stage(before: tuple[int, ...], depth: int) -> None:
        """Extends what is known of the stage behind `before` to `depth` blocks."""
        blocks = stages[len(before)]
        for k in range(depth):
            if (*before, k + 1) not in activations:
                x = activations[(*before, k) if k else before]
                activations[(*before, k + 1)] = blocks[k](x)

    def run_stream(stream: tuple[int, ...]) -> None:
        for stage, depth in enumerate(stream):
            run_stage(stream[:stage], depth)
            if depth == 0:
                activations[stream[: stage + 1]] = activations[stream[:stage]]

    activations[()] = F.relu(model.bn1(model.conv1(images)))
    run_stream(full)
    logits = {full: _head(model, activations[full])}
    with _without_updates(norms):
        for stream in depths:
            if stream not in logits:
                run_stream(stream)
                logits[stream] = _head(model, activations[stream])
    stacked = torch.stack([logits[stream] for stream in (full, *depths)])
    return group_knowledge_loss(
        stacked,
        targets,
        groups=config.groups,
        loops=config.loops,
        ema=config.ema,
        temperature=config.temperature,
        normalize_logits=config.normalize_logits,
        ce_weight=config.ce_weight,
        kd_weight=config.kd_weight,
        subnet_ce_weight=config.subnet_ce_weight,
    )


def _head(model: CifarResNet, x: Tensor) -> Tensor:
    return model.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@contextmanager
def _without_updates(norms: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    """The layers normalise by their batch, and leave their running statistics alone."""
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
