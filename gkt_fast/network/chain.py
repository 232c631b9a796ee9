"""Whether a network is a chain: every layer reads the output of the layer before it, and nothing older.

A feature pyramid or a decoder with skip connections is none: it reads the outputs of early blocks again after later
ones. Modes that hold more than one stream's activation at a time need to know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calls import logits_of
from .inputs import call_model, map_tensors
from .interception import Site, intercept

__all__ = ["older_reads"]


def older_reads(model: nn.Module, sites: Iterable[Site], inputs: tuple[Any, ...]) -> list[list[int]]:
    """For every layer that runs, which older activations than the last one it reads, or the code right before it.

    Found by cutting the autograd graph at every layer's output and walking back from the next one's arguments.
    Integer tensors aren't followed.

    Args:
        model: the network, run once as it is.
        sites: its blocks and the modules between them.
        inputs: as of `model_inputs`.

    Returns:
        One entry for each call of a layer, in order of execution, and one for the logits, oldest first: 0 for the
        model's input, i for the output of the i-th layer (from 1). Empty where only the layer before is read.
    """
    positions: dict[Tensor, int] = {}
    found: list[list[int]] = []

    def cut(values: Any) -> Any:
        def marked(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            leaf = tensor.detach().requires_grad_()
            positions[leaf] = len(found)
            return leaf.clone()  # what comes next may write into it

        return map_tensors(marked, values)

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        found.append(_older((args, kwargs), positions, len(found)))
        return cut(module(*args, **kwargs))

    # Compiled blocks would be compiled once more for this. Without them the compiler need not be imported.
    compiler = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
    with eager, torch.enable_grad(), intercept(model, sites, call):
        logits = logits_of(call_model(model, cut(inputs)))
    return [*found, _older(logits, positions, len(found))]


def _older(values: Any, positions: dict[Tensor, int], last: int) -> list[int]:
    """The marked activations that the values depend on, but for the last one."""
    waiting = [value.grad_fn for value in tree_leaves(values) if isinstance(value, Tensor)]
    seen = set()
    read = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            read.add(positions.get(leaf, last))
        waiting.extend(function for function, _ in node.next_functions)
    return sorted(read - {last})
