"""`knowledge="dataset"`: what groups know of every training sample, over steps and epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import gather_rows, rank
from ..ops import Past
from ..subnets.streams import Streams

__all__ = ["GroupKnowledgeMemory"]

DTYPES = (torch.float16, torch.float32, torch.float64)


class GroupKnowledgeMemory:
    """What group 1 to G - 1 know of every training sample; the last group teaches nobody.

    Knowledge is what the loss calls n(z): logits, standardised with `normalize_logits=True`. Attached to a `GKT` as
    `gkt.memory`, it is read and written in every training step at the indices of the batch's samples (reconstructed):

    - Before the step it is read: K_g[i] of the batch's samples. Within the step K_g moves on stream by stream: a
      subnet of group g is taught by K_{g-1} as it stands then (K_0 is this step's full network), and makes K_g
      `ema * K_g + (1 - ema) * n(z)`, or n(z) where the group knew nothing. With chain="step" a subnet's teacher so
      holds the subnet of the group above that ran before it in this step; with chain="steps" it is from earlier steps.
      A sample of which the group above knows nothing is taught by this step's full network.
    - After the step it is written, once, for the rows that the subnets saw. A sample that stands in several rows, of
      one rank or of several, gets the mean of what the rows came to. Ranks exchange their rows, so that every rank
      holds the same: in a distributed run, every rank must train on as many batches (the host waits for the ranks'
      numbers of rows once a step).
    - A row that isn't finite in the memory's dtype is left out; its sample keeps what was known of it. What was learnt
      stays when the optimizer skips the step (float16's loss scaling, `skip_nonfinite`): it is what the network said.
      With gradient accumulation every batch writes what it ran.

    It isn't part of a module's state_dict; `GKTTrainer` keeps it in its checkpoints, other loops save `state_dict()`.
    Copies and pickles hold the values in memory.

    Args:
        samples: number of training samples; indices are 0 to samples - 1.
        classes: number of classes; None: as the first logits have.
        groups: the configuration's number of groups, G >= 2.
        dtype: of the values: float16, float32 or float64. They are computed with in float32 at least.
        path: file that holds the values, mapped into memory; of rank r > 0 with ".rankR" behind it. A file of the same
            size is replaced, since what goes on after a resume comes from the checkpoint. None: they are in memory.
        device: where the values are; with a path it must be the CPU.

    Raises:
        ValueError, TypeError: an argument is out of its range, or of the wrong type.
    """

    def __init__(
        self,
        samples: int,
        classes: int | None,
        groups: int,
        dtype: torch.dtype = torch.float16,
        path: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (("samples", samples, 1), ("classes", classes, 2), ("groups", groups, 2)):
            if value is None and name == "classes":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; it must be an integer")
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(map(str, DTYPES))}")
        self.samples = samples
        self.classes = classes
        self.groups = groups
        self.dtype = dtype
        self.path = None if path is None else Path(path)
        self.device = torch.device(device)
        if self.path is not None and self.device.type != "cpu":
            raise ValueError(f"device is {self.device} with a path; it must be 'cpu'")
        self._values: Tensor | None = None
        """(groups - 1, samples, classes); None: not needed yet."""
        self._known = torch.zeros(groups - 1, samples, dtype=torch.bool, device=self.device)

    @property
    def nbytes(self) -> int | None:
        """Bytes of the values; None: the number of classes is not known yet."""
        if self.classes is None:
            return None
        return (self.groups - 1) * self.samples * self.classes * self.dtype.itemsize

    def known(self, group: int) -> Tensor:
        """(samples,) bool: the samples of which a group, 1 to G - 1, knows anything."""
        return self._known[self._place(group)]

    def knowledge(self, group: int) -> Tensor:
        """(samples, classes): what a group, 1 to G - 1, knows; of samples that it doesn't know, anything.

        Raises:
            ValueError: there is no such group, or the number of classes is not known yet.
        """
        return self._allocated()[self._place(group)]

    def _place(self, group: int) -> int:
        if not 1 <= group < self.groups:
            raise ValueError(f"group is {group}; what is remembered is of group 1 to {self.groups - 1}")
        return group - 1

    def _allocated(self) -> Tensor:
        if self.classes is None:
            raise ValueError("classes is None and no logits were seen yet, so that there is no knowledge")
        if self._values is None:
            shape = (self.groups - 1, self.samples, self.classes)
            if self.path is None:
                self._values = torch.zeros(shape, dtype=self.dtype, device=self.device)
            else:
                self._values = _mapped(self._file(), shape, self.dtype)
        return self._values

    def _file(self) -> Path:
        return self.path if rank() == 0 else self.path.with_name(f"{self.path.name}.rank{rank()}")

    def read(self, indices: Tensor, streams: Streams) -> dict[int, Past | None]:
        """What the groups that a step visits, and the one above them, know of a batch's samples.

        Args:
            indices: (B,) int64.
            streams: of the step.

        Raises:
            ValueError: an index is out of range. On a GPU that is a device-side assertion, since reading it there would
                stall the device.
        """
        indices = indices.to(self.device, non_blocking=True)
        self._check(indices)
        read, _ = self._visited(streams)
        if self._values is None:
            return dict.fromkeys(read)
        return {g: Past(self._values[g - 1, indices], self._known[g - 1, indices]) for g in read}

    def _check(self, indices: Tensor) -> None:
        wrong = (indices < 0) | (indices >= self.samples)
        if wrong.device.type != "cpu":
            torch._assert_async(~wrong.any())
        elif wrong.any():
            raise ValueError(
                f"indices has {indices[wrong][0].item()}; it must lie in [0, {self.samples}), as the memory is for "
                f"{self.samples} samples"
            )

    def _visited(self, streams: Streams) -> tuple[range, range]:
        """The groups that a step reads, and those that it writes."""
        first, last = streams.first_group, streams.first_group + streams.config.step_groups - 1
        stored = self.groups - 1
        return range(max(first - 1, 1), min(last, stored) + 1), range(first, min(last, stored) + 1)

    @torch.no_grad()
    def write(self, indices: Tensor, learnt: Mapping[int, Tensor]) -> None:
        """Puts down what a step came to. Collective: every rank of a distributed run must call it.

        Args:
            indices: (B,) int64.
            learnt: by group, (m, C): of the first m <= B samples. That of the last group is left aside.

        Raises:
            ValueError: the number of classes is another than before.
        """
        stored = {group: knowledge for group, knowledge in learnt.items() if group < self.groups}
        if not stored:
            return
        joined = torch.stack([*stored.values()], dim=1).to(self.device)  # (m, groups, C)
        if self.classes not in (None, joined.shape[2]):
            raise ValueError(f"logits have {joined.shape[2]} classes; the memory has {self.classes}")
        self.classes = joined.shape[2]
        values, known = self._allocated(), self._known
        indices = gather_rows(indices[: len(joined)].to(self.device, non_blocking=True))
        mean, found = _mean_by_index(gather_rows(joined), indices, self.dtype)
        for place, group in enumerate(stored):
            old = values[group - 1, indices]
            # A sample that stands in several rows gets the same from each.
            values[group - 1, indices] = torch.where(found[:, place, None], mean[:, place], old)
            known[group - 1, indices] |= found[:, place]

    def describe(self, streams: Streams) -> str:
        """Its size, and what a step moves, in words."""
        size = "as many as the first logits have" if self.classes is None else f"{self.classes}"
        where = f"on {self.device}" if self.path is None else f"in {self._file()}"
        text = f"knowledge of {self.samples} samples: {self.groups - 1} groups, classes: {size}, {self.dtype}, {where}"
        if self.nbytes is None:
            return text
        moved = sum(map(len, self._visited(streams))) * self.classes * self.dtype.itemsize
        return (
            f"{text}, {self.nbytes / 2**20:.2f} MiB; the step reads and writes {moved} bytes of it per sample"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything, also of a mapped file: plain values and tensors, which are not copied."""
        return {
            "samples": self.samples,
            "classes": self.classes,
            "groups": self.groups,
            "dtype": str(self.dtype),
            "values": self._values,
            "known": self._known,
        }

    def misfit(self, state: Mapping[str, Any]) -> str | None:
        """Why a saved state isn't one of this memory, in words; None: it is."""
        for name in ("samples", "groups", "classes", "dtype"):
            saved, own = state[name], getattr(self, name)
            if name == "classes" and None in (saved, own):
                continue
            if saved != (str(own) if name == "dtype" else own):
                return f"a memory of group knowledge with {name}={saved}; here it has {name}={own}"
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: it is of another memory; nothing was changed.
        """
        misfit = self.misfit(state)
        if misfit is not None:
            raise ValueError(f"state is of {misfit}")
        if state["classes"] is not None:
            self.classes = state["classes"]
        self._known.copy_(state["known"])
        if state["values"] is not None:
            self._allocated().copy_(state["values"])

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> GroupKnowledgeMemory:
        """A memory, on a device, as it was saved."""
        dtype = next(dtype for dtype in DTYPES if str(dtype) == state["dtype"])
        memory = cls(state["samples"], state["classes"], state["groups"], dtype, device=device)
        memory.load_state_dict(state)
        return memory

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"path": None}  # a copy that wrote into the same file would change both

    def __repr__(self) -> str:
        return (
            f"GroupKnowledgeMemory(samples={self.samples}, classes={self.classes}, groups={self.groups}, "
            f"dtype={self.dtype}, path={None if self.path is None else str(self.path)!r}, device='{self.device}')"
        )


def _mean_by_index(values: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For every row the mean over the rows of its index that are finite, and whether there is any.

    Args:
        values: (n, groups, C).
        indices: (n,) int64.
        dtype: in which rows must be finite, and of the mean.

    Returns:
        (n, groups, C) and (n, groups) bool.
    """
    finite = values.to(dtype).isfinite().all(2, keepdim=True)
    order = indices.argsort(stable=True)
    begins = indices[order].diff(prepend=indices[order[:1]]) != 0
    place = torch.empty_like(order)
    place[order] = begins.cumsum(0)  # the same number for the rows of an index
    wide = torch.where(finite, values, 0.0).double()
    sums = torch.zeros_like(wide).index_add_(0, place, wide)
    counts = torch.zeros_like(wide[:, :, :1]).index_add_(0, place, finite.double())
    mean, found = (sums / counts.clamp(min=1.0)).to(dtype), counts[:, :, 0] > 0
    return mean[place], found[place]


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a new file, mapped into memory.

    Raises:
        ValueError: there is something else at the path.
        OSError: the file can't be made, for want of space for instance.
    """
    elements = torch.Size(shape).numel()
    size = elements * dtype.itemsize
    if path.exists():
        if path.stat().st_size != size:
            raise ValueError(
                f"path is {path}, where there is a file of {path.stat().st_size} bytes, and the memory needs {size}: "
                "it is not one of this memory. Remove it, or give another path"
            )
        path.unlink()  # whoever still maps it keeps it
    with open(path, "xb") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is said here, not by a signal in a later step
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype).view(shape)
