"""Who is given up when requests that grow find no room: the youngest. Pure.

A request that is given up is computed again elsewhere, from its prompt and all tokens so far; it keeps its age, so that
in the end it is the oldest, and is not given up any more.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestAge:
    """A request that is held, and when (monotonic seconds) a gateway took it in."""

    arrived_at: float
    request_id: str
    waits: bool
    """For room to grow."""
    is_ending: bool


def next_victim(held: Collection[RequestAge]) -> str | None:
    """The id of the request to give up now; None while nobody waits, or somebody is ending: that may be room enough.

    One at a time, as only then it shows how many blocks were nobody else's.
    """
    if any(one.is_ending for one in held) or not any(one.waits for one in held):
        return None
    return max(held, key=lambda one: (one.arrived_at, one.request_id)).request_id
