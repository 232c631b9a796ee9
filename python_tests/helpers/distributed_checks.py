"""What every rank of a distributed run does and must find; started by test_distributed.py, one process per rank.

    python -m helpers.distributed_checks RANK RANKS FOLDER

Each check runs on all ranks at the same time. A rank writes what failed to FOLDER/failures-RANK.json and leaves with
code 0 when it got through.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gkt_fast import (
    GKT,
    GKTConfig,
    GKTTrainer,
    GroupKnowledgeMemory,
    evaluate,
    fuse_blocks,
    recalibrate_batch_norm,
)
from gkt_fast.batch_norm import block_plan
from gkt_fast.batch_norm.layer import run_batch_norm
from gkt_fast.batch_norm.synchronized import synchronized_batch_norm
from gkt_fast.data import Indexed
from gkt_fast.distributed import agree, gather, reduce_sum, share, world_size
from gkt_fast.execution import choose_execution
from gkt_fast.models import cifar_resnet
from gkt_fast.training.checkpoint import load_checkpoint
from helpers.reference_step import (
    MODES,
    POLICIES,
    TOLERANCES,
    Outcome,
    assert_same,
    outcome_of,
    reference_step,
)

CLASSES = 5
CONFIG = GKTConfig(groups=2, loops=2)
SAMPLES, JOINED_BATCH = 36, 12


class NormFreeBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * F.gelu(self.conv(x))


class NormFreeNet(nn.Module):
    """Rows of a batch have nothing to do with each other here."""

    def __init__(self, channels: int = 6, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(NormFreeBlock(channels) for _ in range(depth))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def norm_free_net() -> nn.Module:
    torch.manual_seed(0)
    return NormFreeNet().double()


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(14, CLASSES, width=4).double()


def data(samples: int = SAMPLES, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 8, 8, dtype=torch.float64, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (samples,), generator=generator))


def parts(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """A joined batch, cut into the ranks' parts."""
    return [*zip(*(tensor.chunk(world_size()) for tensor in tensors), strict=True)]


def wrap(
    model: nn.Module, mode: str, policy: str = "full", share: float = 1.0, **options: Any
) -> DistributedDataParallel:
    config = CONFIG.replace(execution=mode, batch_norm=policy, subnet_share=share)
    return DistributedDataParallel(GKT(model, config), **options)


def outcome(ddp: DistributedDataParallel, batch: tuple[Tensor, ...], step: int) -> Outcome:
    """What a step leaves behind, with loss and terms averaged over the ranks."""
    output = ddp(*batch, step=step)
    output.loss.backward()
    mean = [reduce_sum(value.detach()) / world_size() for value in (output.loss, output.ce, output.kd)]
    return outcome_of(
        ddp.module.model, batch[:1], mean[0], torch.cat([mean[1][None], mean[2]]), output.logits
    )


def expected_outcome(
    model: nn.Module, batch: tuple[Tensor, ...], step: int, policy: str = "full", share: float = 1.0
) -> Outcome:
    """The same by the plain loop in one process."""
    gkt = GKT(model, CONFIG.replace(batch_norm=policy, subnet_share=share, fuse_blocks=False))
    dropped = [frozenset(), *(subnet.dropped(gkt.stages) for subnet in gkt.sample(step))]
    return reference_step(model, batch[:1], batch[1], dropped, gkt.config)


def mean_over_parts(model: nn.Module, batch: tuple[Tensor, ...], step: int, share: float = 1.0) -> Outcome:
    """Each rank's part by itself: this rank's logits and buffers, the means of all else."""
    outcomes = [expected_outcome(copy.deepcopy(model), part, step, share=share) for part in parts(batch)]
    mean = copy.copy(outcomes[dist.get_rank()])
    mean.loss, mean.terms = (
        torch.stack([getattr(one, n) for one in outcomes]).mean(0) for n in ("loss", "terms")
    )
    mean.gradients = {n: torch.stack([one.gradients[n] for one in outcomes]).mean(0) for n in mean.gradients}
    return mean


def check_gradients_without_batch_norm_equal_one_process() -> None:
    joined = data(JOINED_BATCH).tensors
    for step in range(2):
        expected = expected_outcome(norm_free_net(), joined, step)
        for mode in MODES:
            ddp = wrap(norm_free_net(), mode)
            assert not ddp.find_unused_parameters
            actual = outcome(ddp, parts(joined)[dist.get_rank()], step)
            actual.logits = torch.cat(gather(actual.logits))
            assert_same(actual, expected, TOLERANCES.get(mode, 1e-12))


def check_batch_norm_uses_each_ranks_own_statistics() -> None:
    joined = data(JOINED_BATCH).tensors
    expected = mean_over_parts(batch_norm_net(), joined, step=3)
    for mode in MODES:
        ddp = wrap(batch_norm_net(), mode)
        assert_same(outcome(ddp, parts(joined)[dist.get_rank()], step=3), expected, 1e-11)


@contextlib.contextmanager
def torch_takes_sync_batch_norm_on_the_cpu() -> Iterator[None]:
    """torch has SyncBatchNorm for GPUs alone. Its refusals are taken out, and what `stacked` runs stands in for it."""
    refusal, forward = DistributedDataParallel._passing_sync_batchnorm_handle, nn.SyncBatchNorm.forward
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
    nn.SyncBatchNorm.forward = lambda self, x: run_batch_norm(self, x)
    try:
        yield
    finally:
        DistributedDataParallel._passing_sync_batchnorm_handle = refusal
        nn.SyncBatchNorm.forward = forward


def check_sync_batch_norm_joins_the_batch() -> None:
    joined = data(JOINED_BATCH).tensors
    with torch_takes_sync_batch_norm_on_the_cpu():
        for policy in POLICIES:
            expected = expected_outcome(batch_norm_net(), joined, 3, policy)
            for mode in MODES:
                model = nn.SyncBatchNorm.convert_sync_batchnorm(batch_norm_net())
                ddp = wrap(model, mode, policy)
                actual = outcome(ddp, parts(joined)[dist.get_rank()], step=3)
                actual.logits = torch.cat(gather(actual.logits))
                assert_same(actual, expected, 1e-11)


def check_synchronized_batch_norm_with_parts_of_different_sizes() -> None:
    """Three ghosts, the first with more rows, in float64 and float32, means far from zero; against torch on the joined
    rows of each ghost."""
    rank, lead, rows = dist.get_rank(), *([n + r for r in range(world_size())] for n in (5, 3))
    sizes = lead, rows, rows

    def own(ghosts: list[Tensor]) -> Tensor:
        """This rank's rows of every ghost batch."""
        return torch.cat([ghost.split(size)[rank] for ghost, size in zip(ghosts, sizes, strict=True)])

    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        generator = torch.Generator().manual_seed(1)
        x = [(torch.randn(sum(size), 4, 3, 2, generator=generator) + 50).to(dtype) for size in sizes]
        dy = [torch.randn(ghost.shape, generator=generator).to(dtype) for ghost in x]
        weight, bias = (torch.randn(4, generator=generator).to(dtype) for _ in range(2))

        mine, w, b = (t.clone().requires_grad_() for t in (own(x), weight, bias))
        y, mean, var = synchronized_batch_norm(mine, w, b, 3, 1e-5, dist.group.WORLD, lead[rank])
        y.backward(own(dy))
        expected = [ghost.double().requires_grad_() for ghost in x]
        ew, eb = (t.double().requires_grad_() for t in (weight, bias))
        joined = [F.batch_norm(ghost, None, None, ew, eb, training=True) for ghost in expected]
        torch.autograd.backward(joined, [gradient.double() for gradient in dy])
        for actual, wanted in (
            (y, own(joined)),
            (mine.grad, own([ghost.grad for ghost in expected])),
            (reduce_sum(w.grad), ew.grad),
            (reduce_sum(b.grad), eb.grad),
            (mean, torch.stack([ghost.double().mean((0, 2, 3)) for ghost in x])),
            (var, torch.stack([ghost.double().transpose(0, 1).flatten(1).var(1) for ghost in x])),
        ):
            torch.testing.assert_close(actual.double(), wanted.detach(), rtol=tolerance, atol=tolerance * 10)


def check_subnets_on_a_share_of_each_ranks_batch() -> None:
    joined = data(JOINED_BATCH).tensors
    expected = mean_over_parts(batch_norm_net(), joined, step=3, share=0.5)
    for mode in MODES:
        ddp = wrap(batch_norm_net(), mode, share=0.5)
        assert_same(outcome(ddp, parts(joined)[dist.get_rank()], step=3), expected, 1e-11)


def check_sync_batch_norm_joins_the_ranks_shares() -> None:
    """In one process the first rows of all ranks come first."""
    joined = data(JOINED_BATCH).tensors
    own = torch.arange(JOINED_BATCH).chunk(world_size())
    half = len(own[0]) // 2
    order = torch.cat([*(rows[:half] for rows in own), *(rows[half:] for rows in own)])
    with torch_takes_sync_batch_norm_on_the_cpu():
        reordered = tuple(tensor[order] for tensor in joined)
        expected = expected_outcome(batch_norm_net(), reordered, 3, "all_streams", share=0.5)
        for mode in MODES:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(batch_norm_net())
            ddp = wrap(model, mode, "all_streams", share=0.5)
            actual = outcome(ddp, parts(joined)[dist.get_rank()], step=3)
            actual.logits = torch.cat(gather(actual.logits))[order]
            assert_same(actual, expected, 1e-11)


def check_every_rank_draws_the_same_subnets() -> None:
    """Although their own random numbers differ."""
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    for changes in ({}, {"sampler": "stochastic_depth"}, {"budget": 1.5, "loops": 1}):
        gkt = GKT(batch_norm_net(), CONFIG.replace(**changes))
        gkt.layers(data(1).tensors[0])
        drawn = [str(subnet) for step in range(30) for subnet in gkt.sample(step)]
        agree("the subnets", drawn)
        assert len(set(drawn)) > 2


def check_gradients_are_reduced_once_per_step() -> None:
    """Each bucket once, in every mode, in few or many buckets; and not at all where torch is told to wait."""
    batch = parts(data(JOINED_BATCH).tensors)[dist.get_rank()]
    for mode in MODES:
        ddp = wrap(batch_norm_net(), mode, bucket_cap_mb=0.01)
        reduced: list[tuple[int, int]] = []

        def count(state, bucket, reduced=reduced):  # DDP takes no annotations that are strings
            reduced.append((bucket.index(), bucket.buffer().numel()))
            return allreduce_hook(None, bucket)

        ddp.register_comm_hook(None, count)
        for step in range(2):
            reduced.clear()
            with ddp.no_sync():
                ddp(*batch, step=step).loss.backward()
            assert reduced == []
            ddp(*batch, step=step).loss.backward()
            indices = [index for index, _ in reduced]
            assert indices == [*range(len(indices))]
            assert sum(numel for _, numel in reduced) == sum(p.numel() for p in ddp.parameters())
            agree("the number of buckets", len(indices))
        assert len(indices) > 1, "after the first step there are several buckets"


def check_accumulated_batches_are_synchronised_once_per_step() -> None:
    """Two and a half steps of two batches each; the gradients are those of all samples, clipped by their norm."""
    tensors = data(5 * JOINED_BATCH).tensors
    whole = [*zip(*(tensor.split(JOINED_BATCH) for tensor in tensors), strict=True)]
    model = norm_free_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = GKTTrainer(model, optimizer, CONFIG, accumulate=2, clip_grad_norm=0.05, ema_decay=0.5)
    reduced = []

    def count(state, bucket):  # DDP takes no annotations that are strings
        reduced.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    trainer._parallel_gkt.register_comm_hook(None, count)
    trainer.fit([parts(batch)[dist.get_rank()] for batch in whole], epochs=1, progress=False)
    assert sum(reduced) == 3
    gkt = GKT(norm_free_net(), CONFIG)
    optimizer = torch.optim.SGD(gkt.parameters(), 0.1)
    for step, batches in enumerate((whole[:2], whole[2:4], whole[4:])):
        optimizer.zero_grad()
        gkt(*map(torch.cat, zip(*batches, strict=True)), step=step).loss.backward()
        nn.utils.clip_grad_norm_(gkt.parameters(), 0.05)
        optimizer.step()
    for parameter, expected in zip(model.parameters(), gkt.model.parameters(), strict=True):
        assert (parameter - expected).norm() <= 1e-11 * expected.norm()
    averages = gather([parameter.detach() for parameter in trainer.ema_model.parameters()])
    assert all(map(torch.equal, averages[0], averages[-1]))


def check_a_step_that_one_rank_can_not_use_is_taken_back_on_all() -> None:
    model = batch_norm_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = GKTTrainer(model, optimizer, CONFIG, skip_nonfinite=True)
    images, targets = parts(data(JOINED_BATCH).tensors)[dist.get_rank()]
    trainer.step(images, targets)
    before = copy.deepcopy(model.state_dict())
    bad = images.clone()
    if dist.get_rank() == 0:
        bad[0, 0, 0, 0] = float("nan")
    trainer.step(bad, targets)
    assert int(trainer.optimization.skipped) == 1
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
    trainer.step(images, targets)
    assert int(trainer.optimization.skipped) == 1
    weights = gather([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, weights[0], weights[-1]))


def check_stochastic_depth_leaves_dropped_blocks_without_gradient() -> None:
    model = norm_free_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    config = GKTConfig(groups=1, sampler="stochastic_depth", train_full=False)
    trainer = GKTTrainer(model, optimizer, config)
    joined = data(JOINED_BATCH).tensors
    for _ in range(3):
        subnet = trainer.step(*parts(joined)[dist.get_rank()]).subnets[0]
        dropped = subnet.dropped(trainer.gkt.stages)
        expected = norm_free_net()
        for path in dropped:
            expected.set_submodule(path, nn.Identity())
        F.cross_entropy(expected(joined[0]), joined[1]).backward()
        gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
        for name, parameter in model.named_parameters():
            wanted = gradients.get(name)
            assert (parameter.grad is None) == (wanted is None), name
            assert wanted is None or (parameter.grad - wanted).norm() <= 1e-12 * wanted.norm(), name
    assert dropped


def check_evaluation_is_over_all_ranks() -> None:
    """On 37 samples, which no number of ranks divides; a subnet with statistics from the batches of all ranks."""
    model, whole = batch_norm_net(), data(37, seed=3)
    result = evaluate(model, DataLoader(share(whole), 4))
    images, targets = whole.tensors
    logits = model.eval()(images).float()
    assert result.samples == 37
    assert result.accuracy == (logits.argmax(1) == targets).sum() / 37
    assert abs(result.loss - F.cross_entropy(logits, targets).item()) < 1e-6

    depths, batches = (1, 2, 1), [batch[0] for batch in DataLoader(whole, 6)]
    state = copy.deepcopy(model.state_dict())
    calibrated = evaluate(
        model,
        DataLoader(share(whole), 4),
        depths,
        calibration_loader=batches[dist.get_rank() :: world_size()],
        calibration_samples=37 * world_size(),
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    recalibrate_batch_norm(model, batches, 37, depths)
    alone = evaluate(model, DataLoader(share(whole), 4), depths)
    assert calibrated.accuracy == alone.accuracy
    assert abs(calibrated.loss - alone.loss) < 1e-6
    assert abs(calibrated.loss - result.loss) > 1e-3, "the subnet gives what the network gives"


def check_evaluation_of_sync_batch_norm_needs_no_gpu_and_as_many_batches_everywhere() -> None:
    class WithActivation(nn.SyncBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    model = nn.SyncBatchNorm.convert_sync_batchnorm(batch_norm_net())
    model.bn1.__class__ = WithActivation
    whole = data(37)
    calibration = [data(4, seed)[:] for seed in range(1 + dist.get_rank())]
    outputs: list[Tensor] = []
    hook = model.bn1.register_forward_hook(lambda layer, args, output: outputs.append(output))
    evaluate(model, DataLoader(share(whole), 4), (1, 1, 1), calibration_loader=calibration)
    hook.remove()
    assert all(output.min() == 0 for output in outputs)
    assert [type(model.bn1), type(model.layer1[0].bn1)] == [WithActivation, nn.SyncBatchNorm]


def make_trainer(execution: str = "stacked") -> GKTTrainer:
    model = norm_free_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    return GKTTrainer(model, optimizer, CONFIG.replace(execution=execution), scheduler=scheduler)


def loader(dataset: TensorDataset | None = None) -> DataLoader:
    """The ranks' batches together are the same `JOINED_BATCH` samples for every number of ranks."""
    dataset = data() if dataset is None else dataset
    sampler = DistributedSampler(dataset, world_size(), dist.get_rank() if world_size() > 1 else 0, seed=7)
    return DataLoader(dataset, JOINED_BATCH // world_size(), sampler=sampler)


def check_trainer_goes_on_where_another_number_of_ranks_stopped(folder: Path) -> None:
    trainer = make_trainer()
    start = load_checkpoint(folder / "last.pt")["epoch"] if (folder / "last.pt").exists() else 0
    dist.barrier()
    torch.manual_seed(100 + dist.get_rank())
    history = trainer.fit(
        loader(),
        epochs=start + 1,
        val_loader=DataLoader(share(data(10)), 2),
        val_depths=[(1,)],
        output_dir=folder,
        progress=False,
    )
    assert [row["epoch"] for row in history] == [start]
    same = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]
    agree("the metrics", same)
    assert "val_accuracy_1" in history[0]
    dist.barrier()
    if dist.get_rank() == 0:
        states = load_checkpoint(folder / "last.pt")["random_states"]
        assert len(states) == world_size()
        assert not torch.equal(states[0]["torch"], states[1]["torch"])


def check_ranks_learn_together_what_one_process_learns() -> None:
    """Batches of unequal size, with samples that stand in several rows of one rank and of several."""
    images, targets = data(7).tensors
    for config in (CONFIG, GKTConfig(groups=3, chain="steps")):
        for mode in ("stacked", "lean"):
            config = config.replace(knowledge="dataset", execution=mode, ema=0.7)
            together, alone = GKT(norm_free_net(), config), GKT(norm_free_net(), config)
            for gkt in (together, alone):
                gkt.memory = GroupKnowledgeMemory(5, None, config.groups, torch.float64)
            for step, indices in enumerate(
                [[0, 1, 2, 1, 3, 0, 0], [4, 4, 4, 2, 2, 1, 0], [3, 3, 3, 3, 3, 3, 3]]
            ):
                joined = torch.tensor(indices)
                cut = [slice(0, 5), slice(5, 7)] if step else [slice(0, 2), slice(2, 7)]
                own = cut[dist.get_rank()]
                output = together(images[own], targets[own], step=step, indices=joined[own])
                with patch("gkt_fast.execution.memory.gather_rows", lambda rows: rows):
                    whole = alone(images, targets, step=step, indices=joined)
                torch.testing.assert_close(output.logits, whole.logits[own], rtol=1e-12, atol=1e-12)
                for group in range(1, config.groups):
                    known = alone.memory.known(group)
                    assert torch.equal(together.memory.known(group), known)
                    if known.any():
                        ranks = gather(together.memory.knowledge(group)[known])
                        assert torch.equal(ranks[0], ranks[1])
                        torch.testing.assert_close(
                            ranks[0], alone.memory.knowledge(group)[known], rtol=1e-12, atol=1e-12
                        )
                with torch.no_grad():
                    for parameter in (*together.parameters(), *alone.parameters()):
                        parameter.mul_(0.9)
            assert all(alone.memory.known(group).any() for group in range(1, config.groups))


def check_trainers_of_all_ranks_hold_the_same_knowledge() -> None:
    """With the samples that DistributedSampler repeats so that all ranks have as many, and accumulated batches."""
    dataset = Indexed(data(13))
    model = norm_free_net()
    config = GKTConfig(groups=3, chain="steps", knowledge="dataset")
    trainer = GKTTrainer(model, torch.optim.SGD(model.parameters(), 0.05), config, accumulate=2)
    trainer.fit(DataLoader(dataset, 2, sampler=DistributedSampler(dataset, seed=3)), epochs=3, progress=False)
    memory = trainer.gkt.memory
    assert memory.samples == 13 and memory.known(1).any() and memory.known(2).any()
    for group in (1, 2):
        ranks = gather((memory.known(group), memory.knowledge(group)))
        assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


def check_fully_sharded_blocks() -> None:
    """FSDP2 with the modes that leave gradients to one backward; a clear refusal by the others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size(),))

    def sharded(mode: str) -> GKT:
        gkt = GKT(batch_norm_net(), CONFIG.replace(execution=mode))
        for stage in gkt.stages:
            for path in stage.blocks:
                fully_shard(gkt.model.get_submodule(path), mesh=mesh)
        fully_shard(gkt.model, mesh=mesh)
        return gkt

    joined = data(JOINED_BATCH).tensors
    wanted = [mean_over_parts(batch_norm_net(), joined, step) for step in range(2)]
    for mode in ("stacked", "shared"):
        gkt = sharded(mode)
        for step in range(2):
            gkt.zero_grad()
            output = gkt(*parts(joined)[dist.get_rank()], step=step)
            output.loss.backward()
            for name, expected in wanted[step].gradients.items():
                actual = gkt.model.get_parameter(name).grad.full_tensor()
                assert (actual - expected).norm() <= 1e-11 * expected.norm(), (mode, name)
    for mode in ("lean", "sequential"):
        with_reason(ValueError, "fully_shard", lambda mode=mode: sharded(mode)(*joined, step=0))
    optimizer = torch.optim.SGD(gkt.model.parameters(), 0.1)
    with_reason(ValueError, "model is sharded by fully_shard", lambda: GKTTrainer(gkt.model, optimizer))


def check_a_fully_sharded_fused_block_is_one_node() -> None:
    """FSDP2 shards, gathers and steps as if the block were not fused, and the block still runs as one node."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = cifar_resnet(8, CLASSES, 4).double()
    model = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (world_size(),))
    blocks = fuse_blocks(model)
    for path in blocks:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    images, targets = data(JOINED_BATCH).tensors
    with patch.object(
        block_plan, "run_plain_residual_block", wraps=block_plan.run_plain_residual_block
    ) as run:
        for net in (whole, model):  # the same batch on every rank: the mean of gradients is each one's own
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(net(images), targets).backward()
                optimizer.step()
    assert run.call_count == 2 * len(blocks) > 0
    for sharded, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert (sharded.full_tensor() - expected).norm() <= 1e-11 * expected.norm()


def check_the_older_fsdp_is_refused_where_fully_shard_is() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    batch = parts(data(JOINED_BATCH).tensors)[dist.get_rank()]
    losses = []
    for mode in ("stacked", "shared", "lean", "sequential"):
        gkt = GKT(norm_free_net(), CONFIG.replace(execution=mode))
        wrapped = FullyShardedDataParallel(gkt, use_orig_params=True, device_id=torch.device("cpu"))
        if mode in ("lean", "sequential"):
            with_reason(
                ValueError, "FullyShardedDataParallel", lambda wrapped=wrapped: wrapped(*batch, step=0)
            )
        else:
            loss = wrapped(*batch, step=0).loss
            loss.backward()
            losses.append(loss.detach())
    assert torch.allclose(*losses, rtol=1e-11)


class MixesOnOneRank(nn.Module):
    """Mixes the rows of a batch on the last rank alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if dist.get_rank() == dist.get_world_size() - 1 else x


def check_ranks_agree_on_a_mode_that_is_wrong_on_one() -> None:
    """Before anything of the mode runs; what changes later on is refused where it is found."""
    batch = parts(data(JOINED_BATCH).tensors)[dist.get_rank()]

    def mode_of(gkt: GKT) -> str:
        return choose_execution(gkt.network, gkt._streams(gkt.sample(0), 0)).mode

    def mixing(ddp: DistributedDataParallel) -> None:
        block = ddp.module.model.blocks[2]
        block.conv = nn.Sequential(MixesOnOneRank(), block.conv)

    def in_states_of_their_own() -> DistributedDataParallel:
        """Drops of any block: all blocks but the first run in several states."""
        return DistributedDataParallel(GKT(norm_free_net(), CONFIG.replace(sampler="stochastic_depth")))

    ddp = in_states_of_their_own()
    mixing(ddp)
    ddp(*batch, step=0).loss.backward()
    assert mode_of(ddp.module) == "shared"
    ddp = in_states_of_their_own()
    ddp(*batch, step=0).loss.backward()
    assert mode_of(ddp.module) == "stacked"
    mixing(ddp)
    if dist.get_rank() == dist.get_world_size() - 1:
        with_reason(
            RuntimeError, "ranks can't change the mode one by one", lambda: ddp.module(*batch, step=1)
        )
    else:
        ddp.module(*batch, step=1)


def with_reason(error: type[Exception], words: str, call: Any) -> None:
    try:
        call()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}")


def check_values_that_differ_are_named() -> None:
    with_reason(
        RuntimeError,
        "the depth differs between ranks (rank 0: 0, rank 1: 1",
        lambda: agree("the depth", dist.get_rank()),
    )


def check_a_rank_that_hangs_ends_the_others_wait(folder: Path) -> None:
    """The last of the checks: the ranks can't talk to each other any more."""
    batch = parts(data(JOINED_BATCH).tensors)[dist.get_rank()]
    ddp = wrap(norm_free_net(), "stacked", process_group=dist.new_group(timeout=timedelta(seconds=2)))
    ddp(*batch).loss.backward()
    started = time.perf_counter()
    if dist.get_rank() == world_size() - 1:
        time.sleep(6)
        return
    try:
        ddp(*batch).loss.backward()
    except RuntimeError:
        assert 1 < time.perf_counter() - started < 6
    else:
        raise AssertionError("the step ended without the other rank")


TWO_RANKS_SHOW_IT = [
    "check_subnets_on_a_share_of_each_ranks_batch",
    "check_sync_batch_norm_joins_the_ranks_shares",
    "check_gradients_are_reduced_once_per_step",
    "check_accumulated_batches_are_synchronised_once_per_step",
    "check_stochastic_depth_leaves_dropped_blocks_without_gradient",
    "check_ranks_learn_together_what_one_process_learns",
    "check_trainers_of_all_ranks_hold_the_same_knowledge",
    "check_fully_sharded_blocks",
    "check_a_fully_sharded_fused_block_is_one_node",
    "check_the_older_fsdp_is_refused_where_fully_shard_is",
    "check_ranks_agree_on_a_mode_that_is_wrong_on_one",
]


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    failures = {}
    for name, check in list(globals().items()):
        if not name.startswith("check_") or (ranks > 2 and name in TWO_RANKS_SHOW_IT):
            continue
        started = time.process_time()
        try:
            check(folder / "run") if "folder" in check.__annotations__ else check()
        except Exception:
            failures[name] = traceback.format_exc()
            break
        if rank == 0:
            print(f"{time.process_time() - started:6.2f} CPU seconds: {name}", flush=True)
    (folder / f"failures-{rank}.json").write_text(json.dumps(failures))
    os._exit(0)  # past destructors of groups whose other ranks have gone


if __name__ == "__main__":
    main()
