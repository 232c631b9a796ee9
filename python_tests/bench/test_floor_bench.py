"""bench/floor.py records the convolutions and matrix products of a step and can run them again."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from gkt_fast.instruments.recorded_calls import Call, Recorder, time_calls


def test_recorded_calls_and_their_operations() -> None:
    """A convolution of 2 images of 3x6x6 to 5 channels by 3x3: 2*5*6*6*3*9 products; a linear layer, 180 to 4."""
    convolution, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(180, 4)
    images = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    calls: Counter[Call] = Counter()
    for _ in range(2):
        with Recorder(calls):
            linear(convolution(images).flatten(1)).sum().backward()
    flops = {str(call.operator.overloadpacket): (calls[call], call.flop) for call in calls}
    forward = 2 * 2 * 5 * 6 * 6 * 3 * 9
    assert flops["aten.convolution"] == (2, forward)
    assert flops["aten.convolution_backward"] == (2, forward)  # the images want no gradient
    assert flops["aten.addmm"] == (2, 2 * 2 * 180 * 4)
    assert sum(calls.values()) == 2 * 5  # two products in the linear layer's backward


def test_calls_run_again_on_tensors_of_their_layout() -> None:
    x = torch.randn(4, 6, 5)[:, ::2]
    calls: Counter[Call] = Counter()
    with Recorder(calls):
        torch.bmm(x, torch.randn(4, 5, 7))
    (call,) = calls
    made = [leaf.make() for leaf in call.arguments[0]]
    assert [tensor.shape for tensor in made] == [(4, 3, 5), (4, 5, 7)]
    assert made[0].stride() == x.stride()
    assert call.fresh()().shape == (4, 3, 7)
    assert set(time_calls({call}, 1)) == {call}
