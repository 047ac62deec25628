"""A client for one instance: asking it, how many questions it gets at a time, and the circuit breaker."""

import asyncio
import time

from services.gateway.request import Request
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.circuit_breaker import CircuitBreaker
from shared.errors import NoResponders, PeerUnavailable
from shared.messages.records import InstanceRecord, Role
from shared.messages.serving import MAX_SECONDS, Ask, AskReply, Cancel, Capacity, KVLease, Start

FULL_FIRST_S = 0.02
FULL_MAX_S = 0.2
"""How long a full instance is not asked: longer and longer, unless it says that it has capacity again."""
CAPACITY_FRESH_S = 1.0
INLINE_TOKENS = 512
"""A prompt this short travels with the question: a rejection then costs little more."""
MIN_BLOCK_TOKENS = 8
"""A block of KV has at least so many tokens (`InstanceSettings.block_size`)."""
ANSWER_TIME_ALPHA = 0.1
HEDGE_FACTOR = 4.0
HEDGE_MIN_S = 0.05
HEDGE_MAX_S = 0.5


class InstanceClient:
    """One instance, as this gateway knows it from its answers. Times are monotonic."""

    def __init__(self, bus: Bus, instance_id: str) -> None:
        self._bus = bus
        self.instance_id = instance_id
        self.breaker = CircuitBreaker()
        self.capacity = Capacity()
        self.capacity_at = 0.0
        self.freed_at = 0.0
        self.is_lost = False
        self._full_until = 0.0
        self._full_s = FULL_FIRST_S / 2
        self._answer_s = HEDGE_MIN_S / HEDGE_FACTOR
        self._questions: dict[asyncio.Task[None], int] = {}
        """Questions under way, with the prompt tokens that they are about."""
        self._replies: set[asyncio.Future[AskReply]] = set()

    @property
    def hedge_after_s(self) -> float:
        """After how many seconds without an answer another instance is asked as well."""
        return min(max(HEDGE_FACTOR * self._answer_s, HEDGE_MIN_S), HEDGE_MAX_S)

    def may_be_asked(self, role: Role, now: float) -> bool:
        """Returns whether a question now may well be accepted: as many at a time as there is known capacity for."""
        if self.is_lost or now < self._full_until or not self.breaker.allows(now):
            return False
        if now - self.capacity_at > CAPACITY_FRESH_S:
            return not self._questions
        has_tokens = role == "decode" or sum(self._questions.values()) < self.capacity.tokens_free
        return not self._questions or (len(self._questions) < self.capacity.slots_free and has_tokens)

    def count_question(self, question: asyncio.Task[None], num_tokens: int) -> None:
        """Counts a question from before it is sent until it or its task has ended."""
        self._questions[question] = num_tokens
        question.add_done_callback(self.question_ended)

    def question_ended(self, question: asyncio.Task[None]) -> None:
        self._questions.pop(question, None)

    def accepts_surely(self, role: Role, now: float, num_tokens: int = 0) -> bool:
        """Returns whether a request of `num_tokens` is almost certainly accepted: its work travels with the question.

        Otherwise a rejection would cost as much as the request is long.
        """
        capacity = self.capacity
        if now - self.capacity_at >= CAPACITY_FRESH_S or capacity.slots_free <= 1:
            return False
        if num_tokens > capacity.blocks_free * MIN_BLOCK_TOKENS:
            return False
        starts_next = capacity.tokens_free > 0 and (num_tokens <= capacity.tokens_free or capacity.starts_in_s == 0)
        return role == "decode" or starts_next

    def starts_at(self) -> float:
        """Returns when a prompt that is accepted now would begin to be computed, as far as known."""
        return self.capacity_at + self.capacity.starts_in_s

    async def ask(self, role: Role, ask: Ask, timeout_s: float) -> AskReply:
        """Asks whether the instance accepts a request now.

        Raises:
            NoResponders: the instance is known to be gone; nobody waits for its answer any longer.
            PeerUnavailable: it did not answer in time. It may have accepted: tell it to cancel.
        """
        started_at = time.monotonic()
        self.breaker.started(started_at)
        request = self._bus.request(subjects.instance(self.instance_id, role), ask, AskReply, timeout_s=timeout_s)
        asking = asyncio.ensure_future(request)
        self._replies.add(asking)
        try:
            reply = await asking
        except asyncio.CancelledError:
            if self.is_lost and asking.cancelled():
                raise NoResponders(f"{self.instance_id} is gone") from None
            raise
        except NoResponders:
            raise
        except PeerUnavailable:
            if self._bus.connected:  # else the silence says nothing about the instance
                self.breaker.failed(time.monotonic(), started_at)
            raise
        finally:
            asking.cancel()
            self._replies.discard(asking)
        if self.is_lost:
            raise NoResponders(f"{self.instance_id} is gone")
        self._answer_s += ANSWER_TIME_ALPHA * (time.monotonic() - started_at - self._answer_s)
        self._learn(reply.capacity)
        if not reply.accepted:
            self.breaker.probe_until = 0.0
        return reply

    def full(self) -> None:
        """Notes that the instance rejects everything for now."""
        self._full_s = min(2 * self._full_s, FULL_MAX_S)
        self._full_until = time.monotonic() + self._full_s

    def freed(self, capacity: Capacity) -> None:
        """Notes that the instance would accept requests again."""
        self._learn(capacity)
        self.freed_at = time.monotonic()
        self._full_until, self._full_s = 0.0, FULL_FIRST_S / 2

    def lost(self) -> None:
        """Ends all waiting for its answers."""
        self.is_lost = True
        self.capacity_at = 0.0
        for asking in self._replies:
            asking.cancel()

    async def start(self, start: Start) -> None:
        """Sends the work of an accepted question."""
        await self._bus.publish(subjects.instance(self.instance_id, "start"), start)

    async def cancel(self, attempt_id: str) -> None:
        await self._bus.publish(subjects.instance(self.instance_id, "cancel"), Cancel(request_ids=[attempt_id]))

    def _learn(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.capacity_at = time.monotonic()


def question(
    request: Request, record: InstanceRecord, gateway_id: str, lease: KVLease | None, start: Start | None
) -> Ask:
    """Returns the facts about a request that an instance decides by, and perhaps the work itself."""
    now = time.monotonic()
    return Ask(
        request_id=request.attempt_id,
        gateway_id=gateway_id,
        epoch=record.epoch,
        fingerprint=record.fingerprint,
        num_tokens=len(request.token_ids),
        num_prompt_tokens=len(request.prompt_token_ids),
        max_tokens=request.sampling.max_tokens,
        age_s=min(max(0.0, now - request.arrived_at), MAX_SECONDS),
        expires_in_s=min(max(0.0, request.deadline - now), MAX_SECONDS),
        prefix_keys=request.prefix_keys,
        lease=lease,
        start=start,
    )
