"""What an instance accepts; pure."""

from dataclasses import replace

import pytest

from shared.instance.admission import (
    BlockNeeds,
    BlockSupply,
    InstanceFacts,
    RequestFacts,
    block_rejection,
    costs_nothing,
    has_room,
    rejection,
)
from shared.messages.serving import RejectionReason

REQUEST = RequestFacts(epoch=1, fingerprint="f", is_known=False, expires_in_s=50.0, is_prompt=True)
INSTANCE = InstanceFacts(epoch=1, fingerprint="f", draining=False, slots_free=1, tokens_free=1)


def test_it_accepts_what_it_can_start() -> None:
    assert rejection(REQUEST, INSTANCE) is None


@pytest.mark.parametrize(
    ("request_change", "instance_change", "reason"),
    [
        ({}, {"draining": True}, "draining"),
        ({"epoch": 0}, {}, "wrong_epoch"),
        ({}, {"epoch": 2}, "wrong_epoch"),
        ({"fingerprint": "g"}, {}, "wrong_model"),
        ({"is_known": True}, {}, "duplicate"),
        ({"expires_in_s": 0.0}, {}, "expired"),
        ({}, {"slots_free": 0}, "no_slot"),
        ({}, {"tokens_free": 0}, "busy"),
        ({"is_prompt": False}, {"tokens_free": 0}, None),
    ],
)
def test_it_rejects(
    request_change: dict[str, object], instance_change: dict[str, object], reason: RejectionReason | None
) -> None:
    changed = replace(REQUEST, **request_change), replace(INSTANCE, **instance_change)  # type: ignore[arg-type]
    assert rejection(*changed) == reason


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (BlockNeeds(alone=4, now=4), None),
        (BlockNeeds(alone=5, now=5), "no_blocks"),
        (BlockNeeds(alone=11, now=1), "too_long"),
    ],
)
def test_it_rejects_what_it_has_no_blocks_for(needs: BlockNeeds, reason: RejectionReason | None) -> None:
    assert block_rejection(needs, BlockSupply(total=10, free=4)) == reason


@pytest.mark.parametrize(
    ("needs", "supply", "has"),
    [
        # Everybody fits in at worst.
        (BlockNeeds(alone=6, now=2, more=4), BlockSupply(total=20, free=12, more=6, next_step=6), True),
        # Not at worst, but for now, and everybody can grow once.
        (BlockNeeds(alone=7, now=2, more=5), BlockSupply(total=20, free=12, more=6, next_step=6), True),
        (BlockNeeds(alone=7, now=2, more=5), BlockSupply(total=20, free=12, more=60, next_step=10), True),
        # It would take what those that are held need next.
        (BlockNeeds(alone=7, now=3, more=4), BlockSupply(total=20, free=12, more=60, next_step=10), False),
        # Somebody waits for room.
        (
            BlockNeeds(alone=7, now=2, more=5),
            BlockSupply(total=20, free=12, more=60, next_step=10, is_short=True),
            False,
        ),
        # What is shared costs nothing.
        (BlockNeeds(alone=20, now=0), BlockSupply(total=20, free=0), True),
    ],
)
def test_room(needs: BlockNeeds, supply: BlockSupply, has: bool) -> None:
    assert has_room(needs, supply) is has


@pytest.mark.parametrize(
    ("younger", "releases", "expected"),
    [
        # It takes no block.
        (0, [], True),
        # The older request needs 10 of the 4 that are free: whatever is taken makes it wait for more.
        (1, [3, 3, 3], False),
        # It waits for the largest request, as the others together are not enough.
        (1, [9, 1, 2], True),
        (3, [9, 1, 2], True),
        # As above, but then too few are free when the largest is released.
        (4, [9, 1, 2], False),
        # It need not wait for the largest request: the others together are enough.
        (1, [9, 4, 2], False),
    ],
)
def test_a_younger_request_may_not_delay_an_older_one(younger: int, releases: list[int], expected: bool) -> None:
    supply = BlockSupply(total=20, free=4)
    needs, older = BlockNeeds(alone=younger, now=younger), BlockNeeds(alone=10, now=10)
    assert costs_nothing(needs, older, supply, releases, step_blocks=0) is expected


def test_a_younger_request_may_have_what_the_older_one_leaves() -> None:
    supply = BlockSupply(total=20, free=12)
    older = BlockNeeds(alone=10, now=10)
    assert costs_nothing(BlockNeeds(alone=2, now=2), older, supply, [], step_blocks=0)
    assert not costs_nothing(BlockNeeds(alone=3, now=3), older, supply, [], step_blocks=0)


def test_growth_of_a_younger_request_counts() -> None:
    supply = BlockSupply(total=20, free=12)
    older = BlockNeeds(alone=10, now=4, more=6)
    assert costs_nothing(BlockNeeds(alone=8, now=2, more=6), older, supply, [], step_blocks=2)
    assert not costs_nothing(BlockNeeds(alone=8, now=2, more=6), older, replace(supply, next_step=5), [], step_blocks=2)
