"""Calls of a model's layers by someone else than the model: dropped blocks, shared inputs, what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "SharedStateError",
    "leaves_of",
    "logits_of",
    "run_on_shared_input",
    "skip_block",
    "untrained_outputs",
    "values_returned",
    "versions",
]


class SharedStateError(RuntimeError):
    """The model changes an activation in place that other streams read."""


def run_on_shared_input(
    writes_input: dict[str, bool], path: str, module: nn.Module, args: tuple, kwargs: dict
) -> Any:
    """Runs a layer whose input others read too: gives it a copy as long as it may write into its input.

    Args:
        writes_input: what is known of the layers by path; the first call adds to it.
        path: the layer's path.
        module: the layer.
        args: positional arguments of the call.
        kwargs: keyword arguments.

    Raises:
        SharedStateError: it wrote into its input although it did not in its first call.
    """
    writes = writes_input.get(path)
    if writes is not False:
        args, kwargs = _copy((args, kwargs))
    inputs = _versioned(leaves_of(args, kwargs))
    before = [tensor._version for tensor in inputs]
    output = module(*args, **kwargs)
    written = [tensor._version for tensor in inputs] != before
    if writes is None:
        writes_input[path] = written
    elif written and not writes:
        raise SharedStateError(
            f"block {path!r} wrote into its input in place, which it did not do in the first step; "
            "streams share that activation. Use execution='sequential'"
        )
    return output


def leaves_of(args: tuple, kwargs: dict) -> list[Any]:
    """Everything in nested arguments; mostly they are one tensor, for which that takes no walk."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return [args[0]]
    return tree_leaves((args, kwargs))


def versions(values: Any) -> list[int]:
    """How often each tensor in nested tuples, lists and dicts was written to."""
    return [tensor._version for tensor in _versioned(tree_leaves(values))]


def _versioned(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _copy(values: Any) -> Any:
    """Copies the tensors in nested tuples, lists and dicts; what was one tensor stays one tensor."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return tree_map_only(Tensor, copy, values)


def skip_block(path: str, returns: int, args: tuple, kwargs: dict) -> Any:
    """What a dropped block hands on: its input, in the form in which the block returns its output.

    Args:
        path: module path, for the message.
        returns: number of values that the block returns (see `values_returned`).
        args: positional arguments of the call; the first argument is the activation.
        kwargs: keyword arguments.

    Raises:
        ValueError: the block returns more values than a skip can stand for.
    """
    values = args or tuple(kwargs.values())[:1]
    if returns == 0 or isinstance(values[0], tuple):
        return values[0]
    if returns == 1:
        return (values[0],)
    if returns == len(args):
        return args
    raise ValueError(
        f"block {path!r} takes {len(args)} values and returns {returns}; a block that is dropped can only hand its "
        "inputs through, so it must return as many values as it takes, or one"
    )


def values_returned(output: Any) -> int:
    """How many values a block returned in a tuple; 0 for a bare value."""
    return len(output) if isinstance(output, tuple) else 0


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, `.logits`, or "logits" or "out" of a mapping.

    Raises:
        TypeError: none of them is there.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if isinstance(output.get(key), Tensor):
                return output[key]
    holds = ""
    if isinstance(output, (tuple, list)):
        holds = f". It holds {', '.join(type(value).__name__ for value in output) or 'nothing'}"
    elif isinstance(output, Mapping):
        holds = f". It has the keys {', '.join(map(repr, output)) or 'none'}"
    raise TypeError(
        f"model returned {type(output).__name__}; it must return a tensor of logits, an object with .logits, "
        f"or a dict with 'logits' or 'out'{holds}"
    )


def untrained_outputs(output: Any, logits: Tensor) -> list[str]:
    """Names of what a model returned beside its logits that has a gradient and is not on the way to the logits.

    Auxiliary heads and losses are; intermediate activations, which transformers returns at will, are not.

    Args:
        output: what the model returned.
        logits: those in it, with their graph.
    """
    if isinstance(output, Tensor) or logits.grad_fn is None:
        return []
    entries = _entries(output)
    candidates = {
        name: heads
        for name, value in entries.items()
        if (
            heads := [
                v.grad_fn for v in tree_leaves(value) if isinstance(v, Tensor) and v.grad_fn is not None
            ]
        )
    }
    if not candidates:
        return []
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(function for function, _ in node.next_functions)
    return [name for name, heads in candidates.items() if any(head not in seen for head in heads)]


def _entries(output: Any) -> dict[str, Any]:
    """What a model returned, by name."""
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if hasattr(output, "_asdict"):
        return output._asdict()
    return dict(getattr(output, "__dict__", {}))
