"""The streams of a step, and which loop and group each belongs to.

Stream 0 is the full network's. Subnets follow loop by loop, in each loop group by group: (loop 1, group 1), ...,
(loop 1, group G), (loop 2, group 1), ..., (loop L, group G). Where a chain goes over steps (chain="steps"), a step has
a single subnet, of the group `first_group`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import GKTConfig
from .subnet import Stage, Subnet

__all__ = ["Place", "Streams", "first_group", "make_streams", "place_of", "stream_at"]


class Place(NamedTuple):
    """Where a subnet's stream stands.

    Args:
        loop: 1 to L.
        group: 1 to G.
    """

    loop: int
    group: int


def place_of(stream: int, groups: int) -> Place:
    """The loop and group of a subnet's stream, 1 to L * G."""
    loop, group = divmod(stream - 1, groups)
    return Place(loop + 1, group + 1)


def stream_at(loop: int, group: int, groups: int) -> int:
    """The inverse of `place_of`."""
    return 1 + (loop - 1) * groups + group - 1


def first_group(config: GKTConfig, step: int) -> int:
    """The group of the first subnet of a step."""
    return step % config.groups + 1 if config.chain == "steps" and config.groups else 1


@dataclass(frozen=True)
class Streams:
    """The streams of a step.

    Args:
        dropped: for each the paths of the blocks that it drops, the full network (none) first. A single stream may be
            a subnet.
        config: the hyper-parameters.
        resolutions: height and width that each subnet's images are resized to; empty: as they are.
        criterion: what logits lose on the targets, if that is not cross entropy.
        first_group: of the first subnet.
        past: knowledge="dataset": what each group knows of the batch's rows from earlier steps, as
            `GroupKnowledge` takes it; None: knowledge is of this batch.
    """

    dropped: tuple[frozenset[str], ...]
    config: GKTConfig
    resolutions: tuple[int, ...] = ()
    criterion: Callable[[Any, Any], Any] | None = None
    first_group: int = 1
    past: Mapping[int, Any] | None = None

    def group(self, stream: int) -> int:
        """The group of a subnet's stream, 1 to G."""
        return self.first_group - 1 + place_of(stream, self.config.step_groups).group

    @property
    def all_update_statistics(self) -> bool:
        """Whether every stream updates BatchNorm's running statistics, or the full network's alone."""
        return self.config.batch_norm == "all_streams"


def make_streams(
    subnets: Sequence[Subnet],
    stages: Sequence[Stage],
    config: GKTConfig,
    resolutions: Sequence[int] = (),
    criterion: Callable[[Any, Any], Any] | None = None,
    first_group: int = 1,
) -> Streams:
    """The streams of a step with these subnets, led by the full network's where it is trained.

    Raises:
        ValueError: a subnet doesn't fit the stages, or drops a block that can't be dropped.
    """
    dropped = tuple(subnet.dropped(stages) for subnet in subnets)
    full = (frozenset(),) if config.train_full else ()
    return Streams((*full, *dropped), config, tuple(resolutions), criterion, first_group)
