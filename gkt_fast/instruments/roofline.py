"""A roofline for every op that a training step really runs: predictions with a range, never measurements.

Steps run on fake tensors, which have shapes but no elements; a dispatch mode counts the bytes, FLOPs and launches of
every op (op_counts.py). An op takes at least max(bytes / bandwidth, FLOPs / peak), each launch a latency, and each
load that the merges of `ghost_batch_norm` must wait for another (merges.py). That is the range's lower end; its upper
end is that of slower kernels (`SLACKS`) and of an eager step that may have to wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gkt_fast import GKT, GKTConfig, fuse_blocks, use_backend
from gkt_fast.batch_norm.fusion import FusedBlock

from .op_counts import OpCost, OpCounter, fake_in_place

PLAIN = ("plain", "plain+fused")
MODES = (*PLAIN, "sequential", "shared", "stacked", "lean")


@dataclass(frozen=True)
class Network:
    """A network, its images' size and its usual batch size."""

    build: Callable[[], nn.Module]
    image_size: int
    batch_size: int
    classes: int


@dataclass(frozen=True)
class Rates:
    """What a GPU can do.

    Args:
        bandwidth: of main memory, bytes/s.
        peaks: FLOP/s of matrix products by the dtype of their inputs, without sparsity.
        launch: seconds from one kernel to the next when neither does anything.
        load: seconds from a load from main memory to its value, when nothing else is going on.
    """

    bandwidth: float
    peaks: dict[torch.dtype, float]
    launch: float
    load: float = 0.3e-6  # of the order measured by https://arxiv.org/abs/2402.13499, under 500 cycles


# Two additions of 1,024 elements in a CUDA graph are 1.1 us apart: https://github.com/pytorch/pytorch/issues/161104
GRAPH_LAUNCH = 1.1e-6
# A launch outside a graph costs the CPU 4 to 6 us: https://susun-blog.com/blog/pegainfer-3-cuda-graph
CPU_LAUNCH = 4e-6

GPUS = {
    # Data sheets, without sparsity. https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    # (H100 SXM: 3.35 TB/s, 989.4 and 494.7 TFLOPS), https://www.nvidia.com/en-us/data-center/a100/ (80 GB SXM: 2,039
    # GB/s, 312 and 156 TFLOPS); the digits after the point: https://glennklockwood.com/garden/processors/h100
    ("H100 SXM", "data sheet"): Rates(
        3.35e12, {torch.bfloat16: 989.4e12, torch.float32: 494.7e12}, GRAPH_LAUNCH
    ),
    ("A100 SXM 80GB", "data sheet"): Rates(
        2.039e12, {torch.bfloat16: 312e12, torch.float32: 156e12}, GRAPH_LAUNCH
    ),
    # Measured. H100: 3.01 TB/s in Nsight Compute,
    # https://github.com/Dao-AILab/quack/blob/main/media/2025-07-10-membound-sol.md
    # A100: 1.80 TB/s, https://forums.developer.nvidia.com/t/trouble-to-reach-peak-bandwidth-of-a100/339083
    # bfloat16 products of 794.5 and 271.2 TFLOPS at the best shape,
    # https://github.com/stas00/ml-engineering/tree/master/compute/accelerator (Maximum Achievable Matmul FLOPS).
    # TF32: no measurement was found; the same share of the data sheet as bfloat16.
    ("H100 SXM", "measured"): Rates(
        3.01e12, {torch.bfloat16: 794.5e12, torch.float32: 0.803 * 494.7e12}, GRAPH_LAUNCH
    ),
    ("A100 SXM 80GB", "measured"): Rates(
        1.80e12, {torch.bfloat16: 271.2e12, torch.float32: 0.869 * 156e12}, GRAPH_LAUNCH
    ),
}


@dataclass(frozen=True)
class Slack:
    """How many times its bound an op takes, at most: torch's and cuDNN's ops, and ours."""

    torch: float
    own: float


# The one published step that compares: ResNet-50 v1.5 in mixed precision on one A100 80GB trains at 2,470 images/s, at
# batch 256 thus 103.6 ms, 1.31 times the bound, with its optimizer and input:
# https://github.com/NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5. Our kernels have never
# met a GPU: twice their bound is an assumption.
SLACKS = (Slack(1.0, 1.0), Slack(1.5, 1.0), Slack(1.5, 2.0))


def predict(
    name: str,
    network: Network,
    dtype: torch.dtype,
    steps: int,
    batch_size: int | None = None,
    host: Mapping[str, float] | None = None,
) -> list[dict]:
    """The rows of one network in one precision: every mode on every GPU.

    Args:
        name: the network's, for the rows.
        network: the network.
        dtype: bfloat16 (autocast) or float32 (TF32).
        steps: how many steps' subnets to take the mean over.
        batch_size: default: the network's own.
        host: seconds that the host takes for an eager step, by mode, as measured somewhere; without one launching alone
            is counted, `CPU_LAUNCH` each.
    """
    batch_size = batch_size or network.batch_size
    counts = {}
    for mode in MODES:
        counts[mode] = count_steps(network, mode, dtype, batch_size, 1 if mode in PLAIN else steps)
    launches = {mode: mean(sum(op.launches for op in run) for run in runs) for mode, runs in counts.items()}
    host_seconds = {mode: (host or {}).get(mode, n * CPU_LAUNCH) for mode, n in launches.items()}
    rows = []
    for (gpu, kind), rates in GPUS.items():
        ranges = {mode: scenarios(runs, rates, host_seconds[mode]) for mode, runs in counts.items()}
        for mode, runs in counts.items():
            ratios = [own / plain for own, plain in zip(ranges[mode], ranges["plain"], strict=True)]
            rows.append(
                {
                    "model": name,
                    "dtype": "float32 (TF32)" if dtype == torch.float32 else "bfloat16",
                    "mode": mode,
                    "gpu": gpu,
                    "rates": kind,
                    "gflop": mean(sum(op.flops for op in run) for run in runs) / 1e9,
                    "gbytes": mean(sum(op.bytes for op in run) for run in runs) / 1e9,
                    "launches": launches[mode],
                    "predicted_ms": 1e3 * min(ranges[mode]),
                    "to_ms": 1e3 * max(ranges[mode]),
                    "plain_steps": ratios[0],
                    "plain_steps_from": min(ratios),
                    "plain_steps_to": max(ratios),
                    "memory_share": memory_bound_share(runs, rates),
                    "cpu_ms": 1e3 * launches[mode] * CPU_LAUNCH,
                    "host_ms": 1e3 * host_seconds[mode],
                    "host_measured": mode in (host or {}),
                    "batch_size": batch_size,
                    "steps": len(runs),
                    "torch": torch.__version__,
                }
            )
    return rows


def count_steps(
    network: Network, mode: str, dtype: torch.dtype, batch_size: int, steps: int
) -> list[list[OpCost]]:
    """The ops of forward and backward of each step."""
    torch.manual_seed(0)
    model = network.build().to(memory_format=torch.channels_last)
    shape = (batch_size, 3, network.image_size, network.image_size)
    gkt = None
    if mode == "plain+fused":
        fuse_blocks(model)
    elif mode != "plain":
        gkt = GKT(model, GKTConfig(execution=mode, fuse_blocks=mode != "sequential"))
        with torch.no_grad():  # the first step learns about the layers, from tensors with elements
            gkt(torch.zeros(2, *shape[1:]), torch.zeros(2, dtype=torch.int64), step=0)
    fake = FakeTensorMode()
    fake_in_place(model, fake)
    runs = []
    autocast = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext()
    with (
        fake,
        use_backend("cpp"),
    ):  # not plain torch, so that our ops are there to be counted; none is executed
        images = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        targets = torch.empty(batch_size, network.classes)
        for step in range(steps):
            for parameter in model.parameters():
                parameter.grad = None
            with OpCounter() as counter, _telling_of_fused_blocks(counter):
                with autocast:
                    if gkt is None:
                        loss = F.cross_entropy(model(images).float(), targets)
                    else:
                        loss = gkt(images, targets, step=step).loss
                loss.backward()
            runs.append(counter.ops)
    return runs


@contextmanager
def _telling_of_fused_blocks(counter: OpCounter) -> Iterator[None]:
    """Tells the counter when a fused block runs, whose backward pass computes activations again."""
    forward = FusedBlock.forward

    def told(block: FusedBlock, x: Tensor) -> Tensor:
        counter.recomputing = bool(block.recompute) and torch.is_grad_enabled()
        try:
            return forward(block, x)
        finally:
            counter.recomputing = False

    with mock.patch.object(FusedBlock, "forward", told):
        yield


def op_seconds(op: OpCost, rates: Rates) -> tuple[float, float]:
    """The time that an op's bytes take, and its FLOPs."""
    return op.bytes / rates.bandwidth, op.flops / rates.peaks.get(op.dtype, float("inf"))


def bound(runs: Sequence[Sequence[OpCost]], rates: Rates, slack: Slack = SLACKS[0]) -> float:
    """The least seconds of a step on the GPU, its mean over the runs; with a slack, those of slower kernels."""
    return mean(
        sum(_slack(op, slack) * max(op_seconds(op, rates)) + _latency(op, rates) for op in run)
        for run in runs
    )


def scenarios(runs: Sequence[Sequence[OpCost]], rates: Rates, host: float) -> list[float]:
    """Seconds of a step: launched from a CUDA graph with each of `SLACKS`, then eagerly with each.

    Eagerly the step takes as long as the GPU or as the host, whichever is longer.
    """
    seconds = [bound(runs, rates, slack) for slack in SLACKS]
    return [*seconds, *(max(gpu, host) for gpu in seconds)]


def _slack(op: OpCost, slack: Slack) -> float:
    return slack.own if op.name.startswith("gkt_fast::") else slack.torch


def _latency(op: OpCost, rates: Rates) -> float:
    return op.launches * rates.launch + op.waits * rates.load


def memory_bound_share(runs: Sequence[Sequence[OpCost]], rates: Rates) -> float:
    """The share of the bound that ops take whose bytes need longer than their FLOPs."""
    memory = mean(sum(m for m, f in (op_seconds(op, rates) for op in run) if m >= f) for run in runs)
    return memory / bound(runs, rates)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
