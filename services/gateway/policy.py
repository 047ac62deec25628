"""Which instance to ask next. Pure."""

import random
from collections.abc import Iterable, Mapping

from shared.registry.records import InstanceRecord


def order(
    candidates: Iterable[InstanceRecord], num_open: Mapping[str, int], tie: random.Random
) -> list[InstanceRecord]:
    """Candidates in the order in which to ask them: fewest open streams first, ties broken at random.

    Args:
        num_open: this gateway's open streams, by instance id.
        tie: several gateways that see the same should not ask the same instance first.
    """
    return sorted(candidates, key=lambda one: (num_open.get(one.id, 0), tie.random()))


def can_hand_over(fingerprint: str, to: InstanceRecord) -> bool:
    """Whether KV made under `fingerprint` can be used by `to`: same weights, dtype and layout."""
    return to.fingerprint == fingerprint
