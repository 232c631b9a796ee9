"""Calls the native kernels of `group_knowledge_loss`: allocates the results, hands over addresses and strides."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..native import DTYPES, cuda_stream, native_module
from .checks import check_class_indices

__all__ = ["load_cpp", "load_cuda"]


def load_cpp() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The C++ kernel as a function of the torch.library op's arguments."""
    native = native_module()

    def forward(logits: Tensor, targets: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
        results = _allocate(logits, with_gradient=options[-2])
        parameters, _keep = _parameters(native, logits, targets, options, *results)
        native.group_knowledge_loss_cpu(parameters, torch.get_num_threads())
        return results

    return forward


def load_cuda(native: ModuleType) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The CUDA kernel of a native module as a function of the torch.library op's arguments."""

    def forward(logits: Tensor, targets: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
        ignore_index, distill_ignored = options[8], options[10]
        with torch.cuda.device_of(logits):
            results = _allocate(logits, with_gradient=options[-2])
            parameters, _keep = _parameters(native, logits, targets, options, *results)
            rows = logits.new_full((), logits[0].numel() // logits.shape[2], dtype=torch.float64)
            if targets.is_floating_point():
                ce_rows = rows
            else:
                check_class_indices(targets, logits.shape[2], ignore_index)
                ce_rows = (targets != ignore_index).sum(dtype=torch.float64)
            counted_rows = torch.stack([ce_rows, rows if distill_ignored else ce_rows])
            partials = rows.new_empty((native.max_partials, logits.shape[0] + 1))
            native.group_knowledge_loss_cuda(
                parameters, counted_rows.data_ptr(), partials.data_ptr(), cuda_stream(logits)
            )
        return results

    return forward


def _allocate(logits: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return logits.new_empty((), dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype), gradient


def _parameters(native, logits, targets, options, loss, terms, gradient) -> tuple[object, Tensor]:
    """The native parameters, and the targets that they point into."""
    probabilities = targets.is_floating_point()
    if probabilities:
        targets = targets.to(loss.dtype)
    *options, with_gradient, gradient_scale = options
    parameters = native.GroupKnowledgeLossParams(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        logits.shape,
        logits.stride(),
        gradient.data_ptr() if with_gradient else 0,
        gradient.stride() if with_gradient else logits.stride(),
        targets.data_ptr(),
        targets.stride(),
        probabilities,
        loss.data_ptr(),
        terms.data_ptr(),
        *options,
        gradient_scale,
    )
    return parameters, targets
