"""How a fused block runs: looked at once, until classes, modes, flags or hooks of its modules change."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..network.fingerprint import Watch
from ..ops.ghost_batch_norm.running_statistics import RunningUpdate
from ..ops.library import runs_plain
from ..ops.residual_block import (
    SLOTS,
    Geometry,
    Problem,
    autocast_dtype,
    run_plain_residual_block,
    shape_after,
)
from .forms import Form, reason_against, run_layers, run_modules
from .kinds import is_fusible_batch_norm, is_hooked
from .layer import (
    Report,
    is_updated_by_the_op,
    report_statistics,
    surrounding_ghost_batches,
    values_per_ghost,
)

__all__ = ["BlockPlan"]

_KEPT_RUNS = 64
"""Forms of inputs that are remembered, of batches and images that change their size."""

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _Run(NamedTuple):
    """How inputs of one form run.

    Args:
        problem: of the node; None: it can't run them.
        values: of `Report`, for each norm.
        dtypes: of what each norm reads.
    """

    problem: Problem | None
    values: list[tuple[int, int]]
    dtypes: list[torch.dtype]


class _Running(NamedTuple):
    """How running statistics are updated outside `ghost_batches`.

    Args:
        run: the form of the inputs.
        buffers: of the norms that track them, three of each.
        forms: their dtypes and where they are, which can change in the same tensor.
        updates: by the node, for each of its layers; None: there are none.
        counters: what counts batches elsewhere than in the CPU's memory, which the node doesn't write.
        reported: norms that the node doesn't update.
    """

    run: _Run
    buffers: list[Tensor | None]
    forms: list[tuple[torch.dtype, bool]]
    updates: list[RunningUpdate | None] | None
    counters: list[Tensor]
    reported: list[int]


class BlockPlan:
    """What is known of a block.

    Args:
        block: a fused block.
        form: its form.

    Attributes:
        reason: why it can't run fused; None when it can.
    """

    def __init__(self, block: nn.Module, form: Form) -> None:
        self._watch = Watch(block)
        self._fingerprint = self._watch.fingerprint()
        self._form = form
        self._recompute = block.recompute
        self._whole = False
        self._settings: list[Any] = []
        self._runs: dict[Hashable, _Run] = {}
        self._running: _Running | None = None
        self.reason = reason_against(block, form)
        if self.reason is None:
            self._layers = [getattr(block, name) for name in form.layers]
            self._shortcut = getattr(block, form.shortcut)
            self._sort_layers()

    def is_current(self, block: nn.Module) -> bool:
        """Whether the block is as it was."""
        return self._watch.is_current(block) and self._watch.fingerprint() == self._fingerprint

    def run(self, x: Tensor) -> Tensor:
        """The block's output; for a block without a `reason`."""
        if self._whole:
            y = self._run_as_a_whole(x)
            if y is not None:
                return y
        return run_layers(self._form, self._layers, self._shortcut, x)

    def _sort_layers(self) -> None:
        """For `residual_block`: convolutions with their norms, and what a shortcut does before its convolution."""
        first = int(self._form.preactivation)
        convolutions, norms = self._layers[first::2], self._layers[1 - first :: 2]
        self._depth = len(convolutions)
        self._before, projection = _split(self._shortcut, self._form.preactivation)
        if projection is not None:
            convolutions, norms = [*convolutions, projection[0]], [*norms, projection[1]]
        # Of a pre-activation block the shortcut reads what the node itself computes.
        self._whole = all(map(_is_plain_convolution, convolutions)) and not (first and self._before)
        self._pairs = list(zip(convolutions, norms, strict=True))
        self._slots = _Slots([slot for pair in self._pairs for slot in _slots(*pair)])
        self._attributes = [convolution.__dict__ for convolution in convolutions]
        self._norms = [norm for norm in norms if norm is not None]
        self._tracking = [
            i for i, norm in enumerate(self._norms) if norm.training and norm.track_running_stats
        ]
        tracking = [self._norms[i] for i in self._tracking]
        self._buffers = _Slots([(norm, "_buffers", name) for norm in tracking for name in _BUFFERS])
        read = [(attributes, name) for attributes in self._attributes for name in _GEOMETRY]
        read += [(norm.__dict__, name) for norm in self._norms for name in ("eps", "momentum")]
        self._read = [attributes for attributes, _ in read], [name for _, name in read]

    def _run_as_a_whole(self, x: Tensor) -> Tensor | None:
        """The block as one node; None where the node can't run it."""
        parameters = self._slots.read()
        if not runs_plain(x, *parameters):
            return None
        skip = run_modules(self._before, x).resolve_neg() if self._before else None
        ghosts = surrounding_ghost_batches()
        number, lead = (1, None) if ghosts is None else (ghosts.number, ghosts.lead_rows(x.shape[0]))
        run = self._describe(x, skip, parameters[::SLOTS], number, lead)
        if run.problem is None:
            return None
        updates, reported = None, self._tracking
        if reported and ghosts is None:
            *_, updates, counters, reported = self._find_running(run)
            updates = updates and [*updates]  # the node crosses out what it has done
            if counters:  # before the node, which checkpointing leaves early when it runs it again
                torch._foreach_add_(counters, 1)
        y, statistics = run_plain_residual_block(run.problem, x, skip, None, parameters, updates)
        for i in reported:
            report_statistics(Report(self._norms[i], statistics[i], run.values[i]))
        return y

    def _find_running(self, run: _Run) -> _Running:
        """Found once, as long as the norms have the same buffers."""
        running, buffers = self._running, self._buffers.read()
        forms = [(buffer.dtype, buffer.is_cpu) for buffer in buffers if buffer is not None]
        if (
            running is None
            or running.run is not run
            or not all(map(operator.is_, buffers, running.buffers))
            or forms != running.forms
        ):
            updates: list[RunningUpdate | None] = [None] * len(self._pairs)
            counters, reported = [], []
            for place, i in enumerate(self._tracking):
                norm = self._norms[i]
                mean, var, counter = buffers[3 * place : 3 * place + 3]
                if not is_updated_by_the_op(norm, run.dtypes[i]):
                    reported.append(i)
                    continue
                if counter is not None and not _is_cpu_counter(counter):
                    counters.append(counter)
                    counter = None
                updates[i] = RunningUpdate(mean, var, norm.momentum, counter)
            given = updates if len(reported) < len(self._tracking) else None
            running = self._running = _Running(run, buffers, forms, given, counters, reported)
        return running

    def _describe(
        self, x: Tensor, skip: Tensor | None, weights: list[Tensor], ghosts: int, lead_rows: int | None
    ) -> _Run:
        """How such inputs run; found once, as long as they have the same form and the layers the same settings."""
        settings = [weight.shape for weight in weights]
        settings += map(operator.getitem, *self._read)
        if settings != self._settings:
            self._settings, self._runs = settings, {}
        autocast = autocast_dtype(x)
        of_skip = None if skip is None else (skip.shape, skip.dtype)
        form = x.shape, x.dtype, of_skip, ghosts, lead_rows, autocast
        run = self._runs.get(form)
        if run is None:
            if len(self._runs) == _KEPT_RUNS:
                self._runs.clear()
            run = self._runs[form] = self._find_run(x, skip, weights, ghosts, lead_rows, autocast)
        return run

    def _find_run(
        self,
        x: Tensor,
        skip: Tensor | None,
        weights: list[Tensor],
        ghosts: int,
        lead_rows: int | None,
        autocast: torch.dtype | None,
    ) -> _Run:
        nothing = _Run(None, [], [])
        if any(a["padding_mode"] != "zeros" or isinstance(a["padding"], str) for a in self._attributes):
            return nothing
        if x.dim() != 4 or not x.shape[0] or (lead_rows is None and x.shape[0] % ghosts):
            return nothing
        geometry = tuple(Geometry(*(a[name] for name in _GEOMETRY[:4])) for a in self._attributes)
        eps = tuple(None if norm is None else norm.eps for _, norm in self._pairs)
        shortcut, preactivation = len(self._pairs) > self._depth, self._form.preactivation
        problem = Problem(
            geometry,
            eps,
            shortcut,
            preactivation,
            ghosts,
            lead_rows,
            bool(self._recompute),
            self._recompute == "pointwise",
            autocast,
        )
        shapes = [x.shape]
        for weight, of_layer in zip(weights[: self._depth], geometry, strict=False):
            shapes.append(shape_after(shapes[-1], weight, of_layer))
        residual = x if skip is None else skip
        shape, dtype = residual.shape, residual.dtype
        if shortcut:
            shape = shape_after(shape, weights[self._depth], geometry[-1])
            dtype = autocast or dtype
        # Torch adds what broadcasts, and promotes; the node does neither.
        if shape != shapes[-1] or dtype != (autocast or x.dtype):
            return nothing
        read = shapes[:-1] if preactivation else shapes[1:]
        read = [*read, shapes[-1]] if len(self._norms) > self._depth else read
        values = [values_per_ghost(shape, ghosts, lead_rows) for shape in read]
        if any(norm.training and min(of_norm) < 2 for norm, of_norm in zip(self._norms, values, strict=True)):
            return nothing  # refused, in words, where the norm runs by itself
        dtypes = [autocast or x.dtype] * len(read)
        dtypes[0] = x.dtype if preactivation else dtypes[0]
        return _Run(problem, values, dtypes)


def _split(
    shortcut: nn.Module | None, preactivation: bool
) -> tuple[list[nn.Module], tuple[nn.Module, nn.Module | None] | None]:
    """What of a shortcut runs by itself, and the convolution with its norm after it that the node runs."""
    if shortcut is None or (type(shortcut) is nn.Identity and not is_hooked(shortcut)):
        return [], None
    if preactivation:
        # timm's projection: a convolution, and a norm that pre-activation has no use for.
        parts = [*shortcut.children()]
        plain = type(shortcut).__name__ == "DownsampleConv" and not is_hooked(shortcut) and len(parts) == 2
        if plain and _is_plain_convolution(parts[0]) and type(parts[1]) is nn.Identity:
            return [], None if is_hooked(parts[1]) else (parts[0], None)
        return [shortcut], None
    if type(shortcut) is not nn.Sequential or is_hooked(shortcut):
        return [shortcut], None
    modules = [m for m in shortcut if type(m) is not nn.Identity or is_hooked(m)]
    if len(modules) > 1 and _is_plain_convolution(modules[-2]) and is_fusible_batch_norm(modules[-1]):
        return modules[:-2], (modules[-2], modules[-1])
    return modules, None


def _is_plain_convolution(module: nn.Module) -> bool:
    """Whether a call of the module is torch's convolution of its weight and bias, which may be parametrised."""
    kind = type(module)
    return (
        isinstance(module, nn.Conv2d)
        and kind.forward is nn.Conv2d.forward
        and kind._conv_forward is nn.Conv2d._conv_forward
        and kind.__call__ is nn.Module.__call__
        and not is_hooked(module)
        and "_conv_forward" not in vars(module)
        and module._compiled_call_impl is None
    )


Slot = tuple["nn.Module | None", str, str]
"""A module, which of its dictionaries holds a tensor, and the tensor's name; without a module there is none."""


def _slots(convolution: nn.Module, norm: nn.Module | None) -> list[Slot]:
    """Of a layer's tensors, in the order of `SLOTS`; a norm has running statistics where it uses them."""
    uses = norm is not None and not norm.training
    return [
        (convolution, "_parameters", "weight"),
        (convolution, "_parameters", "bias"),
        (norm, "_parameters", "weight"),
        (norm, "_parameters", "bias"),
        (norm if uses else None, "_buffers", "running_mean"),
        (norm if uses else None, "_buffers", "running_var"),
    ]


class _Slots:
    """Reads tensors of modules, by the interpreter's own loops: every block does in every step."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._attributes = [_NOTHING if module is None else module.__dict__ for module, _, _ in slots]
        self._kinds = [kind for _, kind, _ in slots]
        self._names = [name for _, _, name in slots]

    def read(self) -> list[Tensor | None]:
        dictionaries = map(operator.getitem, self._attributes, self._kinds)
        try:
            return [*map(operator.getitem, dictionaries, self._names)]
        except KeyError:  # parametrised, or put there as plain tensors
            return [None if module is None else getattr(module, name) for module, _, name in self._slots]


_NOTHING = {"_parameters": dict.fromkeys(("weight", "bias")), "_buffers": dict.fromkeys(_BUFFERS)}
"""The attributes of no module."""


def _is_cpu_counter(counter: Tensor) -> bool:
    return counter.is_cpu and counter.dtype is torch.int64 and counter.dim() == 0
