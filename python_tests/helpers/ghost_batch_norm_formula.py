"""What the tests of ghost_batch_norm compare with: selfcheck's formula in float64; and inputs for them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from cuda_host import build
from torch import Tensor

from gkt_fast.ops.ghost_batch_norm.native import CudaBackend
from gkt_fast.selfcheck.formulas import ghost_batch_norm as formula
from helpers.backends import running_on, unavailable

BACKENDS = ["torch", "cpp", "triton", "cuda-host"]
FEW_CHANNELS = 5


def affordable(shape: tuple[int, ...], backend: str, layout: str) -> tuple[int, ...]:
    """The shape; in planes few channels with Triton, whose interpreter runs a program for each, one after the other."""
    if backend == "triton" and layout == "planes":
        return (shape[0], min(shape[1], FEW_CHANNELS), *shape[2:])
    return shape


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; the norm itself where nothing is expected."""
    difference = (actual.double() - expected).norm().item()
    return difference / (expected.norm().item() or 1.0)


def channels_last(x: Tensor) -> Tensor:
    """A copy with neighbouring channels, of any rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make(shape, dtype=torch.float32, layout="planes", seed=0, mean=0.5, std=2.0) -> dict[str, Tensor]:
    """x, weight, bias, residual and the gradient of y, which reach the op as leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tensors = {
        "x": (normal(*shape) * std + mean).to(dtype),
        "weight": normal(shape[1]).to(torch.float64 if dtype == torch.float64 else torch.float32),
        "bias": normal(shape[1]).to(torch.float64 if dtype == torch.float64 else torch.float32),
        "residual": normal(*shape).to(dtype),
        "grad_y": normal(*shape).to(dtype),
    }
    if layout == "channels_last":
        tensors = {name: channels_last(t) if t.dim() > 2 else t for name, t in tensors.items()}
    return tensors


def rows_of_ghosts(rows: int, ghosts: int, lead_rows: int | None) -> list[int]:
    """Rows of each ghost batch."""
    if lead_rows is None:
        return [rows // ghosts] * ghosts
    return [lead_rows, *[(rows - lead_rows) // max(ghosts - 1, 1)] * (ghosts - 1)]


def expected(tensors, ghosts, with_residual=True, **options) -> dict[str, Tensor]:
    """Results and gradients in float64, and grad_y, set to zero where the ReLU is so near its corner that rounding
    decides."""
    leaves = {name: t.detach().double().requires_grad_() for name, t in tensors.items() if name != "grad_y"}
    residual = leaves["residual"] if with_residual else None
    y, mean, var, z = formula(
        leaves["x"], leaves["weight"], leaves["bias"], ghosts, residual=residual, **options
    )
    near = z.detach().abs() < 1e-3
    keep = options.get("keep")
    if keep is not None:
        rows = rows_of_ghosts(z.shape[0], ghosts, options.get("lead_rows"))
        near &= keep.repeat_interleave(torch.tensor(rows)).reshape(-1, *[1] * (z.dim() - 1))
    grad_y = tensors["grad_y"].masked_fill(near, 0) if options.get("relu", True) else tensors["grad_y"]
    y.backward(grad_y.double())
    if not with_residual:
        del leaves["residual"]
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }
    return {"y": y.detach(), "mean": mean.detach(), "var": var.detach(), **gradients, "grad_y": grad_y}


def on_backend(name: str) -> AbstractContextManager[None]:
    """Runs the op on that backend; "cuda-host" is the CUDA source compiled for the CPU."""
    if name == "cuda-host":
        if reason := build.missing_tools():
            unavailable(name, reason)
        build.register("ghost_batch_norm", CudaBackend)
    return running_on("ghost_batch_norm", name)
