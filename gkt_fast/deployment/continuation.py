"""Runs depths of an elastic network one after another, each going on from what it shares with the one before.

A depth's own forward runs, on light copies of the modules that hold its blocks, with every layer's place taken by a
stand-in. Where the layer's state is known already, the stand-in gives the activation that was kept (of a network in
which no layer reads past the one before it, that is the last shared one; in place of the others stands memory that
nobody reads). What the model's own code computes between its layers is computed again.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..network.calls import logits_of, versions
from ..network.interception import Site, StandIn, find_sites
from ..network.profile import count_layers, one_sample
from ..subnets.plan import Plan, make_plan
from ..subnets.subnet import Stage, Subnet
from .elastic import ElasticNetwork

__all__ = ["Continuation", "Run", "take_rows"]


@dataclass(frozen=True)
class Form:
    """What a stand-in gives where nobody reads it: memory like this activation's."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, rows: int, value: float | None) -> Tensor:
        empty = torch.empty_strided(
            (rows, *self.shape[1:]), self.stride, dtype=self.dtype, device=self.device
        )
        return empty if value is None else empty.fill_(value)


@dataclass
class Kept:
    """A layer's output.

    Args:
        leaves: its tensors and other values, or a `Form`.
        structure: of the tuples and dicts around them.
        batched: for every leaf whether its first dimension is the batch.
    """

    leaves: list[Any]
    structure: TreeSpec
    batched: list[bool]

    def take(self, rows: Tensor) -> Kept:
        leaves = [
            take_rows(leaf, rows) if batched and isinstance(leaf, Tensor) else leaf
            for leaf, batched in zip(self.leaves, self.batched, strict=True)
        ]
        return Kept(leaves, self.structure, self.batched)


class Run:
    """One batch on its way through the depths. Not shared between threads.

    Args:
        inputs: of the network; the first tensor's first dimension is the batch, and tensors as long as it are batched.
        unread: what memory that nobody should read is filled with; None: whatever is there.
    """

    def __init__(self, inputs: tuple[Any, ...], unread: float | None = None) -> None:
        self.inputs = inputs
        self.rows = _rows(inputs)
        self.unread = unread
        self.kept: dict[int, Kept] = {}
        self.versions: dict[int, list[int]] | None = None
        self.lengths: dict[int, list[int | None]] | None = None
        self.step = -1
        self.calls = 0

    def keep_rows(self, rows: Tensor) -> None:
        """Goes on with some of the rows only.

        Args:
            rows: (b,) int64, which of the present ones.
        """
        self.inputs = tuple(
            take_rows(value, rows)
            if isinstance(value, Tensor) and value.dim() and len(value) == self.rows
            else value
            for value in self.inputs
        )
        self.kept = {state: value.take(rows) for state, value in self.kept.items()}
        self.rows = len(rows)


def take_rows(value: Tensor, rows: Tensor) -> Tensor:
    """Some rows (first dimension), in the memory format that the tensor has."""
    if (
        value.dim() == 4
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=torch.channels_last)
    ):
        return value.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return value.index_select(0, rows)


class Continuation:
    """Prepared for an order of depths.

    Args:
        elastic: the network, in evaluation mode.
        order: subnets of it, each within the next.
        inputs: an example of its input; its first rows are used to check that going on gives what each depth gives.

    Raises:
        ValueError: the network's layers don't run row by row or in a fixed order, so that it can't go on.
    """

    def __init__(self, elastic: ElasticNetwork, order: Sequence[Subnet], inputs: tuple[Any, ...]) -> None:
        self.order = tuple(order)
        deepest = order[-1]
        names = elastic.names(deepest)
        absent = deepest.dropped(elastic.stages)
        at = {old: new for new, old in names.items()}
        blocks = [tuple(at[b] for b in stage.blocks if b not in absent) for stage in elastic.stages]
        stages = [Stage(paths, (True,) * len(paths)) for paths in blocks if paths]
        sites = find_sites(elastic.at(deepest), stages)
        layers = count_layers(
            _own_containers(elastic.at(deepest), [site.path for site in sites]), sites, one_sample(inputs)
        )
        dropped = [frozenset(at[path] for path in s.dropped(elastic.stages) - absent) for s in order]
        self.plan = make_plan(layers, dropped)
        self.shared = _shared_lengths(self.plan)
        reads_on = any(layer.reads_back is not None for layer in layers)
        self._read = [
            set(path[:shared] if reads_on else path[:shared][-1:])
            for path, shared in zip(self.plan.paths, self.shared, strict=True)
        ]
        self._known = [set(path[:shared]) for path, shared in zip(self.plan.paths, self.shared, strict=True)]
        self._batched: dict[int, list[bool]] = {}
        self._copied: set[int] = set()
        self._local = threading.local()
        self._networks = [self._with_stand_ins(elastic, subnet, sites, names) for subnet in order]
        with torch.inference_mode(False), torch.no_grad():
            self._look(inputs)
            self._check(elastic, inputs)

    def _with_stand_ins(
        self, elastic: ElasticNetwork, subnet: Subnet, sites: Sequence[Site], names: dict[str, str]
    ) -> nn.Module:
        """A depth's network, all of whose layers go through `_call`."""
        here = {old: new for new, old in elastic.names(subnet).items()}
        own = {here[names[s.path]]: s for s in sites if names[s.path] in here}
        network = _own_containers(elastic.at(subnet), own)
        for path, site in own.items():
            parent, _, name = path.rpartition(".")
            modules = network.get_submodule(parent)._modules
            modules[name] = StandIn(site, modules[name], self._call)  # type: ignore[assignment]
        return network

    def flops(self) -> list[int]:
        """Floating point operations that each depth adds to those before it, for one row."""
        layers = self.plan.layers
        return [
            sum(layers[self.plan.layer_of[state]].flops for state in path[shared:])
            for path, shared in zip(self.plan.paths, self.shared, strict=True)
        ]

    def advance(self, run: Run) -> Tensor:
        """The logits (b, C) of the next depth, of the run's rows.

        Raises:
            ValueError: the model called its layers in another order than when it was looked at.
        """
        run.step += 1
        run.calls = 0
        self._local.run = run
        try:
            logits = logits_of(self._networks[run.step](*run.inputs))
        finally:
            self._local.run = None
        if run.versions is not None:
            self._note_writes(run)
        later = set().union(*self._known[run.step + 1 :])
        run.kept = {state: value for state, value in run.kept.items() if state in later}
        return logits

    def _call(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        run: Run = self._local.run
        path = self.plan.paths[run.step]
        state = path[run.calls] if run.calls < len(path) else None
        if state is None or self.plan.layers[self.plan.layer_of[state]].path != site.path:
            raise ValueError(
                f"the model called its layer {site.path!r} where it did not when it was looked at: the order of its "
                "layers depends on its data, so that a cascade can't go on from a smaller depth"
            )
        run.calls += 1
        if run.calls <= self.shared[run.step]:
            return self._recall(run, state)
        output = module(*args, **kwargs)
        reading = [step for step in range(run.step + 1, len(self.order)) if state in self._known[step]]
        if reading:
            self._keep(run, state, output, any(state in self._read[step] for step in reading))
        return output

    def _keep(self, run: Run, state: int, output: Any, whole: bool) -> None:
        leaves, structure = tree_flatten(output)
        if run.lengths is not None:
            run.lengths[state] = [len(v) if isinstance(v, Tensor) and v.dim() else None for v in leaves]
        batched = self._batched.get(state, [False] * len(leaves))
        for i, leaf in enumerate(leaves):
            if not whole and batched[i] and leaf.is_floating_point():
                leaves[i] = Form(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
            elif isinstance(leaf, Tensor) and state in self._copied:
                leaves[i] = leaf.clone()
        run.kept[state] = Kept(leaves, structure, batched)
        if run.versions is not None:
            run.versions[state] = versions(leaves)

    def _recall(self, run: Run, state: int) -> Any:
        kept = run.kept[state]
        leaves = list(kept.leaves)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Form):
                leaves[i] = leaf.make(run.rows, run.unread)
            elif isinstance(leaf, Tensor) and state in self._copied:
                leaves[i] = leaf.clone()
        if run.versions is not None:
            run.versions[state] = versions(kept.leaves)
        return tree_unflatten(leaves, kept.structure)

    def _note_writes(self, run: Run) -> None:
        """A layer that writes into its input writes into what others read: such states are copied from now on."""
        for state, value in run.kept.items():
            if run.versions.get(state, versions(value.leaves)) != versions(value.leaves):  # type: ignore[union-attr]
                self._copied.add(state)

    def _look(self, inputs: tuple[Any, ...]) -> None:
        """Finds out which activations are written into, and which tensors grow with the batch."""
        lengths = []
        for size in (2, 3):
            run = Run(_rows_like(inputs, size))
            run.versions, run.lengths = {}, {}
            for _ in self.order:
                self.advance(run)
            lengths.append(run.lengths)
        for state, (two, three) in {s: (lengths[0][s], lengths[1][s]) for s in lengths[0]}.items():
            self._batched[state] = [(a, b) == (2, 3) for a, b in zip(two, three, strict=True)]
            if any(a != b and (a, b) != (2, 3) for a, b in zip(two, three, strict=True)):
                layer = self.plan.layers[self.plan.layer_of[state]].path
                raise ValueError(
                    f"layer {layer!r} returns a tensor whose first dimension is neither the batch nor fixed "
                    f"({two} for 2 rows, {three} for 3): a cascade can't tell which rows leave"
                )

    def _check(self, elastic: ElasticNetwork, inputs: tuple[Any, ...]) -> None:
        """Holds two of three rows at each depth, gone on to from all three, against the depth's own of all three."""
        whole = _rows_like(inputs, 3)
        run = Run(whole, unread=float("nan"))
        for step, subnet in enumerate(self.order):
            expected = logits_of(elastic.at(subnet)(*whole))
            logits = self.advance(run)
            present = torch.tensor([0, 2] if step else [0, 1, 2], device=logits.device)
            allowed = 10 * torch.finfo(logits.dtype).eps ** 0.5 * expected.abs().max().clamp(min=1e-6)
            if not ((logits - expected[present]).abs() <= allowed).all():
                raise ValueError(
                    f"going on to depths {subnet} from a smaller depth gives other logits than these depths alone: the "
                    "model's code between its layers reads activations that a cascade doesn't keep, or its rows aren't "
                    "independent of each other"
                )
            if step == 0:
                run.keep_rows(torch.tensor([0, 2], device=logits.device))


def _shared_lengths(plan: Plan) -> list[int]:
    """For every stream the number of states that the stream before it has too."""
    lengths = [0]
    for before, path in itertools.pairwise(plan.paths):
        lengths.append(
            sum(
                1
                for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, path, strict=False))
            )
        )
    return lengths


def _own_containers(network: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A copy of the modules around those at the paths; these, and all tensors, stay the same objects."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    for path in paths:
        module = network.get_submodule(path)
        memo[id(module)] = module
    return copy.deepcopy(network, memo)


def _rows(inputs: tuple[Any, ...]) -> int:
    return len(next(value for value in inputs if isinstance(value, Tensor)))


def _rows_like(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """A batch of that size made of the first rows of another, repeated where they are too few."""
    rows = _rows(inputs)
    if not rows:
        raise ValueError("the batch has no rows")

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != rows:
            return value
        return take_rows(value, torch.arange(size, device=value.device) % rows)

    return tuple(map(resized, inputs))
