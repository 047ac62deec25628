"""The line in which requests wait for a slot of one role: first come, first served, after those whose stream has begun.

Only the head of the line asks: one candidate after another, until one accepts. When all refuse it waits for a hint that
a slot may be free, or a moment, and asks again. So a full system hears a few questions at a time, however long the line
is.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.gateway import policy
from services.gateway.turn import Turn
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.bus.messages import Answer, Cancel, DecodeRequest, PrefillRequest
from shared.errors import RETRY_AFTER_S, InstanceFailed, NoInstance, Overloaded, PeerUnavailable
from shared.registry.records import InstanceRecord, Role
from shared.settings import GatewaySettings

ASK_AGAIN_S = 0.02
ASK_AGAIN_AT_MOST_S = 0.2
"""How long the head waits before it asks again; longer and longer while there is no hint."""
AVOID_S = 1.0
AVOID_AT_MOST_S = 60.0
"""How long an instance that gave no answer is not asked; longer and longer until it gives one."""

log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Wish:
    """What a request stands in line for.

    Attributes:
        request_for: the message for an instance.
        suits: whether an instance may be asked at all.
        holders: gets the id of each instance that may hold something of the request: from before it is asked, and for
            good if it accepts.
        until: when to give up waiting (Unix seconds).
        deadline: the whole request's (Unix seconds), which the instance is told.
        has_begun: its client has tokens already. It is served before newcomers, is never refused for the length of the
            line, and waits for an instance as long as it may.
    """

    request_for: Callable[[InstanceRecord], PrefillRequest | DecodeRequest]
    suits: Callable[[InstanceRecord], bool]
    holders: set[str]
    until: float
    deadline: float
    has_begun: bool


@dataclass(slots=True, frozen=True)
class Accepted:
    """Who accepted, and how many refusals came before."""

    instance: InstanceRecord
    num_refusals: int


class Line:
    """The line for one role's slots."""

    def __init__(
        self,
        bus: Bus,
        role: Role,
        ready: Callable[[Role], list[InstanceRecord]],
        num_open: Callable[[], Mapping[str, int]],
        settings: GatewaySettings,
    ) -> None:
        self._bus = bus
        self._role: Role = role
        self._ready = ready
        self._num_open = num_open
        self._settings = settings
        self._turn = Turn()
        self._hint = asyncio.Event()
        self._avoided: dict[str, tuple[float, float]] = {}
        """By id: until when (monotonic), and for how long in all."""
        self._tie = random.Random()
        self._seen_at = 0.0
        """When an instance that suited whoever asked was last there."""
        self.num_waiting = 0

    def hint(self) -> None:
        """A slot may be free."""
        self._hint.set()

    async def ask(self, wish: Wish) -> Accepted:
        """Waits for a turn, then asks until an instance accepts.

        Raises:
            TimeoutError: none accepted in time.
            NoInstance: for a while no instance that suits has been there at all.
            Overloaded: the line is too long already.
        """
        if self.num_waiting >= self._settings.max_waiting and not wish.has_begun:
            raise Overloaded(
                f"{self.num_waiting} requests wait for a {self._role} slot: try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self.num_waiting += 1
        joined_at = time.monotonic()
        try:
            async with asyncio.timeout(wish.until - time.time()), self._turn.of(0 if wish.has_begun else 1):
                return await self._ask_until_accepted(wish, joined_at)
        finally:
            self.num_waiting -= 1

    async def _ask_until_accepted(self, wish: Wish, joined_at: float) -> Accepted:
        num_refusals = 0
        pause_s = ASK_AGAIN_S
        while True:
            self._hint.clear()
            present = [one for one in self._ready(self._role) if wish.suits(one)]
            self._refuse_if_nobody_is_there(present, wish, joined_at)
            for instance in policy.order(filter(self._is_answering, present), self._num_open(), self._tie):
                if await self._ask(instance, wish):
                    return Accepted(instance, num_refusals)
                num_refusals += 1
            hinted = await self._wait_for_hint(pause_s)
            pause_s = ASK_AGAIN_S if hinted else min(2 * pause_s, ASK_AGAIN_AT_MOST_S)

    def _refuse_if_nobody_is_there(self, present: list[InstanceRecord], wish: Wish, joined_at: float) -> None:
        now = time.monotonic()
        if present:
            self._seen_at = now
        elif not wish.has_begun and now - max(joined_at, self._seen_at) > self._settings.instance_wait_s:
            raise NoInstance(
                f"no {self._role} instance is there that can serve this request: try again", retry_after_s=RETRY_AFTER_S
            )

    async def _ask(self, instance: InstanceRecord, wish: Wish) -> bool:
        """Whether the instance accepts. One that gave no answer in time may have accepted: it is told to cancel."""
        subject = subjects.instance(instance.id, self._role)
        request = wish.request_for(instance)
        timeout_s = self._settings.answer_timeout_s
        wish.holders.add(instance.id)
        try:
            answer = await self._bus.request(subject, request, Answer, timeout_s=timeout_s, deadline=wish.deadline)
        except PeerUnavailable as error:
            log.warning("%s", error)
            self._avoid(instance.id)
            wish.holders.discard(instance.id)
            cancel = Cancel(request_ids=[request.request_id])
            await self._bus.publish(subjects.instance(instance.id, "cancel"), cancel)
            return False
        self._avoided.pop(instance.id, None)
        if not answer.accepted:
            wish.holders.discard(instance.id)
        if answer.reason == "invalid":
            raise InstanceFailed(f"{instance.id} cannot read this request: do gateway and instances run one version?")
        return answer.accepted

    def _avoid(self, instance_id: str) -> None:
        _, before_s = self._avoided.get(instance_id, (0.0, AVOID_S / 2))
        for_s = min(2 * before_s, AVOID_AT_MOST_S)
        self._avoided[instance_id] = (time.monotonic() + for_s, for_s)

    def _is_answering(self, instance: InstanceRecord) -> bool:
        until, _ = self._avoided.get(instance.id, (0.0, 0.0))
        return until <= time.monotonic()

    async def _wait_for_hint(self, pause_s: float) -> bool:
        try:
            async with asyncio.timeout(pause_s):
                await self._hint.wait()
        except TimeoutError:
            return False
        return True
