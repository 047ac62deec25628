"""Notices gateways that have died, and ends the answers that they owe to clients of the NATS API.

A gateway is dead when pings find nobody subscribed to its subject *and* its heartbeat in Redis stands still. One that
has merely lost its connection to NATS goes on renewing its record, and so keeps its requests.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import InternalError, NoResponders, PDServeError, PeerUnavailable, RegistryUnavailable, RequestError
from shared.messages.generate_api import GenerateFailed
from shared.messages.serving import Ping, Pong
from shared.registry.open_answers import OpenAnswers
from shared.registry.registry import Registry

CHECK_EVERY_S = 0.5
PING_TIMEOUT_S = 0.5
"""A gateway that is slow to answer is not dead. NATS reports within milliseconds that nobody is subscribed."""
MIN_PINGS = 2
"""So many pings in a row must have found nobody subscribed."""
MIN_SILENT_S = 1.5
MIN_SILENT_HEARTBEATS = 3
"""A heartbeat that has not moved for so many of its intervals, and for `MIN_SILENT_S`, stands still."""

log = logging.getLogger(__name__)

Beat = tuple[float, int]
"""When a gateway was started in Unix seconds, and the number of its heartbeat."""


@dataclass(slots=True)
class _Absent:
    """A gateway at whose subject nobody was subscribed: its last heartbeat, and since when (monotonic) it has that."""

    beat: Beat | None
    since: float
    num_pings: int = 0


class AbsentGateways:
    """Decides which gateways have died. Heartbeats are compared with earlier ones on this reader's clock. Pure."""

    def __init__(self, silent_s: float) -> None:
        self._silent_s = silent_s
        self._absent: dict[str, _Absent] = {}
        self._updated_at = float("-inf")

    def update(self, absent: Mapping[str, Beat | None], now: float) -> list[str]:
        """Returns the gateways that have died.

        After a pause as long as silence itself the registry or this process was away, and all get another chance.

        Args:
            absent: those at whose subject a ping has just found nobody, with the heartbeat in their record, if there
                is a record.
        """
        if now - self._updated_at >= self._silent_s:
            self._absent.clear()
        self._updated_at = now
        self._absent = {name: self._seen(name, beat, now) for name, beat in absent.items()}
        return [name for name, one in self._absent.items() if self._is_dead(one, now)]

    def _seen(self, name: str, beat: Beat | None, now: float) -> _Absent:
        before = self._absent.get(name)
        one = before if before is not None and before.beat == beat else _Absent(beat, now)
        one.num_pings += 1
        return one

    def _is_dead(self, one: _Absent, now: float) -> bool:
        return one.num_pings >= MIN_PINGS and (one.beat is None or now - one.since >= self._silent_s)


class GatewayDeaths:
    """Watches the gateways that have open answers, on behalf of one of them."""

    def __init__(
        self, bus: Bus, records: Registry, open_answers: OpenAnswers, gateway_id: str, *, heartbeat_s: float
    ) -> None:
        self._bus = bus
        self._records = records
        self._open_answers = open_answers
        self._id = gateway_id
        self._absent = AbsentGateways(max(MIN_SILENT_S, MIN_SILENT_HEARTBEATS * heartbeat_s))

    async def watch(self) -> None:
        """Ends the answers of gateways that have died, until it is cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                await self.check()
            except RegistryUnavailable as error:
                log.debug("open answers of other gateways cannot be read: %s", error)

    async def check(self) -> None:
        """Pings all gateways with open answers once, and ends the answers of those that have died.

        Raises:
            RegistryUnavailable: what it could not read it reads the next time.
        """
        others = await self._open_answers.orphans()
        is_absent = await asyncio.gather(*(self._is_absent(one) for one in others))
        absent = [one for one, so in zip(others, is_absent, strict=True) if so]
        records = {one.id: one for one in await self._records.gateways()} if absent else {}
        beats = {
            name: (record.started_at, record.heartbeat) if (record := records.get(name)) else None for name in absent
        }
        for gateway_id in self._absent.update(beats, time.monotonic()):
            await end_orphans(self._bus, self._open_answers, gateway_id)

    async def _is_absent(self, gateway_id: str) -> bool:
        """Returns whether a gateway's subject has no subscriber; False while this gateway is not connected itself."""
        try:
            ping = Ping(sender_id=self._id)
            await self._bus.request(subjects.gateway(gateway_id, "ping"), ping, Pong, timeout_s=PING_TIMEOUT_S)
        except NoResponders:
            return self._bus.connected
        except (PeerUnavailable, RequestError):
            return False
        return False


async def end_orphans(bus: Bus, open_answers: OpenAnswers, gateway_id: str) -> None:
    """Sends a terminal error to the clients of a gateway that has died.

    Raises:
        RegistryUnavailable: nothing was sent; call again.
    """
    orphans = await open_answers.claim(gateway_id)
    if orphans:
        log.warning("gateway %s has died: ending its %d open answers on NATS", gateway_id, len(orphans))
    error = InternalError("The gateway that served this request has died: send the request again.", retry_after_s=0.0)
    for orphan in orphans:
        if not subjects.is_inbox(orphan.inbox):
            log.warning("an open answer of %s cannot be ended: its reply subject is not an inbox", gateway_id)
            continue
        try:
            await bus.publish(orphan.inbox, GenerateFailed(id=orphan.id, index=-1, error=error.body))
        except PDServeError as unsendable:
            log.warning("an open answer of %s cannot be ended: %s", gateway_id, unsendable)
