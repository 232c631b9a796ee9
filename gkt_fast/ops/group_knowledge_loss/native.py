"""Hands `group_knowledge_loss` to its C++ and CUDA kernels: addresses, strides, options in the order of the ABI."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..native import DTYPES, check_capability, cuda_stream
from .checks import check_class_indices
from .problem import Problem

__all__ = ["CppBackend", "CudaBackend"]


class CppBackend:
    """The C++ kernel of a native module."""

    def __init__(self, native: ModuleType) -> None:
        self._native = native

    def forward(
        self,
        problem: Problem,
        logits: Tensor,
        targets: Tensor,
        full_logits: Tensor | None,
        loss: Tensor,
        terms: Tensor,
        gradient: Tensor | None,
        full_gradient: Tensor | None,
    ) -> None:
        targets = _readable(targets, loss)
        parameters = _parameters(self._native, problem, logits, targets, loss, terms, gradient)
        self._native.group_knowledge_loss_cpu(parameters, torch.get_num_threads())


class CudaBackend:
    """The CUDA kernel of a native module, on torch's current stream."""

    def __init__(self, native: ModuleType) -> None:
        self._native = native
        self._architectures = str(native.build_info()["cuda_architectures"])

    def forward(
        self,
        problem: Problem,
        logits: Tensor,
        targets: Tensor,
        full_logits: Tensor | None,
        loss: Tensor,
        terms: Tensor,
        gradient: Tensor | None,
        full_gradient: Tensor | None,
    ) -> None:
        options = problem.options
        if logits.is_cuda:  # CUDA on the host takes CPU tensors
            check_capability(self._architectures, logits.device.index)
        with torch.cuda.device_of(logits):
            targets = _readable(targets, loss)
            parameters = _parameters(self._native, problem, logits, targets, loss, terms, gradient)
            rows = logits.new_full((), logits[0].numel() // logits.shape[2], dtype=torch.float64)
            if targets.is_floating_point():
                ce_rows = rows
            else:
                check_class_indices(targets, logits.shape[2], options.ignore_index)
                ce_rows = (targets != options.ignore_index).sum(dtype=torch.float64)
            counted_rows = torch.stack([ce_rows, rows if options.distill_ignored else ce_rows])
            partials = rows.new_empty((self._native.max_partials, logits.shape[0] + 1))
            self._native.group_knowledge_loss_cuda(
                parameters, counted_rows.data_ptr(), partials.data_ptr(), cuda_stream(logits)
            )


def _readable(targets: Tensor, loss: Tensor) -> Tensor:
    """Targets as the kernels read them; they must live until the kernel is launched."""
    return targets.to(loss.dtype) if targets.is_floating_point() else targets


def _parameters(
    native: ModuleType,
    problem: Problem,
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    terms: Tensor,
    gradient: Tensor | None,
) -> Any:
    o = problem.options
    return native.GroupKnowledgeLossParams(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        logits.shape,
        logits.stride(),
        0 if gradient is None else gradient.data_ptr(),
        (logits if gradient is None else gradient).stride(),
        targets.data_ptr(),
        targets.stride(),
        targets.is_floating_point(),
        loss.data_ptr(),
        terms.data_ptr(),
        o.groups,
        o.ema,
        o.temperature,
        o.normalize_logits,
        o.eps,
        o.ce_weight,
        o.kd_weight,
        o.subnet_ce_weight,
        o.ignore_index,
        o.label_smoothing,
        o.distill_ignored,
        problem.gradient_scale,
    )
