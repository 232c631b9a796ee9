"""Several processes, by torch.distributed: what GKT needs beside DistributedDataParallel.

Everything here does the obvious thing in a single process, so that callers need not ask. Functions marked *collective*
must be called by every rank of a distributed run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset

__all__ = [
    "agree",
    "any_rank",
    "average_batch_norm",
    "gather",
    "gather_rows",
    "is_distributed",
    "is_sharded",
    "parallelize",
    "rank",
    "reduce_min",
    "reduce_sum",
    "share",
    "torchrun_process_group",
    "unsynchronized_batch_norm",
    "world_size",
]

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether there is a process group of more than one process."""
    return world_size() > 1


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def torchrun_process_group(device: torch.device | str, timeout: float = 600.0) -> Iterator[torch.device]:
    """The process group of torchrun's environment; without torchrun, or where there is a group already, nothing.

    Args:
        device: what to train on; of "cuda" each process takes its own GPU, by torchrun's LOCAL_RANK.
        timeout: seconds after which a collective that another rank does not join fails.

    Yields:
        This process's device.
    """
    device = torch.device(device)
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield device
    # Not after an error: the other ranks may be waiting for this one, and torchrun ends them once it has left.
    dist.destroy_process_group()


def parallelize(gkt: nn.Module, device: torch.device, options: Mapping[str, Any] | None = None) -> nn.Module:
    """`gkt` in DistributedDataParallel where there are several processes, else `gkt` itself. Collective.

    Args:
        gkt: a `GKT`.
        device: where it is.
        options: further arguments of DistributedDataParallel, such as `bucket_cap_mb`.

    Raises:
        ValueError: the model is sharded by `fully_shard`.
    """
    if is_sharded(gkt):
        raise ValueError(
            "model is sharded by fully_shard; GKTTrainer trains with DistributedDataParallel, whose checkpoints hold "
            "whole parameters. Train a sharded model with GKT in a loop of your own"
        )
    if not is_distributed():
        return gkt
    # Without the full network a step leaves the dropped blocks out, the same ones on every rank.
    unused = {"find_unused_parameters": not gkt.config.train_full}
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(gkt, device_ids=device_ids, **{**unused, **(options or {})})


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or a part of it, or `FullyShardedDataParallel` (the older FSDP).

    Around the model the latter shows only while it runs with gradients: the parameters are parts of a flat one.
    """
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return True
    return any(
        _is_part_of_flat_parameter(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None and parameter.grad_fn is not None
    )


def _is_part_of_flat_parameter(parameter: Tensor) -> bool:
    from torch.distributed.fsdp import FlatParameter

    node = parameter.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None and isinstance(node.variable, FlatParameter)


def share(dataset: Dataset) -> Dataset:
    """This rank's part of a data set for evaluation: every world_size()-th sample, each sample on one rank only.

    torch's DistributedSampler repeats samples so that all ranks have as many, which an accuracy should not.
    """
    if not is_distributed():
        return dataset
    return Subset(dataset, range(rank(), len(dataset), world_size()))  # type: ignore[arg-type]


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, a new tensor; in a single process the tensor itself. Collective."""
    return _reduce(tensor, "SUM")


def reduce_min(tensor: Tensor) -> Tensor:
    """The least over all ranks, as `reduce_sum`. Collective."""
    return _reduce(tensor, "MIN")


def _reduce(tensor: Tensor, operation: str) -> Tensor:
    if not is_distributed():
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, getattr(dist.ReduceOp, operation))
    return result


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective."""
    if not is_distributed():
        return flag
    return bool(reduce_sum(torch.tensor(int(flag), device=device)))


def gather(value: T) -> list[T]:
    """The value of every rank, in order of ranks. Collective."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in order of ranks, which may have unequal numbers of them. Collective; the host waits."""
    if not is_distributed():
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], len(tensor)))
    numbers = torch.cat(counts).tolist()
    padded = tensor.new_zeros(max(numbers), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def agree(what: str, value: Any) -> None:
    """Checks that all ranks have the same value. Collective.

    Raises:
        RuntimeError: they don't; names `what` and every rank's value.
    """
    values = gather(value)
    if any(other != values[0] for other in values):
        listed = ", ".join(f"rank {i}: {other}" for i, other in enumerate(values))
        raise RuntimeError(f"{what} differs between ranks ({listed}); it must be the same everywhere")


@torch.no_grad()
def average_batch_norm(model: nn.Module) -> None:
    """After `recalibrate_batch_norm` on every rank's own batches: the average over the batches of all. Collective.

    Each rank counts by the number of batches that it saw, so that the result is that of one process which saw all.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers or not is_distributed():
        return
    statistics = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    counts = torch.stack([layer.num_batches_tracked for layer in layers for _ in range(2)]).double()
    weighted = [buffer.double().flatten() * count for buffer, count in zip(statistics, counts, strict=True)]
    sums = reduce_sum(torch.cat([counts, *weighted]))
    counts, sums = sums[: len(statistics)], sums[len(statistics) :]
    for buffer, total, count in zip(
        statistics, sums.split([b.numel() for b in statistics]), counts, strict=True
    ):
        buffer.copy_((total / count).view_as(buffer))
    for layer, count in zip(layers, counts[::2], strict=True):
        layer.num_batches_tracked.copy_(count)


class _Unsynchronized(nn.SyncBatchNorm):
    """SyncBatchNorm that stays within its process."""

    forward = _BatchNorm.forward


@contextmanager
def unsynchronized_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, SyncBatchNorm layers take their statistics from this process's batch alone, without communication."""
    kinds = {module: type(module) for module in model.modules() if isinstance(module, nn.SyncBatchNorm)}
    for layer, kind in kinds.items():
        # Behind a subclass, which may add an activation, and before SyncBatchNorm in the order of base classes.
        bases = (_Unsynchronized,) if kind is nn.SyncBatchNorm else (kind, _Unsynchronized)
        # `unsynchronized`: read where batch norms are told apart (gkt_fast.batch_norm); a subclass may do anything.
        layer.__class__ = type(kind.__name__, bases, {"unsynchronized": kind is nn.SyncBatchNorm})
    try:
        yield
    finally:
        for layer, kind in kinds.items():
            layer.__class__ = kind
