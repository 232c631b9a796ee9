"""Class indices out of range: a ValueError on the CPU; elsewhere a note on the device, since reading would stall it.

A kernel that meets such an index makes the loss NaN and writes the index into its device's report. Whoever finds that a
loss was NaN, and waits for the device anyway, asks `wrong_class_index`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["check_class_indices", "report_on", "wrong_class_index"]

_reports: dict[torch.device, Tensor] = {}


def report_on(tensor: Tensor) -> Tensor:
    """The report of the tensor's device: an index out of range and the number of classes, int64 (2,); zeros: none."""
    report = _reports.get(tensor.device)
    if report is None:
        report = _reports[tensor.device] = tensor.new_zeros(2, dtype=torch.int64)
    return report


def wrong_class_index(device: torch.device | str) -> str | None:
    """What was wrong with class indices that kernels met on a device, in words; None: nothing. Waits for the device.

    Each is told once.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    report = _reports.get(device)
    if report is None:
        return None
    index, classes = report.tolist()
    if classes == 0:
        return None
    report.zero_()
    return f"targets has class index {index}; it must lie in [0, {classes}) or equal ignore_index"


def check_class_indices(targets: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets without class indices out of range, and whether there were some: a bool scalar; None where checked.

    Raises:
        ValueError: there are some, on the CPU.
    """
    without_values = targets.device.type == "meta" or isinstance(targets, FakeTensor) or not targets.numel()
    if torch.compiler.is_compiling() or without_values:
        return targets, None
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if targets.device.type != "cpu":
        return _note(targets, wrong, classes)
    if wrong.any():
        raise ValueError(
            f"targets has class index {targets[wrong][0].item()}; it must lie in [0, {classes}) or "
            f"equal ignore_index={ignore_index}"
        )
    return targets, None


def _note(targets: Tensor, wrong: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    any_wrong = wrong.any()
    largest = torch.where(wrong, targets, torch.iinfo(torch.int64).min).amax()
    report = report_on(targets)
    report.copy_(torch.where(any_wrong, torch.stack([largest, torch.full_like(largest, classes)]), report))
    return torch.where(wrong, 0, targets), any_wrong
