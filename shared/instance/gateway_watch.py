"""Pings the gateways that have requests here, so that the requests of a dead gateway are released soon.

A gateway is dead when NATS says that nobody is subscribed to its subject, and still says so later: two pings in a row
had no responders. One that merely does not answer in time may be slow, and keeps its requests. A gateway's answer also
names requests that it does not know any more; these are released.
"""

import asyncio
import logging
import time
from typing import Protocol

from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import NoResponders, PDServeError
from shared.messages.serving import MAX_PING_IDS, Ping, Pong

PING_INTERVAL_S = 0.5
PING_TIMEOUT_S = 2.0
MIN_PING_GAP_S = 0.1
"""A gateway is not pinged more often, whatever is reported about it."""
DEAD_AFTER_S = 0.4
"""Two pings without responders, so far apart at least, mean that a gateway is dead: it may just be reconnecting."""

log = logging.getLogger(__name__)


class Requests(Protocol):
    """What is held for gateways."""

    def unchanged(self) -> dict[str, list[str]]:
        """Returns, for each gateway that has requests here, the ids of those that have not come forward for a while."""

    def release_gateway(self, gateway_id: str) -> None:
        """Releases everything that is held for a gateway."""

    def release_requests(self, request_ids: list[str]) -> None:
        """Releases these requests."""


class GatewayWatch:
    """Pings gateways, each once every `PING_INTERVAL_S`."""

    def __init__(self, bus: Bus, instance_id: str, requests: Requests, tasks: asyncio.TaskGroup) -> None:
        self._bus = bus
        self._instance_id = instance_id
        self._requests = requests
        self._tasks = tasks
        self._pinged_at: dict[str, float] = {}
        self._pinging: set[str] = set()
        self._absent_since: dict[str, float] = {}
        """When a ping had no responders, for gateways that have not answered since."""

    async def run(self) -> None:
        """Pings all gateways that have requests here, until it is cancelled."""
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            unchanged = self._requests.unchanged()
            for known in (self._pinged_at, self._absent_since):
                for gateway_id in known.keys() - unchanged.keys():
                    del known[gateway_id]
            for gateway_id, request_ids in unchanged.items():
                self._start_ping(gateway_id, request_ids)

    def ping_now(self, gateway_id: str) -> None:
        """Pings a gateway that was reported to be gone, if it has requests here. The report may be forged."""
        if time.monotonic() - self._pinged_at.get(gateway_id, float("-inf")) < MIN_PING_GAP_S:
            return
        unchanged = self._requests.unchanged()
        if gateway_id in unchanged:
            self._start_ping(gateway_id, unchanged[gateway_id])

    def _start_ping(self, gateway_id: str, request_ids: list[str]) -> None:
        if gateway_id not in self._pinging:
            self._pinging.add(gateway_id)
            self._pinged_at[gateway_id] = time.monotonic()
            self._tasks.create_task(self._ping(gateway_id, request_ids[:MAX_PING_IDS]))

    async def _ping(self, gateway_id: str, request_ids: list[str]) -> None:
        ping = Ping(sender_id=self._instance_id, request_ids=request_ids)
        subject = subjects.gateway(gateway_id, "ping")
        try:
            pong = await self._bus.request(subject, ping, Pong, timeout_s=PING_TIMEOUT_S)
        except NoResponders:
            self._had_no_responders(gateway_id)
        except PDServeError as error:
            self._absent_since.pop(gateway_id, None)
            log.debug("Gateway %s did not answer a ping: %s", gateway_id, error)
        except Exception:  # the edge to the bus: one ping must not end the instance
            log.exception("Gateway %s could not be pinged.", gateway_id)
        else:
            self._absent_since.pop(gateway_id, None)
            unknown = [one for one in pong.unknown if one in request_ids]
            if unknown:
                log.warning("Gateway %s does not know %d requests any more; released them.", gateway_id, len(unknown))
                self._requests.release_requests(unknown)
        finally:
            self._pinging.discard(gateway_id)

    def _had_no_responders(self, gateway_id: str) -> None:
        now = time.monotonic()
        absent_since = self._absent_since.setdefault(gateway_id, now)
        if now - absent_since >= DEAD_AFTER_S:
            del self._absent_since[gateway_id]
            log.warning("Gateway %s is dead: nobody is subscribed to its subject. Released its requests.", gateway_id)
            self._requests.release_gateway(gateway_id)
