"""A training step written down plainly, to hold the package's execution modes against.

Nothing here comes from the package's own execution or loss: every stream is the model's own forward with the
dropped blocks replaced, the loss is written from its formulas, and one backward goes over the sum. With a share of the
batch for subnets a stream runs on all rows until it calls the first layer in which it differs; from there on every
module is given the first rows alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gkt_fast import GKTConfig, Stage
from gkt_fast.execution import EXECUTION_MODES, Choice, choose_execution
from gkt_fast.network.discovery import find_stages
from gkt_fast.network.network import Network
from gkt_fast.subnets.streams import Streams

MODES = tuple(EXECUTION_MODES)
ONE_BY_ONE = tuple(mode for mode in MODES if mode != "stacked")
"""Modes that run one state at a time, for models that can't be stacked (test_execution_modes.py)."""
TOLERANCES = {"stacked": 1e-11}
"""Relative; 1e-12 unless listed. Stacked BatchNorm sums in another order than torch's."""
POLICIES = ("full", "all_streams")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks here are tiny: threads that wait for each other would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Outcome:
    """What a step left behind."""

    loss: Tensor
    terms: Tensor
    logits: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    input_gradient: Tensor | None = None


class Skip(nn.Module):
    """Stands for a dropped block that takes one activation and returns it."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


def reference_step(
    model: nn.Module,
    inputs: tuple[Any, ...],
    targets: Tensor,
    dropped: Sequence[Iterable[str]],
    config: GKTConfig,
    grad_output: float = 1.0,
    skip: Callable[[], nn.Module] = Skip,
    noisy: Iterable[str] = (),
    loss_of: Callable[[Sequence[Tensor], Tensor, GKTConfig], tuple[Tensor, Tensor]] | None = None,
) -> Outcome:
    """One step over the streams; `dropped`: the block paths each one drops, the full network (none) first.

    `noisy`: paths of the layers that draw for each stream by itself; with a share subnets leave the full network there.
    """
    logits = []
    batch = len(tree_leaves(inputs)[0])
    rows = min(batch, max(2, math.ceil(config.subnet_share * batch)))
    for stream, paths in enumerate(dropped):
        counts = stream == 0 or config.batch_norm == "all_streams"
        leaving = [*paths, *noisy] if stream else []
        with (
            _without_blocks(model, paths, skip),
            _scratch_buffers(model, enabled=not counts),
            _on_first_rows(model, leaving, batch, rows),
        ):
            z = model(*inputs)
        logits.append(z[:rows] if stream else z)
    loss, terms = (loss_of or reference_loss)(logits, targets, config)
    if loss.requires_grad:
        (loss * grad_output).backward()
    return outcome_of(model, inputs, loss, terms, logits[0])


def package_step(
    mode: str,
    model: nn.Module,
    inputs: tuple[Any, ...],
    targets: Tensor,
    dropped: Sequence[Iterable[str]],
    config: GKTConfig,
    grad_output: float = 1.0,
    stages: list[Stage] | None = None,
) -> Outcome:
    """The same step by one of the package's execution modes."""
    network = Network(model, find_stages(model) if stages is None else stages)
    network.remember(inputs)
    streams = Streams(tuple(map(frozenset, dropped)), config)
    result = EXECUTION_MODES[mode](network, inputs, targets, streams, None)
    if result.loss.requires_grad:
        (result.loss * grad_output).backward()
    return outcome_of(model, inputs, result.loss, result.terms, result.logits)


def choice_of(
    execution: str, model: nn.Module, inputs: tuple[Any, ...], stages: list[Stage] | None = None
) -> Choice:
    """How the package would run the default configuration's streams, all of the full network."""
    network = Network(model, find_stages(model) if stages is None else stages)
    network.remember(inputs)
    config = GKTConfig(execution=execution)
    return choose_execution(network, Streams((frozenset(),) * config.streams, config))


def outcome_of(
    model: nn.Module, inputs: tuple[Any, ...], loss: Tensor, terms: Tensor, logits: Tensor
) -> Outcome:
    """Copies of everything that a step changes."""
    first = inputs[0]
    return Outcome(
        loss.detach().clone(),
        terms.detach().clone(),
        logits.detach().clone(),
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        first.grad.clone() if isinstance(first, Tensor) and first.is_leaf and first.requires_grad else None,
    )


def assert_same(actual: Outcome, expected: Outcome, tolerance: float = 1e-12, floor: float = 0.0) -> None:
    """Loss, terms, logits, every gradient and every buffer, each relative to its own norm.

    `floor` is for gradients and means that vanish but for rounding: what they may differ by all the same.
    """
    for name in ("loss", "terms", "logits", "input_gradient"):
        _assert_close(name, getattr(actual, name), getattr(expected, name), tolerance)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        _assert_close(f"gradient of {name}", actual.gradients[name], gradient, tolerance, floor)
    assert actual.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        _assert_close(f"buffer {name}", actual.buffers[name], buffer, tolerance, floor)


def assert_modes_agree(
    model: nn.Module,
    inputs: tuple[Any, ...],
    targets: Tensor,
    dropped: Sequence[Iterable[str]],
    config: GKTConfig,
    modes: Sequence[str] = MODES,
    floor: float = 0.0,
    **options: Any,
) -> Outcome:
    """Every mode against the plain loop, each on its own copy of the model; returns the loop's."""
    skip = options.pop("skip", Skip)
    stages = options.pop("stages", None)
    noisy = options.pop("noisy", ())
    expected = reference_step(
        copy.deepcopy(model), _fresh(inputs), targets, dropped, config, skip=skip, noisy=noisy, **options
    )
    for mode in modes:
        actual = package_step(
            mode, copy.deepcopy(model), _fresh(inputs), targets, dropped, config, stages=stages, **options
        )
        assert_same(actual, expected, TOLERANCES.get(mode, 1e-12), floor)
    return expected


def reference_loss(
    logits: Sequence[Tensor], targets: Tensor, config: GKTConfig, eps: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """The loss and the terms of the streams' logits, each (B, C, *spatial)."""
    logits = [_rows(z) for z in logits]
    targets = _rows(targets) if targets.is_floating_point() else targets.flatten()

    def normalized(z: Tensor) -> Tensor:
        if not config.normalize_logits:
            return z
        return (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, keepdim=True, unbiased=False) + eps)

    temperature, groups = config.temperature, config.step_groups
    knowledge = {0: normalized(logits[0]).detach()}
    terms = [reference_cross_entropy(logits[0], targets, config)]
    loss = config.ce_weight * terms[0]
    counts = torch.ones(len(logits[0]), dtype=torch.bool)
    if not config.distill_ignored and not targets.is_floating_point():
        counts = targets != config.ignore_index
    for stream, z in enumerate(logits[1:]):
        group = stream % groups + 1
        targets, counts = targets[: len(z)], counts[: len(z)]
        p = torch.softmax(knowledge[group - 1][: len(z)] / temperature, 1)
        q = torch.softmax(normalized(z) / temperature, 1)
        rows = (p * (p.log() - q.log())).sum(1)
        kd = temperature**2 * rows[counts].sum() / counts.sum()
        new = normalized(z).detach()
        old = knowledge.get(group)
        knowledge[group] = new if old is None else config.ema * old + (1 - config.ema) * new
        terms.append(kd)
        loss = loss + config.kd_weight * kd
        if config.subnet_ce_weight:
            loss = loss + config.subnet_ce_weight * reference_cross_entropy(z, targets, config)
    return loss, torch.stack(terms)


def _rows(z: Tensor) -> Tensor:
    """(rows, C): every position of a dense prediction is a row."""
    return z.movedim(1, -1).flatten(0, -2)


def reference_cross_entropy(z: Tensor, targets: Tensor, config: GKTConfig) -> Tensor:
    """Cross entropy of (B, C) logits, from its definition."""
    log_p = z - torch.logsumexp(z, 1, keepdim=True)
    classes, smoothing = z.shape[1], config.label_smoothing
    if targets.is_floating_point():
        return -((targets * (1 - smoothing) + smoothing / classes) * log_p).sum(1).mean()
    rows = targets != config.ignore_index
    log_p, targets = log_p[rows], targets[rows]
    right = log_p[torch.arange(len(targets)), targets]
    return -((1 - smoothing) * right + smoothing * log_p.mean(1)).sum() / rows.sum()


def block_calls(stages: Sequence[Stage], dropped: Sequence[Iterable[str]]) -> dict[str, int]:
    """How many states each block leads to: the distinct sequences of kept blocks that end with it."""
    order = [path for stage in stages for path in stage.blocks]
    states = set()
    for paths in dropped:
        kept = [path for path in order if path not in set(paths)]
        states.update(tuple(kept[: i + 1]) for i in range(len(kept)))
    return {path: sum(state[-1] == path for state in states) for path in order}


@contextmanager
def count_calls(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, int]]:
    """Counts by forward hooks how often the modules at `paths` run."""
    counts = dict.fromkeys(paths, 0)
    hooks = []

    def count(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[path] += 1

        return hook

    for path in counts:
        hooks.append(model.get_submodule(path).register_forward_hook(count(path)))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def droppable_blocks(stages: Sequence[Stage]) -> list[str]:
    """Paths of the blocks that can be dropped, in order."""
    return [
        path
        for stage in stages
        for path, droppable in zip(stage.blocks, stage.droppable, strict=True)
        if droppable
    ]


def random_drops(stages: Sequence[Stage], streams: int, seed: int, rate: float = 0.4) -> list[frozenset[str]]:
    """Arbitrary subsets of the droppable blocks, neither ordered nor nested; the full network first."""
    generator = torch.Generator().manual_seed(seed)
    blocks = droppable_blocks(stages)
    drawn = torch.rand(streams - 1, len(blocks), generator=generator) < rate
    masks = [frozenset(b for b, drop in zip(blocks, row, strict=True) if drop) for row in drawn.tolist()]
    return [frozenset(), *masks]


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in inputs
    )


def _assert_close(
    name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float, floor: float = 0.0
) -> None:
    assert (actual is None) == (expected is None), f"{name}: {actual} against {expected}"
    if expected is None:
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: {actual} against {expected}"
        return
    difference = (actual - expected).norm().item()
    assert difference <= tolerance * expected.norm().item() + floor, f"{name}: differs by {difference:g}"


@contextmanager
def _without_blocks(model: nn.Module, paths: Iterable[str], skip: Callable[[], nn.Module]) -> Iterator[None]:
    blocks = {path: model.get_submodule(path) for path in paths}
    for path in blocks:
        model.set_submodule(path, skip())
    try:
        yield
    finally:
        for path, block in blocks.items():
            model.set_submodule(path, block)


@contextmanager
def _on_first_rows(model: nn.Module, leaving: Iterable[str], batch: int, rows: int) -> Iterator[None]:
    """From the call of one of the layers at `leaving` on, modules get the first rows of what has `batch` of them."""
    left = False
    stops = {id(model.get_submodule(path)) for path in leaving}

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal left
        left = left or id(module) in stops
        if not left:
            return args, kwargs
        return tree_map_only(Tensor, lambda t: t[:rows] if t.dim() and len(t) == batch else t, (args, kwargs))

    modules = [module for module in model.modules() if module is not model] if stops and rows < batch else []
    hooks = [module.register_forward_pre_hook(cut, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _scratch_buffers(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Lets the model's buffers be written to without consequence."""
    originals = [(m, dict(m._buffers)) for m in model.modules()] if enabled else []
    for module, buffers in originals:
        for name, buffer in buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in originals:
            module._buffers.update(buffers)
