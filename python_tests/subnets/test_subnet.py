"""Stages and subnets: depths, masks, which blocks a subnet drops, and what is refused."""

from __future__ import annotations

import pytest

from gkt_fast import Stage, Subnet

STAGES = [
    Stage(("a.0", "a.1", "a.2"), (True, True, True)),
    Stage(("b.0", "b.1"), (False, True)),
    Stage(("c.0", "c.1", "c.2", "c.3"), (True, False, True, True)),
]


def test_stage_depths():
    assert [stage.depth for stage in STAGES] == [3, 2, 4]
    assert [stage.least_depth for stage in STAGES] == [0, 1, 2]
    with pytest.raises(ValueError, match="blocks is empty"):
        Stage((), ())
    with pytest.raises(ValueError, match="droppable has 1 entries; it must have one for each of 2 blocks"):
        Stage(("a", "b"), (True,))


def test_full():
    full = Subnet.full(STAGES)
    assert full.depths == (3, 2, 4) and full.is_ordered
    assert full.dropped(STAGES) == frozenset()
    assert str(full) == "3-2-4"


def test_ordered_keeps_the_first_blocks():
    subnet = Subnet.ordered([1, 1, 3], STAGES)
    assert subnet.keep == ((True, False, False), (True, False), (True, True, True, False))
    assert subnet.depths == (1, 1, 3) and subnet.is_ordered and str(subnet) == "1-1-3"
    assert subnet.dropped(STAGES) == {"a.1", "a.2", "b.1", "c.3"}
    assert Subnet.ordered([0, 1, 2], STAGES).depths == (0, 1, 2)


@pytest.mark.parametrize(
    "depths, message",
    [
        ((1, 1), r"depths is \(1, 1\); it must have one entry for each of 3 stages"),
        ((4, 1, 2), r"depths is \(4, 1, 2\); its entry 0 must be between 0 and 3"),
        ((1, 0, 2), r"entry 1 must be between 1 and 2"),
        ((1, 1, 1), r"entry 2 must be between 2 and 4"),
        ((-1, 1, 2), r"entry 0 must be between"),
    ],
)
def test_depths_that_do_not_fit(depths, message):
    with pytest.raises(ValueError, match=message):
        Subnet.ordered(depths, STAGES)


def test_any_mask():
    subnet = Subnet(((False, True, False), (True, True), (True, True, False, True)))
    assert subnet.depths == (1, 2, 3) and not subnet.is_ordered
    assert subnet.dropped(STAGES) == {"a.0", "a.2", "c.2"}
    assert str(subnet) == ".x./xx/xx.x"


@pytest.mark.parametrize(
    "keep, message",
    [
        (((True,) * 3, (True,) * 2), r"lengths \(3, 2\); the model's stages have \(3, 2, 4\) blocks"),
        (((True,) * 3, (True,) * 3, (True,) * 4), r"lengths \(3, 3, 4\)"),
        (((True,) * 3, (False, True), (True,) * 4), "keep drops block 'b.0', which changes shape"),
    ],
)
def test_masks_that_do_not_fit(keep, message):
    with pytest.raises(ValueError, match=message):
        Subnet(keep).dropped(STAGES)


def test_is_within():
    full, small = Subnet.full(STAGES), Subnet.ordered((1, 1, 2), STAGES)
    odd = Subnet(((False, True, True), (True, True), (True, True, False, True)))
    assert small.is_within(full) and small.is_within(small) and odd.is_within(full)
    assert not full.is_within(small) and not small.is_within(odd) and not odd.is_within(small)


def test_subnets_compare_and_hash():
    subnets = [Subnet.full(STAGES), Subnet.ordered((3, 2, 4), STAGES), Subnet.ordered((1, 1, 2), STAGES)]
    assert len(set(subnets)) == 2
