"""Which gateways were rejected and wait to be told that a slot is free, and the oldest request that found no blocks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shared.instance.admission import BlockNeeds
from shared.messages.serving import RejectionReason

OLDEST_EXPIRES_S = 2.0
"""For so long the oldest request without blocks is remembered after it has asked last."""
OLDEST_RETURNS_WITHIN_S = 0.25
"""Once its gateway was told that it would be accepted, it asks within this time, or has gone elsewhere."""
GATEWAY_EXPIRES_S = 60.0
MAX_GATEWAYS = 1000

NO_CAPACITY: frozenset[RejectionReason] = frozenset({"no_slot", "busy", "no_blocks"})
"""A gateway that is rejected for one of these reasons is told when its request would be accepted."""


@dataclass(frozen=True, slots=True)
class RejectedRequest:
    """An attempt at a request that was rejected for lack of capacity.

    Args:
        request_id: of the attempt, as in `Ask`.
        arrived_at: when its gateway received it (monotonic seconds here).
        needs: the blocks that it needs, as far as it was rejected for these.
        num_uncomputed_tokens: how many tokens of its prompt would be computed here.
        rejected_at: when it was rejected (monotonic seconds).
    """

    request_id: str
    gateway_id: str
    arrived_at: float
    needs: BlockNeeds
    num_uncomputed_tokens: int
    rejected_at: float

    @property
    def request(self) -> str:
        """Returns the request, whichever attempt it is."""
        return _request_of(self.request_id)


def _request_of(attempt_id: str) -> str:
    """Returns the request of an attempt, whose id is `<request>.<attempt>`."""
    request, _, attempt = attempt_id.rpartition(".")
    return request if request and attempt.isdecimal() else attempt_id


def _least(request: RejectedRequest, before: RejectedRequest) -> RejectedRequest:
    """Returns a request that would be accepted as soon as one of the two would be."""
    if request.request == before.request:
        return request
    return replace(
        request,
        arrived_at=min(request.arrived_at, before.arrived_at),
        needs=min(request.needs, before.needs, key=lambda needs: needs.now),
        num_uncomputed_tokens=min(request.num_uncomputed_tokens, before.num_uncomputed_tokens),
    )


class Rejections:
    """Remembers one rejected request for each gateway, and the oldest of all that were rejected for lack of blocks."""

    def __init__(self) -> None:
        self._by_gateway: dict[str, RejectedRequest] = {}
        """Gateways in the order in which they are told."""
        self._oldest: RejectedRequest | None = None
        self._oldest_expires_at = 0.0
        self._oldest_is_told = False
        """Whether its gateway was told, since it has asked last, that it would be accepted."""

    def __len__(self) -> int:
        """Returns how many gateways wait to be told."""
        return len(self._by_gateway)

    def add(self, request: RejectedRequest, reason: RejectionReason) -> None:
        """Remembers a request that was rejected for lack of capacity.

        Of several requests of a gateway, the least that any of them needs: the gateway is told as soon as one of them
        may be accepted. A gateway keeps its place in the order.
        """
        before = self._by_gateway.get(request.gateway_id)
        self._by_gateway[request.gateway_id] = request if before is None else _least(request, before)
        if len(self._by_gateway) > MAX_GATEWAYS:
            del self._by_gateway[next(iter(self._by_gateway))]
        if reason != "no_blocks":
            return
        oldest = self.oldest(request.rejected_at)
        if oldest is None or oldest.request == request.request or request.arrived_at < oldest.arrived_at:
            self._oldest = request
            self._oldest_is_told = False
            self._oldest_expires_at = request.rejected_at + OLDEST_EXPIRES_S

    def oldest(self, now: float) -> RejectedRequest | None:
        """Returns the oldest request without blocks, unless it should have asked again by now."""
        if now > self._oldest_expires_at:
            self._oldest = None
        return self._oldest

    def older_than(self, request_id: str, arrived_at: float, now: float) -> RejectedRequest | None:
        """Returns the oldest request without blocks if a request must not delay it: if that is another and older."""
        oldest = self.oldest(now)
        if oldest is None or oldest.request == _request_of(request_id) or oldest.arrived_at > arrived_at:
            return None
        return oldest

    def remove_request(self, request_id: str) -> None:
        """Forgets a request of which an attempt was accepted or cancelled, perhaps a later one than was rejected."""
        if self._oldest is not None and self._oldest.request == _request_of(request_id):
            self._oldest = None

    def remove_gateway(self, gateway_id: str) -> None:
        """Forgets a gateway that is dead."""
        self._by_gateway.pop(gateway_id, None)
        if self._oldest is not None and self._oldest.gateway_id == gateway_id:
            self._oldest = None

    def expire(self, now: float) -> None:
        """Forgets what was rejected long ago."""
        self.oldest(now)
        for gateway_id, request in list(self._by_gateway.items()):
            if now - request.rejected_at > GATEWAY_EXPIRES_S:
                del self._by_gateway[gateway_id]

    def next_gateway(self, would_accept: Callable[[RejectedRequest], bool], now: float) -> str | None:
        """Returns the gateway to tell now, and removes it; None while no rejected request would be accepted.

        The gateway of the oldest request without blocks comes first, also if it was told of a smaller one before. If
        that request does not return, it has gone elsewhere, and keeps nobody out any more. Then comes each in turn.
        """
        oldest = self.oldest(now)
        if oldest is not None and not self._oldest_is_told and would_accept(oldest):
            self._by_gateway.pop(oldest.gateway_id, None)
            self._oldest_is_told = True
            self._oldest_expires_at = min(self._oldest_expires_at, now + OLDEST_RETURNS_WITHIN_S)
            return oldest.gateway_id
        found = next((one for one, request in self._by_gateway.items() if would_accept(request)), None)
        if found is not None:
            del self._by_gateway[found]
        return found
