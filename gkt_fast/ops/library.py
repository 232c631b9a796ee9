"""How an op becomes one of torch's: its schema, its kernel, its rule for fake tensors, its derivative.

`torch.library.define` and `impl` cost half as much per call as `custom_op`, and an `autograd.Function` under the
Autograd key a fifth of what `register_autograd` costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "below_autograd",
    "below_everything",
    "counts_flops",
    "define",
    "differentiable",
    "differentiate",
    "refuse_second_derivative",
    "runs_plain",
    "save",
    "saved",
]

_LIBRARY = torch.library.Library("gkt_fast", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """The op `gkt_fast::<name>`.

    Args:
        schema: name, arguments and results, as `torch.library` writes them.
        kernel: runs it, on every device.
        fake: makes its results without values.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gkt_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gkt_fast, name).default


def differentiate(
    op: torch._ops.OpOverload,
    function: type[Function],
    flat: Callable[..., tuple] | None = None,
    nested: Callable[..., Any] | None = None,
) -> None:
    """Makes `function` the derivative of `op`.

    Args:
        op: what `define` returned.
        function: has `forward(ctx, *inputs)`, which runs the op by `below_autograd`, and `backward(ctx, *gradients)`,
            which passes what it returns through `refuse_second_derivative` where autograd asks for a graph.
        flat: makes the function's inputs from the op's, where those hold lists, which autograd doesn't look into.
        nested: makes the op's results from the function's, followed by the op's inputs.
    """
    level = type(function.__name__, (_SingleLevelFunction,), dict(vars(function), forward=_traced(function)))

    def kernel(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return below_autograd(op, *inputs)
        given = inputs if flat is None else flat(*inputs)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                results = level.apply(*given)
        else:
            results = function.apply(*given)
        return results if nested is None else nested(results, *inputs)

    _LIBRARY.impl(op._schema.name.partition("::")[2], kernel, "Autograd")


def _traced(function: type[Function]) -> Callable[..., Any]:
    """`forward` for one level of torch.func's transforms; those below it may differentiate as well."""

    @torch.enable_grad()
    def forward(ctx: Any, *inputs: Any) -> Any:
        return function.forward(ctx, *inputs)

    return staticmethod(forward)


def below_autograd(op: torch._ops.OpOverload, *inputs: Any) -> Any:
    """The op without its derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def runs_plain(first: Tensor, *others: Tensor | None) -> bool:
    """Whether what runs on the tensors now is seen by torch's kernels alone: no mode of the dispatcher (a FLOP counter,
    fake tensors), no transform of torch.func, no compiler or tracer, no subclass; and whether their memory holds their
    values: no view that is negated when it is read, and the first one no zeros without memory, as gradients can be."""
    if torch.compiler.is_compiling():
        return False
    tensors = first, *others
    if not _PLAIN.issuperset(map(type, tensors)) or True in [t.is_neg() for t in tensors if t is not None]:
        return False
    return (
        not first._is_zerotensor()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, for a backward pass that goes by the memory layout of what it has saved.

    Hooks on saved tensors may give them back in another one, as `save_on_cpu` with pinned memory does.
    """
    ctx.save_for_backward(*tensors)
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ctx.strides = [t if t is None else t.stride() for t in tensors] if hooked else None


def saved(ctx: Any) -> Sequence[Tensor | None]:
    """What `save` has saved, in the layout that it had."""
    if ctx.strides is None:
        return ctx.saved_tensors
    return [
        tensor if tensor is None or tensor.stride() == stride else _laid_out(tensor, stride)
        for tensor, stride in zip(ctx.saved_tensors, ctx.strides, strict=True)
    ]


def _laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A dense copy, its dimensions in the order of these strides."""
    example = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device="meta")
    return torch.empty_like(example, device=tensor.device).copy_(tensor)


def counts_flops() -> bool:
    """Whether torch's FLOP counter listens, which knows torch's own ops alone."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return False
    modes = map(type, _get_current_dispatch_mode_stack())
    return any(mode.__name__.endswith("FlopCounterMode") for mode in modes)


def below_everything() -> AbstractContextManager[None]:
    """Inside, the dispatcher goes straight to the device's kernels: no autograd, no autocast."""
    return torch._C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS)


def _keys(*names: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


_ABOVE_KERNELS = _keys(
    "AutogradFunctionality",
    "AutogradOther",
    "AutogradNestedTensor",
    "ADInplaceOrView",
    "AutocastCPU",
    "AutocastCUDA",
)


def refuse_second_derivative(
    op: str | None, gradients: tuple[Tensor, ...], through: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients, made so that differentiating them is an error instead of a silent zero.

    Args:
        op: name of the op; the error refers to `<op>_reference`. None: the gradients are not an op's, but a step's.
        gradients: what a backward pass computed.
        through: tensors of the graph that the gradients depend on: saved inputs, or results that do in their turn.
    """
    return _Refused.apply(op, len(gradients), *gradients, *through)


class _Refused(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: str | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        step = (
            "the loss of a GKT step can't be differentiated twice, in no execution mode: a gradient penalty and the "
            "like (create_graph=True) must be computed on a forward of the model itself, gkt.model(inputs)"
        )
        if ctx.op is None:
            raise RuntimeError(step)
        raise RuntimeError(
            f"{ctx.op} can't be differentiated twice; {ctx.op}_reference can, and computes the same. For users of GKT: "
            f"{step}"
        )


# Inside an op, and more so inside a compiled graph, the dispatcher leaves autograd out.
_OUTSIDE_OPS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Inside an op's kernel: autograd works in this block, unseen by the caller's hooks on saved tensors."""

    # Checkpointing, for one, would recompute the forward pass that is running.
    watched = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    unseen = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    with (
        torch._C._ForceDispatchKeyGuard(*_OUTSIDE_OPS),
        torch.enable_grad(),
        unseen if watched else contextlib.nullcontext(),
    ):
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
