"""How fast the ops and a step are here: times, and ratios to plain torch, torch.compile and a copy.

The copy moves as many bytes as the op must: group_knowledge_loss reads its logits and writes their gradient;
ghost_batch_norm with residual and ReLU, forward and backward in two passes each, reads seven and writes three times
the size of x, and the bit mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import GKTConfig
from ..execution import EXECUTION_MODES
from ..gkt import GKT
from ..models import cifar_resnet
from ..ops import ghost_batch_norm, group_knowledge_loss, group_knowledge_loss_reference, use_backend
from ..ops.registry import Implementation

__all__ = ["time_ops", "time_steps"]

LOSS_SHAPES = {
    "cpu": ((4, 128, 100), (4, 128, 1000)),
    "cuda": ((4, 256, 1000), (4, 4096, 21), (4, 128, 32000)),
}
NORM_SHAPES = {
    "cpu": ((64, 16, 32, 32), (32, 64, 16, 16)),
    "cuda": ((256, 64, 56, 56), (256, 256, 28, 28), (128, 64, 8, 8)),
}
MEASURED_SECONDS = 0.3
"""Of each measurement, warm-up not counted."""


@dataclass(frozen=True)
class Problem:
    """An op's forward in plain torch and in ours, on the same inputs.

    Args:
        eager: in plain torch.
        ours: by the package.
        inputs: what both take, and what is differentiated.
        grad_output: gradient of the result.
        moved_bytes: what the copy moves.
    """

    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    grad_output: Tensor
    moved_bytes: int

    def seconds(self, forward: Callable[..., Tensor]) -> float:
        """Of forward and backward."""
        return _seconds(lambda: torch.autograd.grad(forward(*self.inputs), self.inputs, self.grad_output))


def time_ops(working: Sequence[Implementation], device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of forward and backward passes in float32, for each op, shape and backend."""
    for op, shapes, prepare in (
        ("group_knowledge_loss", LOSS_SHAPES, _loss),
        ("ghost_batch_norm", NORM_SHAPES, _norm),
    ):
        for shape in shapes.get(device.type, shapes["cpu"]):
            problem = prepare(shape, device)
            eager_seconds = problem.seconds(problem.eager)
            compiled_seconds, note = _compiled_seconds(problem)
            copy_seconds = _copy_seconds(problem.moved_bytes, device)
            for implementation in working:
                if implementation.op != op:
                    continue
                place = {"what": op, "shape": "x".join(map(str, shape)), "backend": implementation.backend}
                try:
                    with use_backend(implementation.backend):
                        seconds = problem.seconds(problem.ours)
                except (
                    RuntimeError
                ) as error:  # too little memory, or a kernel of this shape that doesn't compile
                    yield place | {"note": f"{type(error).__name__}: {error}"}
                    continue
                yield place | {
                    "ms": 1e3 * seconds,
                    "eager / it": eager_seconds / seconds,
                    "compiled / it": compiled_seconds and compiled_seconds / seconds,
                    "it / copy": seconds / copy_seconds,
                    **({"note": note} if note else {}),
                }


def time_steps(device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of training steps of a ResNet-20, in every mode, relative to a plain step."""
    batch = 256 if device.type == "cuda" else 16
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(10, (batch,), device=device)

    def network() -> torch.nn.Module:
        return cifar_resnet(20).to(device=device, memory_format=torch.channels_last)

    plain = network()
    plain_seconds = _seconds(lambda: F.cross_entropy(plain(images), targets).backward())
    for mode in EXECUTION_MODES:
        gkt = GKT(network(), GKTConfig(execution=mode))
        gkt.layers(images)
        seconds = _seconds(lambda gkt=gkt: gkt(images, targets, step=0).loss.backward())
        yield {
            "what": f"step, {mode}",
            "shape": "x".join(map(str, images.shape)),
            "backend": "automatic",
            "ms": 1e3 * seconds,
            "plain steps": seconds / plain_seconds,
        }


def _loss(shape: tuple[int, ...], device: torch.device) -> Problem:
    logits = torch.randn(shape, device=device, requires_grad=True)
    targets = torch.randint(shape[2], (shape[1],), device=device)
    return Problem(
        lambda logits: group_knowledge_loss_reference(logits, targets)[0],
        lambda logits: group_knowledge_loss(logits, targets)[0],
        (logits,),
        torch.ones((), device=device),
        2 * logits.numel() * logits.element_size(),
    )


def _norm(shape: tuple[int, ...], device: torch.device) -> Problem:
    def activation() -> Tensor:
        return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return ghost_batch_norm(x, weight, bias, ghosts=1, residual=residual)[0]

    weight, bias = torch.randn(2, shape[1], device=device)
    inputs = tuple(tensor.requires_grad_() for tensor in (activation(), weight, bias, activation()))
    elements = inputs[0].numel()
    return Problem(
        eager, ours, inputs, activation(), 10 * elements * inputs[0].element_size() + 3 * elements // 8
    )


def _seconds(function: Callable[[], object]) -> float:
    """Median time of a call, the device's work included."""
    from torch.utils.benchmark import Timer  # slow to import, and only wanted here

    function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=MEASURED_SECONDS).median


def _compiled_seconds(problem: Problem) -> tuple[float | None, str]:
    """The same for the compiled forward and its backward; None and a note where they don't compile here."""
    torch.compiler.reset()
    try:
        return problem.seconds(torch.compile(problem.eager, dynamic=False)), ""
    except Exception as error:  # a compiler that is missing is no fault of this package
        return None, f"torch.compile failed: {type(error).__name__}"


def _copy_seconds(moved_bytes: int, device: torch.device) -> float:
    source = torch.empty(moved_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source))
