"""The hyper-parameters of Group Knowledge based Training. No torch here."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "BATCH_NORM_POLICIES",
    "CHAINS",
    "DISTILLATIONS",
    "EXECUTIONS",
    "KNOWLEDGE",
    "GKTConfig",
    "current_policy",
]

EXECUTIONS = (
    "auto",
    "sequential",
    "shared",
    "stacked",
    "lean",
)
"""What `execution` may be: "auto", or a file of that name in gkt_fast/execution."""

DISTILLATIONS = ("softmax", "sigmoid")
CHAINS = ("step", "steps")
KNOWLEDGE = ("batch", "dataset")
BATCH_NORM_POLICIES = ("full", "all_streams")
"""What `batch_norm` may be."""

_OLD_POLICY, _NEW_POLICY = "sequential", "all_streams"
"""What the policy was called in 0.1, and is called now."""


@dataclass(frozen=True)
class GKTConfig:
    """How a network is trained together with its subnets.

    The paper's coefficients are not public: defaults marked *reconstructed* are ours.

    Args:
        groups: number of nested levels below the full network, G >= 0. 0 is plain training.
        loops: number of chains full -> group 1 -> ... -> group G in a step, L >= 1 (reconstructed).
        chain: `step`: a step runs whole chains. `steps`: a step runs the full network and one subnet, and G steps walk
            down one chain; needs loops=1.
        knowledge: `batch`: a group knows its logits of this step. `dataset`: what it knows of every training sample
            outlives the step (`GroupKnowledgeMemory`); samples need indices, and groups >= 2. A sample that the group
            above has not seen yet is taught by the full network.
        decay: beta in (0, 1] of the sampler `inherit_decay`: each block fewer than the parent's multiplies the
            probability by beta (reconstructed).
        min_depth: fewest blocks an ordered subnet keeps in a stage; one number, or one per stage.
        ema: weight of a group's earlier knowledge when a further loop visits it, or with knowledge="dataset" a
            further loop or step, in [0, 1] (reconstructed).
        temperature: of the soft labels, > 0.
        normalize_logits: distil standardised logits (each sample's logits with zero mean, unit variance).
        ce_weight: weight of the full network's cross entropy.
        kd_weight: weight of the sum of the subnets' distillation terms (reconstructed).
        subnet_ce_weight: weight of the subnets' own cross entropy.
        sampler: `inherit_decay`, `uniform`, `stochastic_depth` or `fixed` (gkt_fast.subnets.sampling).
        train_full: whether a step trains the full network, whose knowledge its subnets learn. False: a step runs its
            subnet alone, on the targets, as stochastic depth does; needs groups=1 and loops=1.
        subnet_resolution: height and width that a subnet's images are resized to; (lowest, highest): drawn anew for
            every subnet. Nothing can be shared then: streams run one by one. None: as the full network's.
        subnet_share: part of a batch's rows that subnets see, in (0, 1]; the full network sees all B. Of them subnets
            see the first min(B, max(2, ceil(subnet_share * B))); what they have in common with the full network is
            computed on all. Below 1 batches that are accumulated into one step are no longer one big batch, of which
            subnets would see other rows. (The paper's subnets see all.)
        drop_rate: drop probability of the last block for the sampler `stochastic_depth`, in [0, 1).
        subnets: for the sampler `fixed`: groups (or loops * groups) depths, each with one number per stage.
        budget: most that a shared step may cost on average, in plain steps (counted in FLOPs); the smallest depths are
            raised as far as needed (gkt_fast.subnets.budget). None: no limit.
        batch_norm: whose batches update running statistics. `full`: the full network's alone. `all_streams`: every
            stream's, in order.
        execution: `sequential` runs the streams one by one; `shared` every distinct activation once; `stacked` too,
            with the states that run the same layer as one batch; `lean` too, at nearly the memory of one network;
            `auto` chooses (gkt_fast.execution.choice).
        independent_noise: whether every stream draws its own dropout and stochastic depth, as streams run one by one
            do. States are then shared only up to the first layer that draws random numbers. False: streams that
            share a state share its noise.
        fuse_blocks: whether the model's residual blocks run as fused kernels where they can
            (`gkt_fast.fuse_blocks`): the same numbers up to rounding. Plain training (groups=0) is never fused.
        distillation: soft labels of `softmax`, one distribution over the classes, or of `sigmoid`, one Bernoulli
            distribution for each class, for targets that are several labels.
        label_smoothing: of the cross entropy, in [0, 1].
        ignore_index: class index that marks rows without a label.
        distill_ignored: whether rows without a label are distilled.
        seed: of the sampler; the same seed and step give the same subnets in every process.

    Raises:
        ValueError: a value is out of its range; the message names it.
        TypeError: a value is of the wrong type.
    """

    groups: int = 3
    loops: int = 1
    decay: float = 0.5
    min_depth: int | tuple[int, ...] = 1
    ema: float = 0.5
    temperature: float = 1.0
    normalize_logits: bool = False
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    subnet_ce_weight: float = 0.0
    sampler: str = "inherit_decay"
    train_full: bool = True
    subnet_resolution: int | tuple[int, int] | None = None
    subnet_share: float = 1.0
    drop_rate: float = 0.5
    subnets: tuple[tuple[int, ...], ...] | None = None
    budget: float | None = None
    batch_norm: str = "full"
    execution: str = "auto"
    independent_noise: bool = False
    fuse_blocks: bool = True
    distillation: str = "softmax"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    distill_ignored: bool = True
    seed: int = 0
    chain: str = "step"
    knowledge: str = "batch"

    def __post_init__(self) -> None:
        for name, least in (("groups", 0), ("loops", 1), ("ignore_index", None), ("seed", None)):
            _check_integer(name, getattr(self, name), least)
        _check_number("decay", self.decay, 0.0, 1.0, open_low=True)
        _check_number("ema", self.ema, 0.0, 1.0)
        _check_number("temperature", self.temperature, 0.0, math.inf, open_low=True)
        _check_number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        _check_number("drop_rate", self.drop_rate, 0.0, 1.0, open_high=True)
        _check_number("subnet_share", self.subnet_share, 0.0, 1.0, open_low=True)
        if self.budget is not None:
            _check_number("budget", self.budget, 1.0, math.inf)
        for name in ("ce_weight", "kd_weight", "subnet_ce_weight"):
            _check_number(name, getattr(self, name), 0.0, math.inf)
        for name in ("normalize_logits", "train_full", "distill_ignored", "fuse_blocks", "independent_noise"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if not isinstance(self.sampler, str):
            raise TypeError(f"sampler is {self.sampler!r}; it must be a string")
        object.__setattr__(self, "batch_norm", current_policy(self.batch_norm, stacklevel=4))
        _check_choice("batch_norm", self.batch_norm, BATCH_NORM_POLICIES)
        _check_choice("execution", self.execution, EXECUTIONS)
        _check_choice("distillation", self.distillation, DISTILLATIONS)
        _check_choice("chain", self.chain, CHAINS)
        _check_choice("knowledge", self.knowledge, KNOWLEDGE)
        object.__setattr__(self, "min_depth", _depths("min_depth", self.min_depth))
        self._check_chain()
        self._check_subnets()
        self._check_subnet_alone()
        self._check_subnet_resolution()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Takes pickles of 0.1 as well: fields that they lack have their defaults."""
        vars(self).update(state)
        if self.batch_norm == _OLD_POLICY:
            vars(self)["batch_norm"] = _NEW_POLICY

    def _check_chain(self) -> None:
        if self.chain == "steps" and self.loops != 1:
            raise ValueError(
                f"loops is {self.loops} with chain='steps', where a step runs one subnet of the chain; it must be 1"
            )
        if self.knowledge == "dataset" and self.groups < 2:
            raise ValueError(
                f"groups is {self.groups} with knowledge='dataset', which keeps what group 1 and the further ones but "
                "the last know; it must be at least 2"
            )

    def _check_subnet_alone(self) -> None:
        if self.train_full:
            return
        for name in ("groups", "loops"):
            if getattr(self, name) != 1:
                raise ValueError(f"{name} is {getattr(self, name)} with train_full=False; it must be 1")
        if self.budget is not None or self.subnet_resolution is not None:
            raise ValueError(
                f"budget is {self.budget} and subnet_resolution is {self.subnet_resolution}; "
                "with train_full=False they must be None"
            )
        if self.subnet_share != 1:
            raise ValueError(
                f"subnet_share is {self.subnet_share} with train_full=False, where a step trains its subnet alone; "
                "it must be 1"
            )

    def _check_subnet_resolution(self) -> None:
        value = self.subnet_resolution
        if value is None:
            return
        if _is_sequence(value):
            if len(value) != 2:
                raise ValueError(f"subnet_resolution is {value!r}; it must be a number or (lowest, highest)")
            object.__setattr__(self, "subnet_resolution", tuple(value))
        low, high = value if _is_sequence(value) else (value, value)
        for number in (low, high):
            _check_integer("subnet_resolution", number, 1)
        if low > high:
            raise ValueError(f"subnet_resolution is {value!r}; its lowest must be at most its highest")
        if self.execution not in ("auto", "sequential"):
            raise ValueError(
                f"execution is {self.execution!r}; with subnet_resolution, where streams share nothing, "
                "it must be 'auto' or 'sequential'"
            )
        if self.budget is not None:
            raise ValueError(f"budget is {self.budget}; with subnet_resolution it must be None")

    def _check_subnets(self) -> None:
        if (self.sampler == "fixed") != (self.subnets is not None):
            raise ValueError(
                f"subnets is {self.subnets!r} and sampler is {self.sampler!r}; "
                "the sampler 'fixed' needs subnets, and no other takes them"
            )
        if self.subnets is None:
            return
        if not _is_sequence(self.subnets) or not all(map(_is_sequence, self.subnets)):
            raise TypeError(
                f"subnets is {self.subnets!r}; it must be a sequence of depths, one number per stage each"
            )
        subnets = tuple(_depths("subnets", tuple(depths)) for depths in self.subnets)
        if len(subnets) not in (self.groups, self.groups * self.loops):
            raise ValueError(
                f"subnets has {len(subnets)} entries; it must have groups ({self.groups}) "
                f"or loops * groups ({self.loops * self.groups})"
            )
        object.__setattr__(self, "subnets", subnets)

    @property
    def step_groups(self) -> int:
        """Groups that each loop of one step visits: all, or one with chain="steps"."""
        return min(self.groups, 1) if self.chain == "steps" else self.groups

    @property
    def streams(self) -> int:
        """S = 1 + loops * groups, with chain="steps" 2; 1 where there are no subnets, or nothing else."""
        return 1 + self.loops * self.step_groups if self.train_full else 1

    def subnet_rows(self, batch: int) -> int:
        """How many rows of a batch subnets see: min(B, max(2, ceil(subnet_share * B)))."""
        exact = round(self.subnet_share * batch, 6)  # 0.07 * 100 is 7.000000000000001
        return min(batch, max(2, math.ceil(exact)))

    def replace(self, **changes: Any) -> GKTConfig:
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to a YAML file."""
        values = dataclasses.asdict(self)
        return {key: _lists(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GKTConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise ValueError(f"unknown keys {unknown}; known are {sorted(known)}")
        return cls(**{key: _tuples(value) for key, value in values.items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> GKTConfig:
        """Reads a file whose keys are the names above.

        Raises:
            ValueError: the file is not a mapping, or a key is unknown.
        """
        import yaml

        values = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(values, Mapping):
            raise ValueError(f"{path} holds {type(values).__name__}; it must be a mapping of names to values")
        return cls.from_dict(values)


def current_policy(name: str, stacklevel: int = 2) -> str:
    """Today's name of a BatchNorm policy; warns where it is that of 0.1."""
    if name != _OLD_POLICY:
        return name
    message = (
        f"batch_norm={_OLD_POLICY!r} is called batch_norm={_NEW_POLICY!r} now; the old name will be removed"
    )
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
    return _NEW_POLICY


def _check_integer(name: str, value: object, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def _check_number(
    name: str, value: object, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    above = value > low if open_low else value >= low
    below = value < high if open_high or high == math.inf else value <= high
    if not (above and below):
        bracket_low = "(" if open_low else "["
        bracket_high = ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name} is {value}; it must be in {bracket_low}{low:g}, {high:g}{bracket_high}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _depths(name: str, value: object) -> int | tuple[int, ...]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    for entry in values:
        _check_integer(name, entry, 0)
    return tuple(values) if isinstance(value, (tuple, list)) else value  # type: ignore[return-value]


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, (list, tuple)) else value
