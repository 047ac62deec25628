"""The line in which requests wait for a slot of one role, first come, first served.

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
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.bus.messages import Answer, Cancel, DecodeRequest, PrefillRequest
from shared.errors import InstanceFailed, NoInstance, Overloaded, PeerUnavailable
from shared.registry.records import InstanceRecord, Role

ASK_AGAIN_S = 0.02
AVOID_S = 1.0
"""How long an instance that gave no answer is not asked."""
RETRY_AFTER_S = 1.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
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
        *,
        answer_timeout_s: float,
        instance_wait_s: float,
        max_waiting: int,
    ) -> None:
        self._bus = bus
        self._role: Role = role
        self._ready = ready
        self._num_open = num_open
        self._answer_timeout_s = answer_timeout_s
        self._instance_wait_s = instance_wait_s
        self._max_waiting = max_waiting
        self._turn = asyncio.Lock()
        self._hint = asyncio.Event()
        self._avoid: dict[str, float] = {}
        self._tie = random.Random()
        self.num_waiting = 0

    def hint(self) -> None:
        """A slot may be free."""
        self._hint.set()

    async def ask(
        self,
        request_for: Callable[[InstanceRecord], PrefillRequest | DecodeRequest],
        suits: Callable[[InstanceRecord], bool],
        *,
        until: float,
        deadline: float,
    ) -> Accepted:
        """Waits for a turn, then asks until an instance that `suits` accepts.

        Args:
            until: when to give up waiting (Unix seconds).
            deadline: the whole request's (Unix seconds), which the instance is told.

        Raises:
            TimeoutError: none accepted by then.
            NoInstance: for a while no instance that suits has been there at all.
            Overloaded: the line is too long already.
        """
        if self.num_waiting >= self._max_waiting:
            raise Overloaded(
                f"{self.num_waiting} requests wait for a {self._role} slot: try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self.num_waiting += 1
        try:
            async with asyncio.timeout(until - time.time()), self._turn:
                return await self._ask_until_accepted(request_for, suits, deadline)
        finally:
            self.num_waiting -= 1

    async def _ask_until_accepted(
        self,
        request_for: Callable[[InstanceRecord], PrefillRequest | DecodeRequest],
        suits: Callable[[InstanceRecord], bool],
        deadline: float,
    ) -> Accepted:
        num_refusals = 0
        seen_at = time.monotonic()
        while True:
            self._hint.clear()
            present = [one for one in self._ready(self._role) if suits(one)]
            if present:
                seen_at = time.monotonic()
            elif time.monotonic() - seen_at > self._instance_wait_s:
                raise NoInstance(
                    f"no {self._role} instance is there to serve this model: try again", retry_after_s=RETRY_AFTER_S
                )
            for instance in policy.order(filter(self._is_answering, present), self._num_open(), self._tie):
                if await self._ask(instance, request_for(instance), deadline):
                    return Accepted(instance, num_refusals)
                num_refusals += 1
            await self._wait_for_hint()

    async def _ask(self, instance: InstanceRecord, request: PrefillRequest | DecodeRequest, deadline: float) -> bool:
        """Whether the instance accepts. One whose answer is not waited for any more may have: it is told to cancel."""
        subject = subjects.instance(instance.id, self._role)
        try:
            answer = await self._bus.request(
                subject, request, Answer, timeout_s=self._answer_timeout_s, deadline=deadline
            )
        except PeerUnavailable as error:
            log.warning("%s", error)
            self._avoid[instance.id] = time.monotonic() + AVOID_S
            await self._cancel(instance.id, request.request_id)
            return False
        except asyncio.CancelledError:
            await self._cancel(instance.id, request.request_id)
            raise
        if answer.reason == "invalid":
            raise InstanceFailed(f"{instance.id} cannot read this request: do gateway and instances run one version?")
        return answer.accepted

    def _is_answering(self, instance: InstanceRecord) -> bool:
        return self._avoid.get(instance.id, 0.0) <= time.monotonic()

    async def _cancel(self, instance_id: str, request_id: str) -> None:
        await self._bus.publish(subjects.instance(instance_id, "cancel"), Cancel(request_ids=[request_id]))

    async def _wait_for_hint(self) -> None:
        try:
            async with asyncio.timeout(ASK_AGAIN_S):
                await self._hint.wait()
        except TimeoutError:
            pass
