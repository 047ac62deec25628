"""What an instance accepts; pure."""

from dataclasses import replace

import pytest

from shared.instance.admission import (
    BlockNeeds,
    BlockSupply,
    InstanceFacts,
    RequestFacts,
    has_room,
    refusal,
    room_refusal,
)
from shared.messages.serving import RejectionReason

REQUEST = RequestFacts(epoch=1, fingerprint="f", is_held=False, deadline=100.0)
INSTANCE = InstanceFacts(epoch=1, fingerprint="f", draining=False, slots_free=1, now=50.0)


def test_it_accepts_what_it_has_room_for() -> None:
    assert refusal(REQUEST, INSTANCE) is None


@pytest.mark.parametrize(
    ("request_change", "instance_change", "reason"),
    [
        ({}, {"draining": True}, "draining"),
        ({"epoch": 0}, {}, "wrong_epoch"),
        ({}, {"epoch": 2}, "wrong_epoch"),
        ({"fingerprint": "g"}, {}, "wrong_model"),
        ({"is_held": True}, {}, "duplicate"),
        ({"deadline": 50.0}, {}, "expired"),
        ({}, {"slots_free": 0}, "no_slot"),
    ],
)
def test_it_refuses(
    request_change: dict[str, object], instance_change: dict[str, object], reason: RejectionReason
) -> None:
    assert refusal(replace(REQUEST, **request_change), replace(INSTANCE, **instance_change)) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (BlockNeeds(alone=4, now=4), None),
        (BlockNeeds(alone=5, now=5), "no_blocks"),
        (BlockNeeds(alone=11, now=1), "too_long"),
    ],
)
def test_it_refuses_what_it_has_no_room_for(needs: BlockNeeds, reason: RejectionReason | None) -> None:
    assert room_refusal(needs, BlockSupply(total=10, free=4)) == reason


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
