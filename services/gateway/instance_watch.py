"""All instances that this gateway uses: their clients, the links between them, and the watch that notices deaths.

Three things tell that an instance is gone or sick: NATS reports no responders on its subjects,
it does not answer pings, or requests fail there. The registry's heartbeats (`groups.py`) are the last resort.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable

from services.gateway.events import EventRouter
from services.gateway.instance_client import InstanceClient
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.circuit_breaker import CircuitBreaker
from shared.errors import NoResponders, PeerUnavailable, RequestError
from shared.messages.serving import MAX_PING_IDS, Ping, Pong

PING_EVERY_S = 0.05
SILENT_BEFORE_PING_S = 0.1
"""An instance that has sent something so recently is alive and needs no ping."""
UNRESPONSIVE_AFTER_S = 1.0
"""An instance that leaves a ping unanswered for so long loses its requests: it is stopped, or hangs."""
PING_LOST_EVERY_S = 0.2
SLOW_STEP_S = 10.0
"""An engine that computes one step for so long may hang: operators are told once."""
RECONCILE_EVERY_S = 1.0
RECONCILE_SILENT_S = 1.0
"""Requests without an event for so long are checked: does the instance still know them?"""

log = logging.getLogger(__name__)


class Instances:
    """The clients of all instances, the links between them, and the watch over those that serve open requests.

    Args:
        on_lost: called once for each instance that is found dead or unresponsive.
        on_found: called when an instance that was lost answers again.
    """

    def __init__(
        self, bus: Bus, router: EventRouter, on_lost: Callable[[str], None], on_found: Callable[[str], None]
    ) -> None:
        self._bus = bus
        self._router = router
        self._on_lost = on_lost
        self._on_found = on_found
        self._clients: dict[str, InstanceClient] = {}
        self._links: dict[str, dict[str, CircuitBreaker]] = {}
        """By source and target of KV; only links that have failed within the last minute."""
        self._pings: dict[str, asyncio.Task[None]] = {}
        self._reconciled_at: dict[str, float] = {}
        self._pinged_lost_at = 0.0
        self._unknown: dict[str, set[str]] = {}
        """Attempts that an instance did not know at the last ping that listed any."""
        self._slow: set[str] = set()
        self._cancelling: set[asyncio.Task[None]] = set()

    def client(self, instance_id: str) -> InstanceClient:
        found = self._clients.get(instance_id)
        if found is None:
            found = self._clients[instance_id] = InstanceClient(self._bus, instance_id)
        return found

    def link_allows(self, source_id: str, target_id: str, now: float) -> bool:
        """Returns whether KV may be sent from one instance to the other, as far as past failures go."""
        link = self._links.get(source_id, {}).get(target_id)
        return link is None or link.allows(now)

    def can_send_to_any(self, source_id: str, target_ids: Iterable[str], now: float) -> bool:
        """Returns whether KV may be sent from an instance to at least one of the others."""
        return source_id not in self._links or any(self.link_allows(source_id, one, now) for one in target_ids)

    def transfer_started(self, source_id: str, target_id: str) -> None:
        link = self._links.get(source_id, {}).get(target_id)
        if link is not None:
            link.started(time.monotonic())

    def transferred(self, source_id: str, target_id: str) -> None:
        """Notes that KV has arrived."""
        link = self._links.get(source_id, {}).get(target_id)
        if link is not None:
            link.succeeded()
        self.client(target_id).breaker.succeeded()

    def failed(self, instance_id: str, kv_source_id: str | None, started_at: float) -> None:
        """Notes a failed attempt that began at `started_at`: of a link if no KV came, else of the instance."""
        breaker = self.client(instance_id).breaker
        if kv_source_id is not None:
            breaker = self._links.setdefault(kv_source_id, {}).setdefault(instance_id, CircuitBreaker())
        breaker.failed(time.monotonic(), started_at)

    def failures(self) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the failures of the last minute, by instance and by link, for the controller."""
        now = time.monotonic()
        instances = {name: one.breaker.num_recent_failures(now) for name, one in self._clients.items()}
        links = {
            f"{source}>{target}": link.num_recent_failures(now)
            for source, targets in self._links.items()
            for target, link in targets.items()
        }
        return {name: n for name, n in instances.items() if n}, {name: n for name, n in links.items() if n}

    def keep(self, instance_ids: set[str]) -> None:
        """Drops what is known of all other instances, unless they serve open requests, and links that work again."""
        now = time.monotonic()
        kept = instance_ids | set(self._router.participants())
        self._clients = {name: one for name, one in self._clients.items() if name in kept}
        self._slow &= kept
        self._unknown = {name: one for name, one in self._unknown.items() if name in kept}
        self._reconciled_at = {name: at for name, at in self._reconciled_at.items() if name in kept}
        for source, targets in list(self._links.items()):
            for target, link in list(targets.items()):
                works_again = link.num_failures == 0 and not link.num_recent_failures(now)
                if works_again or not {source, target} <= kept:
                    del targets[target]
            if not targets:
                del self._links[source]

    def lose(self, instance_id: str, why: str) -> None:
        """Takes an instance for gone: its requests move at once, and nobody waits for its answers."""
        client = self.client(instance_id)
        if client.is_lost:
            return
        client.lost()
        attempt_ids = self._router.lose(instance_id, why)
        log.warning("instance %s %s: moving its %d requests", instance_id, why, len(attempt_ids))
        # One that only was out of reach or stopped releases them as soon as it reads this.
        cancelling = asyncio.create_task(self._router.cancel(instance_id, attempt_ids))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)
        self._on_lost(instance_id)

    def found(self, instance_id: str) -> None:
        """Takes an instance that was lost for alive again."""
        client = self.client(instance_id)
        if client.is_lost:
            client.is_lost = False
            log.info("instance %s answers again", instance_id)
            self._on_found(instance_id)

    async def watch(self) -> None:
        """Pings the instances that serve open requests whenever they send nothing by themselves; runs for ever."""
        try:
            while True:
                await asyncio.sleep(PING_EVERY_S)
                self._ping_silent()
        finally:
            for ping in self._pings.values():
                ping.cancel()

    def _ping_silent(self) -> None:
        now = time.monotonic()
        for instance_id in list(self._router.participants()):
            is_due = now - self._reconciled_at.get(instance_id, 0.0) > RECONCILE_EVERY_S
            is_silent = self._router.silent_s(instance_id) > SILENT_BEFORE_PING_S
            if (is_silent or is_due) and instance_id not in self._pings:
                self._start_ping(instance_id, now, reconcile=is_due)
        if now - self._pinged_lost_at > PING_LOST_EVERY_S:
            self._pinged_lost_at = now
            for client in self._clients.values():
                if client.is_lost and client.instance_id not in self._pings:
                    self._start_ping(client.instance_id, now, reconcile=False)

    def _start_ping(self, instance_id: str, now: float, *, reconcile: bool) -> None:
        attempt_ids: list[str] = []
        if reconcile:
            self._reconciled_at[instance_id] = now
            attempt_ids = self._router.silent_attempts(instance_id, RECONCILE_SILENT_S)
            if len(attempt_ids) > MAX_PING_IDS:
                attempt_ids = random.sample(attempt_ids, MAX_PING_IDS)
        ping = asyncio.create_task(self._ping(instance_id, attempt_ids))
        self._pings[instance_id] = ping
        ping.add_done_callback(lambda done: self._pings.pop(instance_id, None))

    async def _ping(self, instance_id: str, attempt_ids: list[str]) -> None:
        subject = subjects.instance(instance_id, "ping")
        request = Ping(sender_id=self._router.gateway_id, request_ids=attempt_ids)
        try:
            pong = await self._bus.request(subject, request, Pong, timeout_s=UNRESPONSIVE_AFTER_S)
        except NoResponders:
            if self._bus.connected:
                self.lose(instance_id, "is gone: NATS reports no responders")
            return
        except PeerUnavailable:
            if self._bus.connected and self._router.silent_s(instance_id) > UNRESPONSIVE_AFTER_S:
                self.lose(instance_id, f"has not answered for {UNRESPONSIVE_AFTER_S:g} s")
            return
        except RequestError as error:
            log.warning("instance %s answered a ping with a broken message: %s", instance_id, error.message)
            return
        self._router.heard(instance_id)
        self.found(instance_id)
        if pong.step_s < SLOW_STEP_S:
            self._slow.discard(instance_id)
        elif instance_id not in self._slow:
            self._slow.add(instance_id)
            log.warning(
                "the engine of %s has been in one step for %.0f s: restart it if it hangs", instance_id, pong.step_s
            )
        # The first time, the last message of a request that has just ended may still be on its way.
        unknown = set(pong.unknown)
        if attempt_ids:
            self._router.drop(instance_id, unknown & self._unknown.pop(instance_id, set()))
        if unknown:
            self._unknown[instance_id] = unknown
