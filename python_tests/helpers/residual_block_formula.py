"""What the tests of residual_block compare with: each ghost batch by itself, through torch's own layers in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gkt_fast.ops.residual_block import Convolution, Norm
from helpers.ghost_batch_norm_formula import rows_of_ghosts

__all__ = ["CASES", "Case", "Inputs", "expected", "make"]


class Case(NamedTuple):
    """A form of a block.

    Args:
        widths: channels of the input, then of each convolution's output.
        kernels: sizes of the convolutions.
        options: of the convolutions: stride, dilation, groups of the one that is named by its place.
        shortcut: "none", "convolution", "normed" or "skip" (what code outside computed).
        lead_rows: of the first ghost batch; None: as many as each of the others has.
    """

    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    options: dict[int, dict] = {}  # noqa: RUF012
    shortcut: str = "none"
    preactivation: bool = False
    ghosts: int = 2
    bias: bool = False
    frozen: tuple[int, ...] = ()
    keep: bool = False
    lead_rows: int | None = None


CASES = {
    "basic": Case((5, 5, 5), (3, 3)),
    "basic, strided": Case((5, 7, 7), (3, 3), {0: {"stride": (2, 2)}}, "normed"),
    "basic, skip": Case((5, 7, 7), (3, 3), {0: {"stride": (2, 2)}}, "skip", ghosts=3),
    "bottleneck": Case((9, 3, 3, 9), (1, 3, 1), ghosts=3),
    "bottleneck, projection": Case(
        (6, 4, 4, 9), (1, 3, 1), {1: {"stride": (2, 1), "groups": 2}}, "normed", bias=True
    ),
    "bottleneck, convolution alone": Case((6, 4, 4, 9), (1, 3, 1), {}, "convolution", bias=True, ghosts=1),
    "dilated, one frozen": Case((4, 4, 4), (3, 3), {1: {"dilation": (2, 2)}}, frozen=(1,)),
    "all frozen": Case((4, 6, 6), (3, 3), {}, "normed", frozen=(0, 1, 2)),
    "dropped": Case((5, 5, 5), (3, 3), keep=True, ghosts=3),
    "preactivation": Case((5, 7, 5), (3, 3), preactivation=True),
    "preactivation, bottleneck": Case(
        (6, 4, 4, 9), (1, 3, 1), {1: {"stride": (2, 2)}}, "convolution", True, 3, True
    ),
    "preactivation, dropped": Case((5, 3, 3, 5), (1, 3, 1), preactivation=True, keep=True, ghosts=3),
    "first ghost batch larger": Case(
        (5, 7, 7), (3, 3), {0: {"stride": (2, 2)}}, "normed", ghosts=3, keep=True, lead_rows=4
    ),
    "preactivation, first ghost batch smaller": Case(
        (5, 3, 3, 5), (1, 3, 1), preactivation=True, ghosts=3, keep=True, lead_rows=1
    ),
}


class Inputs(NamedTuple):
    """Arguments of the op; `leaves` are those with a gradient, by name."""

    x: Tensor
    convolutions: list[Convolution]
    norms: list[Norm]
    options: dict
    leaves: dict[str, Tensor]


def make(case: Case, dtype=torch.float64, layout="planes", seed=0, rows=2, size=(7, 5)) -> Inputs:
    """Fresh inputs; `layout` of activations: "planes", "channels_last", "strided"."""
    generator = torch.Generator().manual_seed(seed)
    leaves: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
        value = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        if name.startswith(("x", "skip")):
            value = _laid_out(value, layout)
        leaves[name] = value.requires_grad_()
        return leaves[name]

    def convolution(i: int, inner: int, outer: int, kernel: int, **options) -> Convolution:
        groups, dilation = options.get("groups", 1), options.get("dilation", (1, 1))
        fan = inner // groups * kernel**2
        weight = normal(f"convolution {i}", outer, inner // groups, kernel, kernel, scale=fan**-0.5)
        if layout == "channels_last":
            weight = leaves[f"convolution {i}"] = (
                weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            )
        bias = normal(f"bias {i}", outer) if case.bias else None
        padding = tuple(d * (kernel // 2) for d in dilation)
        return Convolution(weight, bias, options.get("stride", (1, 1)), padding, dilation, groups)

    def norm(i: int, channels: int) -> Norm:
        weight, bias = normal(f"gain {i}", channels), normal(f"shift {i}", channels)
        running = ()
        if i in case.frozen:
            running = (
                torch.randn(channels, generator=generator),
                torch.rand(channels, generator=generator) + 0.5,
            )
        return Norm(weight, bias, *(r.to(dtype) for r in running))

    widths, depth = case.widths, len(case.kernels)
    lead_rows = rows if case.lead_rows is None else case.lead_rows
    x = normal("x", lead_rows + rows * (case.ghosts - 1), widths[0], *size)
    convolutions = [
        convolution(i, widths[i], widths[i + 1], kernel, **case.options.get(i, {}))
        for i, kernel in enumerate(case.kernels)
    ]
    norms = [norm(i, widths[i] if case.preactivation else widths[i + 1]) for i in range(depth)]
    options = {"ghosts": case.ghosts, "preactivation": case.preactivation}
    if case.lead_rows is not None:
        options["lead_rows"] = case.lead_rows
    stride = next((o["stride"] for o in case.options.values() if "stride" in o), (1, 1))
    if case.shortcut in ("convolution", "normed"):
        projection = convolution(depth, widths[0], widths[-1], 1, stride=stride)
        options["shortcut"] = projection, norm(depth, widths[-1]) if case.shortcut == "normed" else None
    if case.shortcut == "skip":
        places = [(n - 1) // s + 1 for n, s in zip(size, stride, strict=True)]
        options["skip"] = normal("skip", x.shape[0], widths[-1], *places)
    if case.keep:
        options["keep"] = torch.arange(case.ghosts) != 1
    return Inputs(x, convolutions, norms, options, leaves)


def expected(
    inputs: Inputs, grad_y: Tensor | None = None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], dict]:
    """y, mean and biased variance of each norm, and the gradients of the leaves by name, in float64."""
    copies = {id(leaf): leaf.detach().double().requires_grad_() for leaf in inputs.leaves.values()}

    def exact(value):
        return None if value is None else copies.get(id(value), value.detach().double())

    convolutions = [Convolution(exact(c[0]), exact(c[1]), *c[2:]) for c in inputs.convolutions]
    norms = [Norm(*map(exact, n[:4]), n.eps) for n in inputs.norms]
    options = inputs.options
    shortcut = None
    if options.get("shortcut") is not None:
        c, n = options["shortcut"]
        shortcut = Convolution(exact(c[0]), exact(c[1]), *c[2:]), n and Norm(*map(exact, n[:4]), n.eps)
    x, skip, keep = exact(inputs.x), exact(options.get("skip")), options.get("keep")
    rows = rows_of_ghosts(x.shape[0], options["ghosts"], options.get("lead_rows"))
    parts = [
        _one(
            part,
            convolutions,
            norms,
            shortcut,
            None if skip is None else skip.split(rows)[g],
            keep is not None and not keep[g],
            options["preactivation"],
        )
        for g, part in enumerate(x.split(rows))
    ]
    y = torch.cat([part for part, _ in parts])
    statistics = [
        tuple(torch.stack(values).detach() for values in zip(*of_norm, strict=True))
        for of_norm in zip(*(found for _, found in parts), strict=True)
    ]
    if grad_y is not None:
        y.backward(grad_y.double())
    gradients = {name: copies[id(leaf)].grad for name, leaf in inputs.leaves.items()}
    return y.detach(), statistics, gradients


def _one(x, convolutions, norms, shortcut, skip, dropped, preactivation):
    """One ghost batch."""
    statistics = []

    def normalize(a, norm):
        if norm.running_mean is not None:
            statistics.append((norm.running_mean, norm.running_var))
            return F.batch_norm(
                a, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, eps=norm.eps
            )
        statistics.append((a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)))
        return F.batch_norm(a, None, None, norm.weight, norm.bias, True, eps=norm.eps)

    def convolve(a, c):
        return F.conv2d(a, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)

    if preactivation:
        a = F.relu(normalize(x, norms[0]))
        residual = x if shortcut is None else convolve(a, shortcut[0])
        for i, c in enumerate(convolutions):
            y = convolve(a, c)
            if i + 1 < len(norms):
                a = F.relu(normalize(y, norms[i + 1]))
        return residual + 0 * y if dropped else y + residual, statistics
    a = x
    for i, c in enumerate(convolutions):
        a = normalize(convolve(a, c), norms[i])
        a = F.relu(a) if i + 1 < len(norms) else a
    residual = x if skip is None else skip
    if shortcut is not None:
        residual = convolve(residual, shortcut[0])
        residual = residual if shortcut[1] is None else normalize(residual, shortcut[1])
    return residual + 0 * a if dropped else F.relu(a + residual), statistics


def _laid_out(value: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        padded = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), float("nan"))
        padded[..., ::2] = value
        return padded[..., ::2]
    return value
