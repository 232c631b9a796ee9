"""Holds a mode's forward against streams that run one by one, on a few rows of a batch, before the mode is trusted.

A mode that shares or stacks states assumes things of a model that can't be read from it: that no layer mixes the rows
of a batch, that nothing knows how many rows there are, that what a hook keeps belongs to the stream that runs. So the
model runs some of its subnets both ways, and the logits must agree up to rounding. Nothing of that stays (`look`).

What could hide a difference is taken out of the way. Noise: random numbers are replaced by fixed ones. Weights that
silence what comes after them (a gain of 0, a layer scale of 1e-6, a head of zeros) are replaced by others, in both
runs. Rounding: 16 bits are made 32, autocast is off, and how far rounding carries in this model is measured, by a run
whose layers' outputs are changed by a rounding error each. Python's and NumPy's generators are seeded
alike at every call of a layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..distributed import is_sharded, unsynchronized_batch_norm
from ..network.block_order import BlockOrder
from ..network.calls import logits_of
from ..network.inputs import call_model, first_rows, map_tensors, rows_in, tensors_in
from ..network.interception import Site, intercept
from ..network.look import look
from ..network.network import Network
from ..subnets.sampling import minimum_depths
from ..subnets.streams import Streams
from ..subnets.subnet import Subnet
from .cut_stream import CutStream
from .share import Share, share_of
from .step import Mode

__all__ = ["Verification"]

_LEAST_ROWS = 8
_SHARE_OF_BATCH = 4
"""A fourth of the batch: layers that route by capacity need many rows, and the check should cost less than a step."""
_NARROW = (torch.float16, torch.bfloat16)
_ROUNDINGS = 100
"""How many times the measured effect of rounding logits may differ by."""


class _Run(NamedTuple):
    """What a forward of all streams gave: logits by stream, and the buffers that it wrote."""

    logits: list[Tensor]
    written: dict[tuple[str, str], Tensor]


class Verification:
    """Streams of a model that ran one by one, to hold modes against.

    Args:
        network: the network; what its blocks return and which buffers it writes is learnt.
        inputs: a batch.
        streams: those of the step; the check runs others, which part as early and as late as they may.
    """

    def __init__(self, network: Network, inputs: tuple[Any, ...], streams: Streams) -> None:
        self._network = network
        self._config = streams.config
        self._step = streams
        self._probes = _probes(network, streams)
        self._seeded = network.sites
        self._gradients = torch.is_grad_enabled() and not is_sharded(network.model)
        self._inputs: tuple[Any, ...] = ()
        self._expected: _Run | None = None
        self._tolerance = 0.0
        if not all(map(_has_values, [*tensors_in(inputs), *network.model.parameters()])):
            return
        size = rows_in(inputs) or 1
        rows = max(_LEAST_ROWS, math.ceil(size / _SHARE_OF_BATCH))
        # A model may know the size of its batch, need what autocast does, or bear no other weights than its own.
        for count in dict.fromkeys((min(rows, size), size)):
            for self._as_is in (False, True):
                self._inputs = first_rows(inputs, count)
                if self._run_one_by_one():
                    return

    def _run_one_by_one(self) -> bool:
        """Runs the streams by themselves; whether that gave finite logits."""
        network = self._network
        share = share_of(self._step, self._inputs)
        runs: dict[frozenset[str], _Run] = {}
        order = BlockOrder(network.sites)
        noisy: frozenset[str] = frozenset()
        try:
            if self._config.independent_noise:  # other layers are watched, for whether they draw
                noisy = network.noisy_layers()
                self._seeded = [site for site in network.sites if site.path in noisy]
            for dropped in self._probes:
                try:
                    run = self._look(
                        lambda inputs, d=dropped: [_stream(network, inputs, d, order, share, noisy)]
                    )
                except Exception:
                    if not dropped:
                        raise
                else:  # a subnet that can't run by itself, as what a dropped block's hook keeps is missing, is no probe
                    runs[dropped] = run
            shaken = self._look(lambda inputs: [_stream(network, inputs, frozenset(), order, shaken=True)])
        except torch.OutOfMemoryError:
            if self._as_is:
                raise
            return False
        except Exception:  # whatever the model's own code raises on such a batch; the step itself will tell
            return False
        logits = [run.logits[0] for run in runs.values()]
        if not all(bool(z.isfinite().all()) for z in logits):
            return False
        self._expected = _Run(logits, runs[frozenset()].written)
        config = self._config.replace(
            groups=max(len(runs) - 1, 1),
            loops=1,
            chain="step",
            knowledge="batch",
            batch_norm="full",
            sampler="uniform",
            subnets=None,
            subnet_resolution=None,
            budget=None,
        )
        self._streams = Streams(tuple(runs), config)
        network.running_buffers = [
            place
            for place in self._expected.written
            if not isinstance(network.model.get_submodule(place[0]), _NormBase)
        ]
        eps = torch.finfo(logits[0].dtype).eps
        floor = max(1e-9, (1000 if eps < 1e-5 else 8) * eps)
        self._tolerance = min(0.5, max(floor, _ROUNDINGS * _difference(shaken.logits[0], logits[0])))
        return True

    def reason_against(self, mode: Mode) -> str | None:
        """Why the mode is wrong for the model as it is set up now; None: it isn't, or that can't be told."""
        if self._expected is None or mode.forward is None:
            return None
        forward = mode.forward
        try:
            actual = self._look(lambda inputs: forward(self._network, inputs, self._streams))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            own = isinstance(error, RuntimeError) and type(error) is not RuntimeError
            return str(error) if own else f"a trial on some rows of the batch failed ({_described(error)})"
        for stream, (z, expected) in enumerate(zip(actual.logits, self._expected.logits, strict=True)):
            if z.shape != expected.shape:
                return (
                    f"in a trial on some rows of the batch, logits had shape {tuple(z.shape)} where they have "
                    f"{tuple(expected.shape)} when streams run one by one"
                )
            difference = _difference(z, expected)
            if not difference <= self._tolerance:
                whose = "a subnet's logits" if stream else "the full network's logits"
                return (
                    f"in a trial on some rows of the batch, {whose} differed by {difference:.2g} (relative) from those "
                    f"of streams that run one by one, where rounding explains {self._tolerance:.2g}: a layer mixes the "
                    "rows of a batch, or a value is kept from one stream to another"
                )
        for place, expected in self._expected.written.items():
            buffer = actual.written.get(place)
            if buffer is None or buffer.shape != expected.shape:
                return f"buffer {'.'.join(place)!r} is not written as when streams run one by one"
            if not _difference(buffer, expected) <= max(self._tolerance, 1e-4):
                return f"buffer {'.'.join(place)!r} takes in what several states give it"
        return None

    def _look(self, run: Callable[[tuple[Any, ...]], list[Tensor]]) -> _Run:
        model = self._network.model
        inputs = map_tensors(self._input, self._inputs)
        with ExitStack() as stack:
            stack.enter_context(unsynchronized_batch_norm(model))
            stack.enter_context(look(model, training=None, gradients=self._gradients))
            if not self._as_is:
                for device in {p.device.type for p in model.parameters()} & {"cpu", "cuda"}:
                    stack.enter_context(torch.autocast(device, enabled=False))
                stack.enter_context(_awake(model))
            before = {place: (buffer, buffer.clone()) for place, buffer in _buffers(model)}
            stack.enter_context(intercept(model, self._seeded, _seed_and_call))
            stack.enter_context(_FixedNoise())
            logits = [z.detach() for z in run(inputs)]
            written = {
                place: buffer.detach().clone()
                for place, buffer in _buffers(model)
                if buffer.is_floating_point() and _is_written(buffer, *before.get(place, (None, None)))
            }
        return _Run(logits, written)

    def _input(self, x: Tensor) -> Tensor:
        wide = not self._as_is and x.dtype in _NARROW
        copied = x.detach().float() if wide else x.detach().clone()
        return copied.requires_grad_() if x.requires_grad and self._gradients else copied


def _probes(network: Network, streams: Streams) -> list[frozenset[str]]:
    """What streams drop that part as early as those of a step may, and as late, and everywhere; first nothing."""
    config, stages = streams.config, network.stages
    if config.sampler == "fixed":
        return list(dict.fromkeys(streams.dropped))
    blocks = [
        path
        for stage in stages
        for path, droppable in zip(stage.blocks, stage.droppable, strict=True)
        if droppable
    ]
    if config.sampler == "stochastic_depth":
        dropped = (blocks[:1], blocks[-1:], blocks[::2])
        return list(dict.fromkeys(map(frozenset, ((), *dropped))))
    full, least = tuple(stage.depth for stage in stages), tuple(minimum_depths(stages, config))
    parts = [i for i in range(len(full)) if least[i] < full[i]]
    depths = [full]
    if parts:
        first, last = parts[0], parts[-1]
        depths += [
            least,
            (*full[:first], least[first], *full[first + 1 :]),
            (*full[:last], full[last] - 1, *full[last + 1 :]),
        ]
    return list(dict.fromkeys(Subnet.ordered(d, stages).dropped(stages) for d in depths))


def _stream(
    network: Network,
    inputs: tuple[Any, ...],
    dropped: frozenset[str],
    order: BlockOrder,
    share: Share | None = None,
    noisy: frozenset[str] = frozenset(),
    shaken: bool = False,
) -> Tensor:
    """The logits of one stream by itself; `shaken`: rounding errors are added to the layers' outputs."""
    if share is not None and dropped:
        one = CutStream(network, dropped, noisy, share, order)
        with intercept(network.model, one.sites, one.call):
            return one.logits(
                lambda rows: logits_of(call_model(network.model, rows.cut(inputs) if rows else inputs))
            )

    def call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        order.call(site)
        if site.path in dropped:
            return network.skip(site, args, kwargs)
        output = module(*args, **kwargs)
        if site.is_block:
            network.learn_returns(site, output)
        return tree_map_only(Tensor, _shaken, output) if shaken else output

    order.begin_stream()
    with intercept(network.model, network.sites, call):
        logits = logits_of(call_model(network.model, inputs))
    order.end_stream()
    return logits


def _seed_and_call(site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """The layer draws the same numbers of Python and NumPy in every call."""
    random.seed(site.index)
    np.random.seed(site.index)
    return module(*args, **kwargs)


def _shaken(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    pattern = torch.arange(x.numel(), device=x.device, dtype=torch.float64).mul_(1.7).cos_().view(x.shape)
    return x + x.detach() * (4 * torch.finfo(x.dtype).eps * pattern).to(x.dtype)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    actual, expected = actual.double(), expected.double()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    difference = (actual - expected).abs().max().item() if expected.numel() else 0.0
    return difference / scale if scale else difference


def _buffers(model: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield (path, name), buffer


def _is_written(buffer: Tensor, earlier: Tensor | None, content: Tensor | None) -> bool:
    return buffer is not earlier or not torch.equal(buffer, content)


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _awake(model: nn.Module) -> Iterator[None]:
    """Inside, gains, biases and weights of zeros have other values, so that no layer is silent, and weights and buffers
    of 16 bits are float32.

    Weights of a sharded model, and those that torch's recurrent layers hold a second time, stay as they are.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    copies: dict[int, nn.Parameter] = {}
    modules = [] if is_sharded(model) else [m for m in model.modules() if not isinstance(m, nn.RNNBase)]
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                    continue
                if id(parameter) not in copies:
                    small = parameter.numel() == max(parameter.shape, default=1)
                    if small or not bool(parameter.detach().any()):
                        copies[id(parameter)] = _awakened(parameter)
                    elif parameter.dtype in _NARROW:
                        copies[id(parameter)] = nn.Parameter(
                            parameter.detach().float(), parameter.requires_grad
                        )
                    else:
                        continue
                replaced.append((module._parameters, name, parameter))
                module._parameters[name] = copies[id(parameter)]
            for name, buffer in module._buffers.items():  # copies, which `look` takes away again
                if buffer is not None and buffer.dtype in _NARROW:
                    module._buffers[name] = buffer.float()
        yield
    finally:
        for parameters, name, parameter in replaced:
            parameters[name] = parameter


def _awakened(parameter: nn.Parameter) -> nn.Parameter:
    values = parameter.detach()
    values = values.float() if values.dtype in _NARROW else values
    fan_in = max(1, values.numel() // max(1, values.shape[0])) if values.dim() > 1 else 1
    pattern = torch.arange(values.numel(), device=values.device, dtype=torch.float32).mul_(2.3).sin_()
    changed = values + (pattern * (0.3 / math.sqrt(fan_in))).view(values.shape).to(values.dtype)
    return nn.Parameter(changed, requires_grad=parameter.requires_grad)


class _FixedNoise(TorchDispatchMode):
    """Random numbers of torch are the same in every row, whatever the shape: nothing is dropped."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        args = list(args)
        for index, argument in enumerate(func._schema.arguments):
            if argument.name in ("dropout_p", "dropout") and isinstance(argument.default_value, float | None):
                if argument.name in kwargs:
                    kwargs[argument.name] = 0.0
                elif index < len(args) and isinstance(args[index], float):
                    args[index] = 0.0
        if func._overloadpacket is torch.ops.aten.native_dropout:
            args[1] = 0.0
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and func._schema.name.startswith("aten::"):
            name = func._schema.name.removeprefix("aten::")
            with torch.no_grad():
                _fix(name, result)
        return result


def _fix(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or "dropout" in name or "attention" in name or "rnn" in name:
        return
    if "bernoulli" in name:
        value.fill_(1)
    elif "randperm" in name:
        value.copy_(torch.arange(value.numel() - 1, -1, -1, device=value.device))
    elif value.is_floating_point():
        last = value.shape[-1] if value.dim() > 1 else 1
        ramp = torch.arange(1, last + 1, device=value.device, dtype=torch.float64) / (last + 1)
        value.copy_(ramp.to(value.dtype).expand(value.shape) if value.dim() else ramp[0])
    elif value.dtype is not torch.bool:
        value.fill_(0)
