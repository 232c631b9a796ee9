"""bench/alternatives.py: drop path on subsets of the batch is what it says."""

from __future__ import annotations

import torch

from gkt_fast.instruments.transformer import VisionTransformerLike, with_drop_path


def test_without_dropping_it_is_the_plain_network() -> None:
    torch.manual_seed(0)
    model = VisionTransformerLike(blocks=2, width=12, heads=3, tokens=4).double()
    x = torch.randn(6, 4, 48, dtype=torch.float64)
    difference = with_drop_path(model, 0.0)(x) - model(x)
    assert difference.abs().max() < 1e-12


def test_dropped_samples_pass_and_kept_ones_are_scaled_up() -> None:
    block = with_drop_path(VisionTransformerLike(1, 12, 3, 4), 0.5).blocks[0]
    x = torch.randn(6, 4, 12)
    y = block._add(x, torch.ones_like)
    added = (y - x).mean((1, 2))
    assert sorted(added.round(decimals=4).tolist()) == [0, 0, 0, 2, 2, 2]
