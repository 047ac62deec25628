"""Which request holds which blocks of an instance, who waits for more, and who has to go so that another can grow.

It knows neither bus nor engine, and belongs to the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.engine.prefix_cache import Allocation, Match, PrefixCache
from shared.instance.admission import BlockNeeds, BlockSupply, block_rejection, costs_nothing
from shared.instance.preemption import RequestAge, next_victim
from shared.messages.serving import RejectionReason


@dataclass(frozen=True, slots=True)
class Room:
    """What a request is to get: `num_blocks` blocks now, those of `match` among them, and up to `max_blocks` later."""

    match: Match
    num_blocks: int
    max_blocks: int


@dataclass(slots=True, eq=False)
class Reservation:
    """The blocks of one request, `max_blocks` at most, which a gateway took in at `arrived_at` (monotonic seconds)."""

    request_id: str
    arrived_at: float
    max_blocks: int
    allocation: Allocation
    wanted_blocks: int | None = None
    """How many it waits to have, if it does."""
    is_ending: bool = False
    """It will be released soon, and grows no more."""

    @property
    def waits(self) -> bool:
        return self.wanted_blocks is not None and not self.is_ending

    @property
    def blocks_left(self) -> int:
        """How many more it may come to need."""
        return 0 if self.is_ending else self.max_blocks - len(self.allocation.blocks)


class Reservations:
    """All reservations of an instance. Requests grow by `step_blocks` blocks at a time."""

    def __init__(self, cache: PrefixCache, step_blocks: int = 0) -> None:
        self.cache = cache
        self._step_blocks = step_blocks
        self._held: dict[str, Reservation] = {}

    def needs(self, room: Room) -> BlockNeeds:
        """What a request with this room needs."""
        now = self.cache.cost(room.match, room.num_blocks)
        return BlockNeeds(alone=room.max_blocks, now=now, more=room.max_blocks - room.num_blocks)

    def supply(self) -> BlockSupply:
        """What is there for one more request."""
        held = self._held.values()
        return BlockSupply(
            total=self.cache.num_blocks,
            free=self.cache.num_free,
            more=sum(one.blocks_left for one in held),
            next_step=sum(min(one.blocks_left, self._step_blocks) for one in held),
            is_short=any(one.waits for one in held),
        )

    def rejection(self, needs: BlockNeeds, older: BlockNeeds | None = None) -> RejectionReason | None:
        """Returns why a request cannot have its blocks, or None if it can.

        Args:
            older: what the oldest request needs that was rejected for lack of blocks, if it must not be delayed.
        """
        supply = self.supply()
        reason = block_rejection(needs, supply)
        if reason is not None or older is None:
            return reason
        releases = [self.cache.num_freed_by(one.allocation) for one in self._held.values()]
        return None if costs_nothing(needs, older, supply, releases, self._step_blocks) else "no_blocks"

    def reserve(self, request_id: str, arrived_at: float, room: Room, *, is_counted: bool = True) -> Reservation:
        """Hold blocks for a request that admission has accepted. `is_counted` as in `PrefixCache.take`."""
        assert request_id not in self._held, f"{request_id} has a reservation"
        allocation = self.cache.take(room.match, room.num_blocks, is_counted=is_counted)
        assert allocation is not None, "admission has counted the free blocks"
        reservation = Reservation(request_id, arrived_at, room.max_blocks, allocation)
        self._held[request_id] = reservation
        return reservation

    def grow(self) -> list[Reservation]:
        """Give those that wait what they want, the oldest first, as far as there is room; returns who has it now.

        Nobody overtakes an older one.
        """
        waiting = sorted(
            (one for one in self._held.values() if one.waits), key=lambda one: (one.arrived_at, one.request_id)
        )
        grown: list[Reservation] = []
        for one in waiting:
            if one.wanted_blocks is None or not self.cache.extend(one.allocation, one.wanted_blocks):
                break
            one.wanted_blocks = None
            grown.append(one)
        return grown

    def victim(self) -> str | None:
        """The id of the request to give up now, if any, so that others can grow."""
        ages = [RequestAge(one.arrived_at, one.request_id, one.waits, one.is_ending) for one in self._held.values()]
        return next_victim(ages)

    def release(self, reservation: Reservation, token_ids: Sequence[int]) -> None:
        """Let go of a request's blocks. The KV of these leading tokens of it is in them."""
        del self._held[reservation.request_id]
        self.cache.release(reservation.allocation, token_ids)
