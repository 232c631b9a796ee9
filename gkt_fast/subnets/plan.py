"""Which activations (states) the streams of a step share, and what the step costs.

A state is the sequence of layers executed so far (and of the random numbers drawn by them, where each stream draws its
own). The plan is the tree of all states: its root is the input, each further node is one layer executed in the state
above it, and each stream is a path from the root to a leaf.

The first stream is the full network's. With a share below 1 the states that only subnets are in hold that part of a
batch's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Cost", "Layer", "Memory", "Plan", "make_plan"]


@dataclass(frozen=True)
class Layer:
    """A block, or a module between the blocks, in order of execution.

    Args:
        path: module path.
        is_block: whether subnets may drop it.
        flops: floating point operations of one sample's forward pass.
        saved_bytes: activations that autograd keeps of it for the backward pass, for one sample.
        draws_noise: whether every stream runs it by itself, with random numbers of its own.
        reads_back: an activation, in words, that it reads although a block lies between (or it is a block), beside the
            output of the layer before it; so too the model's own code right before it, or after the last layer.
        reads_back_gradient: whether gradients flow back there.
    """

    path: str
    is_block: bool
    flops: int
    saved_bytes: int = 0
    draws_noise: bool = False
    reads_back: str | None = None
    reads_back_gradient: bool = False


@dataclass(frozen=True)
class Cost:
    """Floating point operations of a forward pass through a step, for each sample of the batch.

    Args:
        plain: the full network alone.
        sequential: all streams one by one.
        shared: every state once.
    """

    plain: int
    sequential: int
    shared: int

    @property
    def sequential_ratio(self) -> float:
        """Cost one by one, in plain steps."""
        return self.sequential / self.plain

    @property
    def shared_ratio(self) -> float:
        """Cost of shared execution, in plain steps."""
        return self.shared / self.plain


@dataclass(frozen=True)
class Memory:
    """Bytes of activations kept for the backward pass, for each sample of the batch.

    Args:
        plain: the full network alone, and at any time of streams run one by one.
        shared: every state, all at once.
        lean: the most at any time when streams run depth-first: the states on one stream's path.
    """

    plain: int
    shared: int
    lean: int


@dataclass(frozen=True)
class Plan:
    """The states of a step.

    Args:
        layers: the network's layers in order of execution.
        parents: for every state the state above it, -1 for the root; parents come first.
        layer_of: for every state the index of the layer whose output it is, -1 for the root.
        paths: for every stream its states after the root, in order.
        share: part of a batch's rows that subnets see.
    """

    layers: tuple[Layer, ...]
    parents: tuple[int, ...]
    layer_of: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    share: float = 1.0

    def states_per_layer(self) -> tuple[int, ...]:
        """How often each layer runs."""
        counts = [0] * len(self.layers)
        for layer in self.layer_of[1:]:
            counts[layer] += 1
        return tuple(counts)

    def cost(self) -> Cost:
        """Plain, one by one and shared."""
        flops = [layer.flops for layer in self.layers]
        return Cost(
            plain=sum(flops),
            sequential=sum(self._of_rows(flops, path) for path in self.paths),
            shared=self._of_rows(flops, range(1, len(self.layer_of))),
        )

    def memory(self) -> Memory:
        """Plain, shared (and stacked), lean."""
        saved = [layer.saved_bytes for layer in self.layers]
        return Memory(
            plain=sum(saved),
            shared=self._of_rows(saved, range(1, len(self.layer_of))),
            lean=max(self._of_rows(saved, path) for path in self.paths),
        )

    def _of_rows(self, amounts: Sequence[int], states: Iterable[int]) -> int:
        """The sum of the layers' amounts over some states, counted by the rows that each holds."""
        full = set(self.paths[0])
        whole = cut = 0
        for state in states:
            amount = amounts[self.layer_of[state]]
            whole, cut = (whole + amount, cut) if state in full else (whole, cut + amount)
        return whole + (cut if self.share == 1 else round(self.share * cut))


def make_plan(layers: Sequence[Layer], dropped: Iterable[frozenset[str]], share: float = 1.0) -> Plan:
    """The plan of streams that each drop some blocks.

    Args:
        layers: the network's layers in order of execution.
        dropped: for every stream the paths of the blocks that it drops (`Subnet.dropped`), full network first.
        share: part of a batch's rows that subnets see.
    """
    parents, layer_of = [-1], [-1]
    children: dict[tuple[int, int, int], int] = {}
    paths = []
    for stream, absent in enumerate(dropped):
        state, path = 0, []
        for index, layer in enumerate(layers):
            if layer.path in absent:
                continue
            key = (state, index, stream if layer.draws_noise else -1)
            child = children.get(key)
            if child is None:
                child = children[key] = len(parents)
                parents.append(state)
                layer_of.append(index)
            state = child
            path.append(state)
        paths.append(tuple(path))
    return Plan(tuple(layers), tuple(parents), tuple(layer_of), tuple(paths), share)
