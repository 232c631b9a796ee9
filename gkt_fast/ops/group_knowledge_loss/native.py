"""Hands `group_knowledge_loss` to its C++ and CUDA kernels: addresses, strides, options in the order of the ABI."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..native import DTYPES, check_capability, cuda_stream
from .class_indices import report_on
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
        parameters = _parameters(
            self._native, problem, logits, targets, full_logits, loss, terms, gradient, full_gradient
        )
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
        if logits.is_cuda:  # CUDA on the host takes CPU tensors
            check_capability(self._architectures, logits.device.index)
        with torch.cuda.device_of(logits):
            targets = _readable(targets, loss)
            parameters = _parameters(
                self._native, problem, logits, targets, full_logits, loss, terms, gradient, full_gradient
            )
            size = self._native.group_knowledge_loss_workspace_cuda(parameters)
            workspace = logits.new_empty(size, dtype=torch.uint8)
            self._native.group_knowledge_loss_cuda(
                parameters, workspace.data_ptr(), report_on(logits).data_ptr(), cuda_stream(logits)
            )


def _readable(targets: Tensor, loss: Tensor) -> Tensor:
    """Targets as the kernels read them; they must live until the kernel is launched."""
    return targets.to(loss.dtype) if targets.is_floating_point() else targets


def _parameters(
    native: ModuleType,
    problem: Problem,
    logits: Tensor,
    targets: Tensor,
    full_logits: Tensor | None,
    loss: Tensor,
    terms: Tensor,
    gradient: Tensor | None,
    full_gradient: Tensor | None,
) -> Any:
    o = problem.options
    return native.GroupKnowledgeLossParams(
        DTYPES[logits.dtype],
        _with_gradient(logits, gradient),
        None if full_logits is None else _with_gradient(full_logits, full_gradient),
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


def _with_gradient(logits: Tensor, gradient: Tensor | None) -> tuple[Any, ...]:
    """Logits and their gradient as the bindings take them."""
    return (
        logits.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        logits.shape,
        logits.stride(),
        (logits if gradient is None else gradient).stride(),
    )
