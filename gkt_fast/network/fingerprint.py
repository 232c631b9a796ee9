"""What may change how a model computes from one call to the next: classes, modes, flags and hooks of its modules."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable

import torch.nn.modules.module as torch_module
from torch import nn

__all__ = ["Watch"]

_COMPILED = "_compiled_call_impl"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """Reads a model's fingerprint without walking it again: where to look is noted once. The model isn't kept alive.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        modules = list(model.modules())
        self._modules = modules[1:]
        self._attributes = [module.__dict__ for module in modules]
        self._parents = [module._modules for module in modules if module._modules]
        self._children = self._children_now()
        flags = [
            (attributes, name)
            for attributes in self._attributes
            for name, value in attributes.items()
            if type(value) is bool
        ]
        self._flags = [attributes for attributes, _ in flags], [name for _, name in flags]
        self._hooks = [attributes[name] for attributes in self._attributes for name in _HOOKS]

    def _children_now(self) -> list[nn.Module | None]:
        return [child for children in self._parents for child in children.values()]

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model consists of the modules that were noted."""
        if model is not self._model():
            return False
        children = self._children_now()
        return len(children) == len(self._children) and all(map(operator.is_, children, self._children))

    def fingerprint(self) -> Hashable:
        """Equal as long as modules are of the same classes, in the same modes, with the same flags and hooks."""
        # Every fused block asks for this in every step: the interpreter's own loops are the shortest ones.
        return (
            type(self._model()),
            tuple(map(type, self._modules)),
            tuple(map(dict.get, *self._flags)),
            tuple([tuple(hooks) for hooks in filter(None, self._hooks)]),
            tuple(
                [
                    (id(own), id(own.get("forward")), bool(own.get(_COMPILED)))
                    for own in self._attributes
                    if "forward" in own or _COMPILED in own
                ]
            ),
            tuple(torch_module._global_forward_hooks) + tuple(torch_module._global_forward_pre_hooks),
        )
