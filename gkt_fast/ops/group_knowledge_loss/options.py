"""The options of `group_knowledge_loss`, the one place that knows them all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from . import checks

if TYPE_CHECKING:
    from ...config import GKTConfig

__all__ = ["SCHEMA", "LossOptions", "lists_options", "loss_options"]

Taker = TypeVar("Taker", bound=Callable[..., Any])


def _option(default: Any, check: checks.Check) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class LossOptions:
    """The options of `group_knowledge_loss`, checked.

    Args:
        groups: levels of nesting below the full network; 0: the loss is the full network's cross entropy.
        loops: chains of subnets, each from group 1 to `groups`.
        ema: weight of a group's old knowledge against a new subnet's logits, in [0, 1].
        temperature: T > 0.
        normalize_logits: distil between logits normalised over classes.
        eps: added to the variance when logits are normalised, > 0.
        ce_weight: weight of the full network's cross entropy. A term of weight 0 is left out of the loss.
        kd_weight: weight of the subnets' distillation terms.
        subnet_ce_weight: weight of the subnets' cross entropies.
        ignore_index: rows of this target count neither in a cross entropy nor in its mean.
        label_smoothing: as in torch's cross_entropy, in [0, 1].
        distill_ignored: whether rows of target `ignore_index` are distilled all the same.
        distillation: soft labels of "softmax", one distribution over the classes, or of "sigmoid", one Bernoulli
            distribution for each class. The kernels know the first; plain torch runs the second.

    Raises:
        TypeError: an option has the wrong type, or there is none of that name.
        ValueError: an option is out of range.
    """

    groups: int = _option(3, checks.integer(least=0))
    loops: int = _option(1, checks.integer(least=1))
    ema: float = _option(0.5, checks.fraction)
    temperature: float = _option(1.0, checks.positive)
    normalize_logits: bool = _option(False, checks.boolean)
    eps: float = _option(1e-7, checks.positive)
    ce_weight: float = _option(1.0, checks.weight)
    kd_weight: float = _option(1.0, checks.weight)
    subnet_ce_weight: float = _option(0.0, checks.weight)
    ignore_index: int = _option(-100, checks.integer())
    label_smoothing: float = _option(0.0, checks.fraction)
    distill_ignored: bool = _option(True, checks.boolean)
    distillation: str = _option("softmax", checks.one_of("softmax", "sigmoid"))

    def __post_init__(self) -> None:
        for name, check in _CHECKS:
            check(name, getattr(self, name))

    @classmethod
    def from_config(cls, config: GKTConfig) -> LossOptions:
        """The options that a configuration sets for the loss of one step: all but `eps`."""
        given = {name: getattr(config, name) for name in _NAMES if name != "eps"}
        return cls(**given | {"groups": config.step_groups})

    def flatten(self) -> tuple[Any, ...]:
        """The values in the order of `SCHEMA`: what a torch.library op can take."""
        return tuple([getattr(self, name) for name in _NAMES])

    @classmethod
    def unflatten(cls, values: tuple[Any, ...]) -> LossOptions:
        """The inverse of `flatten`."""
        return _unflattened(values)


_NAMES = tuple(option.name for option in fields(LossOptions))
_CHECKS = tuple((option.name, option.metadata["check"]) for option in fields(LossOptions))
SCHEMA = ", ".join(f"{option.type} {option.name}" for option in fields(LossOptions))
"""The options among the arguments of a torch.library op."""


def loss_options(options: LossOptions | None, **fields: int | float | bool | str) -> LossOptions:
    """`options`, or the defaults, with some fields replaced."""
    if options is None:
        if torch.compiler.is_compiling():
            return LossOptions(**fields)
        try:
            return _cached(**fields)
        except TypeError:  # also of a value without a hash; the constructor says what is wrong
            return LossOptions(**fields)
    if not isinstance(options, LossOptions):
        raise TypeError(f"options is {options!r}; it must be LossOptions")
    return replace(options, **fields) if fields else options


# Checking a dozen values again in every call would cost as much as the rest of the call.
_cached = functools.lru_cache(maxsize=256, typed=True)(LossOptions)  # typed: True is not the integer 1


@functools.lru_cache(maxsize=256)
def _unflattened(values: tuple[Any, ...]) -> LossOptions:
    return LossOptions(*values)


def lists_options(taker: Taker) -> Taker:
    """Lets `help()` and editors list the options of a function or class that takes them as `**fields`."""
    signature = inspect.signature(taker)
    *own, _ = signature.parameters.values()
    options = inspect.signature(LossOptions).parameters.values()
    keywords = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    taker.__signature__ = signature.replace(parameters=[*own, *keywords])
    return taker
