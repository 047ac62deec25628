"""What an instance accepts; pure."""

from dataclasses import replace

import pytest

from shared.bus.messages import RefusalReason
from shared.instance.admission import InstanceFacts, RequestFacts, refusal

REQUEST = RequestFacts(epoch=1, fingerprint="f", num_blocks=4, is_held=False, deadline=100.0)
INSTANCE = InstanceFacts(epoch=1, fingerprint="f", draining=False, slots_free=1, blocks_free=4, now=50.0)


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
        ({"num_blocks": 5}, {}, "no_blocks"),
    ],
)
def test_it_refuses(
    request_change: dict[str, object], instance_change: dict[str, object], reason: RefusalReason
) -> None:
    assert refusal(replace(REQUEST, **request_change), replace(INSTANCE, **instance_change)) == reason  # type: ignore[arg-type]
