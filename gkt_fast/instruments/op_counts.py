"""Counts what the ops of a piece of code do: bytes, FLOPs and kernel launches, by a dispatch mode, op by op.

An op reads each of its inputs and writes each of its outputs once, in main memory; nothing stays in a cache between two
ops. Ops that must go over an input twice, because a sum over all of it comes first, read it twice. Views and
allocations cost nothing. FLOPs are those of torch's own counter: convolutions, matrix products and attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gkt_fast.ops import LossOptions

from .merges import LOADED_TOGETHER, chunk_counts, chunk_trips

__all__ = ["OpCost", "OpCounter", "fake_in_place"]

NO_KERNEL = {
    "prim::device",
    "aten::_unsafe_view",
    "aten::as_strided_",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::lift_fresh",
    "aten::set_",
}
"""Ops that touch no element, beside those that torch itself calls views."""

WRITE_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_"}
"""Ops that don't read their first argument."""

TWO_PASSES = {
    "aten::native_batch_norm": (0,),
    "aten::native_batch_norm_backward": (0, 1),
    "gkt_fast::ghost_batch_norm": (0,),
    "gkt_fast::ghost_batch_norm_tracking": (0,),
    "gkt_fast::ghost_batch_norm_backward": (0, 1, 4),
}
"""Arguments that are read twice in training: sums over all of a channel come first."""

LAUNCHES = {
    "gkt_fast::ghost_batch_norm": 3,  # kernels/cuda/ghost_batch_norm.cu: sums, merge, map; both ways
    "gkt_fast::ghost_batch_norm_tracking": 3,
    "gkt_fast::ghost_batch_norm_backward": 3,
}
"""Kernels of an op; 1 unless listed, convolution_backward one for each gradient."""


HELD_CLASSES = 1024
"""group_knowledge_loss holds rows of so many classes in shared memory or registers."""


class OpCost(NamedTuple):
    """One call of an op.

    Args:
        name: "namespace::name".
        bytes: read and written in main memory.
        flops: floating point operations, a multiply-add is two.
        launches: kernels.
        dtype: of the first floating point input or output; None where there is none.
        waits: loads from memory that its slowest thread makes one after the other, where few threads do so.
    """

    name: str
    bytes: int
    flops: int
    launches: int
    dtype: torch.dtype | None
    waits: int = 0


class OpCounter(TorchDispatchMode):
    """Records every op that runs inside the block, backward passes included, in `ops`.

    Attributes:
        ops: what ran.
        recomputing: whether norms run now whose activations backward computes again, which is counted with them: a node
            over a whole residual block, where that happens, runs below what a mode sees, and layer by layer under one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[OpCost] = []
        self.recomputing = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if not (name in NO_KERNEL or getattr(func, "is_view", False)):
            self.ops.append(_cost(func, name, args, kwargs, out))
        if self.recomputing and _is_recomputed(name, args):
            self.ops.append(_recomputation(args, out))
        return out


def fake_in_place(model: nn.Module, mode: FakeTensorMode) -> None:
    """Makes fake tensors of a model's parameters and buffers: same shapes and strides, no elements."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor)


def _cost(func: Any, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> OpCost:
    inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    outputs = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
    read = inputs[1:] if name in WRITE_ONLY else inputs
    moved = sum(_size(tensor) for tensor in _distinct(read))
    moved += sum(_size(tensor) for tensor in _distinct(outputs))
    moved += sum(_size(args[i]) for i in TWO_PASSES.get(name, ()) if _trains(name, args))
    launches = LAUNCHES.get(name, 1)
    if name == "gkt_fast::group_knowledge_loss":
        launches = 2 if args[1].is_floating_point() else 3  # kernels/cuda/group_knowledge_loss.cu
        moved += _reads_of_long_rows(args)
    if name == "aten::convolution_backward":
        launches = sum(args[-1])
        moved += (launches - 1) * _size(args[0])  # each of the kernels reads the gradient
    floating = (value.dtype for value in (*inputs, *outputs) if value.is_floating_point())
    flops = _flops(func, name, args, kwargs, out)
    return OpCost(name, moved, flops, launches, next(floating, None), _waits(name, args))


def _is_recomputed(name: str, args: tuple) -> bool:
    """Whether a norm gives what a convolution reads: with ReLU, and nothing added."""
    if name not in ("gkt_fast::ghost_batch_norm", "gkt_fast::ghost_batch_norm_tracking"):
        return False
    return args[3] is None and args[8]


def _recomputation(args: tuple, out: Any) -> OpCost:
    """A norm once more, from the statistics that it found: one pass over its input."""
    x, weight, bias = args[:3]
    moved = sum(_size(tensor) for tensor in (x, weight, bias, *out) if tensor is not None)
    return OpCost("gkt_fast::ghost_batch_norm", moved, 0, 1, x.dtype)


def _reads_of_long_rows(args: tuple) -> int:
    """Bytes that group_knowledge_loss reads beyond each logit once, where a row is too long to be held on the chip.

    A second pass over every stream (three more where logits are normalised), and the teacher's logits in each pass that
    compares: a stream's own teacher is the one before.
    """
    logits, full = args[0], args[2]
    if logits.shape[2] <= HELD_CLASSES:
        return 0
    normalized = args[3 + list(_loss_options()).index("normalize_logits")]
    own, compared = (3, 2) if normalized else (1, 1)
    stream = _size(logits) // max(logits.shape[0], 1)
    taught = logits.shape[0] if full is not None else logits.shape[0] - 1
    return own * (_size(logits) + (0 if full is None else _size(full))) + compared * taught * stream


def _loss_options() -> tuple[str, ...]:
    return tuple(option.name for option in dataclasses.fields(LossOptions))


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that are there: those of an expanded dimension once."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return (
        math.prod(size for size, stride in dims if stride != 0) * tensor.element_size() * (tensor.numel() > 0)
    )


def _waits(name: str, args: tuple) -> int:
    if not name.startswith("gkt_fast::ghost_batch_norm"):
        return 0
    backward = name.endswith("backward")
    if not (backward or _trains(name, args)):
        return 0
    x, ghosts = (args[1], args[6]) if backward else (args[0], 1 if name.endswith("tracking") else args[7])
    positions = math.prod(x.shape[2:])
    channels_last = positions == 1 or (x.stride(1) == 1 and x.shape[1] > 1)
    place = 11 if backward else 10
    lead = None if name.endswith("tracking") or len(args) <= place else args[place]
    rows = x.shape[0] // ghosts if lead is None or ghosts == 1 else (x.shape[0] - lead) // (ghosts - 1)
    chunks = chunk_counts(channels_last, ghosts, rows, x.shape[1], positions, lead)
    trips = chunk_trips(chunks, ghosts, backward, lead is None or lead == rows)
    return -(-trips // LOADED_TOGETHER)


def _trains(name: str, args: tuple) -> bool:
    """Whether the op takes its batch's own statistics; with running ones a pass is enough."""
    if name == "gkt_fast::ghost_batch_norm":
        return args[5] is None
    if name == "gkt_fast::ghost_batch_norm_tracking":
        return True
    if name == "gkt_fast::ghost_batch_norm_backward":
        return not args[9]
    return bool(args[5] if name == "aten::native_batch_norm" else args[7])


def _flops(func: Any, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    if func.overloadpacket in flop_registry:
        return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    attention = _CPU_ATTENTION.get(name)
    return 0 if attention is None else attention(*args)


def _attention(products: int, query: Tensor, key: Tensor, value: Tensor) -> int:
    """So many matrix products of (queries, keys) with the width of a head; torch has no formula for its CPU kernel."""
    batch, heads, queries, width = query.shape
    return 2 * products * batch * heads * queries * key.shape[2] * width


_CPU_ATTENTION: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_: _attention(2, q, k, v),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda _, q, k, v, *__: _attention(
        5, q, k, v
    ),
}
"""Forward two products; backward four and the scores once more, as flash attention does on every device."""
