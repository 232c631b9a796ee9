"""A subnet is which residual blocks of a network are kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Stage", "Subnet"]


@dataclass(frozen=True)
class Stage:
    """A run of blocks after one down-sampling.

    Args:
        blocks: module path of every block, in order of execution.
        droppable: for every block, whether it can be dropped (its shape stays the same and it has a skip connection).
    """

    blocks: tuple[str, ...]
    droppable: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks is empty; a stage has at least one block")
        if len(self.blocks) != len(self.droppable):
            raise ValueError(
                f"droppable has {len(self.droppable)} entries; it must have one for each of {len(self.blocks)} blocks"
            )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @functools.cached_property
    def least_depth(self) -> int:
        """The smallest depth of an ordered subnet: blocks up to the last one that can't be dropped."""
        return max((i + 1 for i, droppable in enumerate(self.droppable) if not droppable), default=0)


@dataclass(frozen=True)
class Subnet:
    """Which blocks are kept.

    Args:
        keep: one tuple per stage, one bool per block.
    """

    keep: tuple[tuple[bool, ...], ...]

    @classmethod
    def full(cls, stages: Sequence[Stage]) -> Subnet:
        """The network itself."""
        return cls(tuple((True,) * stage.depth for stage in stages))

    @classmethod
    def ordered(cls, depths: Sequence[int], stages: Sequence[Stage]) -> Subnet:
        """The first `depths[i]` blocks of stage i.

        Raises:
            TypeError: depths is not a sequence of integers.
            ValueError: the depths don't fit the stages, or drop a block that can't be dropped.
        """
        if not isinstance(depths, Sequence) or not all(isinstance(depth, int) for depth in depths):
            raise TypeError(f"depths is {depths!r}; it must be a sequence of integers, one for each stage")
        depths = tuple(depths)
        if len(depths) != len(stages):
            raise ValueError(f"depths is {depths}; it must have one entry for each of {len(stages)} stages")
        for i, (depth, stage) in enumerate(zip(depths, stages, strict=True)):
            if not stage.least_depth <= depth <= stage.depth:
                raise ValueError(
                    f"depths is {depths}; its entry {i} must be between {stage.least_depth} and {stage.depth}"
                )
        return cls(tuple((True,) * d + (False,) * (s.depth - d) for d, s in zip(depths, stages, strict=True)))

    @classmethod
    def of(cls, depths: Subnet | Sequence[int], stages: Sequence[Stage]) -> Subnet:
        """The ordered subnet of these depths; a subnet as it is.

        Raises:
            ValueError, TypeError: the depths don't fit the stages (see `ordered`).
        """
        return depths if isinstance(depths, Subnet) else cls.ordered(depths, stages)

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks kept in each stage."""
        return tuple(sum(stage) for stage in self.keep)

    @property
    def is_full(self) -> bool:
        """Whether every block is kept."""
        return all(map(all, self.keep))

    @property
    def is_ordered(self) -> bool:
        """Whether the kept blocks of every stage are its first ones."""
        return all(stage == tuple(sorted(stage, reverse=True)) for stage in self.keep)

    def is_within(self, other: Subnet) -> bool:
        """Whether every block kept here is kept in `other` too."""
        pairs = zip(self.keep, other.keep, strict=True)
        return all(not mine or theirs for a, b in pairs for mine, theirs in zip(a, b, strict=True))

    def dropped(self, stages: Sequence[Stage]) -> frozenset[str]:
        """Module paths of the blocks that are not kept.

        Raises:
            ValueError: the masks don't fit the stages, or drop a block that can't be dropped.
        """
        if tuple(map(len, self.keep)) != tuple(stage.depth for stage in stages):
            raise ValueError(
                f"keep has masks of lengths {tuple(map(len, self.keep))}; "
                f"the model's stages have {tuple(stage.depth for stage in stages)} blocks"
            )
        dropped = []
        for mask, stage in zip(self.keep, stages, strict=True):
            for kept, path, droppable in zip(mask, stage.blocks, stage.droppable, strict=True):
                if not kept and not droppable:
                    raise ValueError(
                        f"keep drops block {path!r}, which changes shape or has no skip connection"
                    )
                if not kept:
                    dropped.append(path)
        return frozenset(dropped)

    def __str__(self) -> str:
        if self.is_ordered:
            return "-".join(map(str, self.depths))
        return "/".join("".join("x" if kept else "." for kept in stage) for stage in self.keep)
