"""What a model is called with: a tensor, several arguments, or a mapping; and what can be told of tensors within.

Everywhere below `GKT` a model's inputs are a tuple of its positional arguments. Keyword arguments, where there are any,
are its last entry, of the class `Keywords`; `call_model` takes them apart again.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .look import look

__all__ = [
    "Keywords",
    "call_model",
    "first_rows",
    "map_tensors",
    "model_inputs",
    "rows_in",
    "tensors_in",
]

logger = logging.getLogger("gkt_fast")

_WORDS_FOR_A_TUPLE = "pass (batch,) to hand it over as one argument"


class Keywords(dict):
    """The keyword arguments of a call, as the last entry of a model's inputs."""


def call_model(model: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """The model's result for inputs in the form of `model_inputs`."""
    if inputs and type(inputs[-1]) is Keywords:
        return model(*inputs[:-1], **inputs[-1])
    return model(*inputs)


def model_inputs(model: nn.Module, inputs: Any) -> tuple[Any, ...]:
    """The inputs of a model, in the one form that everything else takes (see the module's docstring).

    - A tuple or list holds the model's positional arguments. (A DataLoader makes lists of tuples.)
    - A mapping holds its keyword arguments, where the model's forward takes arguments of these names. Where it takes
      none of them, the mapping is its one argument; and where it fails on a mapping that holds a single tensor, that
      tensor is. Which of the last two is found by running one row, once for each model.
    - Anything else is the only argument. So is the mapping in `(mapping,)`.

    Raises:
        TypeError: forward takes some of a mapping's entries and not the others, or can't be called with it at all.
    """
    if isinstance(inputs, Mapping):
        return _mapping_as_inputs(model, inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _mapping_as_inputs(model: nn.Module, mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward that isn't Python's
        return (mapping,)
    taken = [parameter.name for parameter in signature.parameters.values() if parameter.kind in _NAMED]
    known = [key for key in mapping if key in taken]
    if all(isinstance(key, str) for key in mapping):
        try:
            signature.bind(**mapping)
        except TypeError as error:
            if known:
                raise TypeError(
                    f"inputs is a mapping with the keys {_listed(mapping)}; {type(model).__name__}.forward takes "
                    f"{_listed(taken)}: {error}. Leave out what it doesn't take, or {_WORDS_FOR_A_TUPLE}"
                ) from error
        else:
            return (Keywords(mapping),)
    return _whole_mapping_or_its_value(model, mapping)


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

_takes_mappings: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()
"""By model and keys of a mapping, whether the model takes the mapping as its one argument, or the mapping's value."""


def _whole_mapping_or_its_value(model: nn.Module, mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
    keys = tuple(mapping)
    known = _takes_mappings.setdefault(model, {})
    if keys not in known:
        known[keys] = _takes_mapping(model, mapping)
    return (mapping,) if known[keys] else tuple(mapping.values())


def _takes_mapping(model: nn.Module, mapping: Mapping[Any, Any]) -> bool:
    """Runs one row of the mapping, and where the model fails on it, of its only value.

    Raises:
        TypeError: it fails on both, or there are several values.
    """
    reason = _fails_on(model, mapping)
    if reason is None:
        return True
    values = tuple(mapping.values())
    if len(values) != 1 or _fails_on(model, values[0]) is not None:
        raise TypeError(
            f"inputs is a mapping with the keys {_listed(mapping)}, of which {type(model).__name__}.forward takes none "
            f"by name; called with the mapping as its one argument it fails: {type(reason).__name__}: {reason}"
        ) from reason
    logger.info(
        "inputs is a mapping with the single key %s, which %s.forward doesn't know; its value is the model's argument",
        _listed(mapping),
        type(model).__name__,
    )
    return False


def _fails_on(model: nn.Module, argument: Any) -> Exception | None:
    """What a model raises that doesn't take an argument of this kind; None: it does."""
    try:
        with look(model):
            model(first_rows(argument, 1))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        return error
    return None


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


def map_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    """The same nested tuples, lists and mappings with `function` applied to every tensor."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, MutableMapping):  # a class that torch's trees don't know
            changed = copy.copy(leaf)
            for key, value in leaf.items():
                changed[key] = tree_map(visit, value)
            return changed
        return leaf

    return tree_map(visit, values)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    found: list[Tensor] = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found.extend(tensors_in(list(leaf.values())))
    return found


def rows_in(values: Any) -> int | None:
    """The number of rows of a batch: the first dimension of its first tensor; None: it has no tensor with one."""
    return next((tensor.shape[0] for tensor in tensors_in(values) if tensor.dim()), None)


def first_rows(values: Any, count: int) -> Any:
    """The first rows of every tensor whose first dimension is the batch; the others as they are."""
    rows = rows_in(values)

    def head(tensor: Tensor) -> Tensor:
        return tensor[:count] if tensor.dim() and tensor.shape[0] == rows else tensor

    return map_tensors(head, values)
