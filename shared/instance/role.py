"""What prefill and decode have in common: requests they hold, and how a request ends, whatever ends it.

A request that an instance has accepted is a `Reserved` until its work comes, then a `Held`. It is let go once: the
engine and any transfer are done with its blocks before they are released. An exception in the work for one request ends
that request, and nothing else. Everything here runs in the event loop; only the engine has a thread of its own.
"""

import asyncio
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from importlib.metadata import entry_points
from typing import Any, ClassVar

from shared.bus.connection import Incoming
from shared.engine.sequence import FailedSequence, NewToken
from shared.errors import DeadlineExceeded, InstanceFailed, InternalError, SettingsInvalid
from shared.instance.outbox import BUS_WAS_AWAY, Failure
from shared.instance.parts import Held, InstanceParts, Reserved
from shared.instance.rejections import Rejections
from shared.instance.reservations import Reservations
from shared.kv.holder import Lease
from shared.messages.records import Admissions
from shared.messages.records import Role as RoleName
from shared.messages.serving import AskReply, Cancel, KVLease, Start
from shared.telemetry import tracing

START_TIMEOUT_S = 2.0
"""For so long an accepted request waits for its work (`Start`)."""
UNCHANGED_AFTER_S = 5.0
"""A request that has not come forward for so long is named in pings, so that its gateway may say it is unknown."""

log = logging.getLogger(__name__)


class Role(ABC):
    """A role: holds requests in slots, lets them go. `AcceptingRole` accepts them, and subclasses do the work."""

    verb: ClassVar[RoleName]
    can_move: ClassVar[bool] = False
    """Whether a request can go on at another instance of this role with its KV."""

    def __init__(self, parts: InstanceParts, *, step_tokens: int = 0) -> None:
        self.parts = parts
        self.reservations = Reservations(parts.cache, parts.loaded.layout.num_blocks(step_tokens))
        self.rejections = Rejections()
        self._held: dict[str, Held] = {}
        self._reserved: dict[str, Reserved] = {}
        self._less = asyncio.Event()
        """There is less to do than before."""
        self.num_accepted = 0
        self.num_rejected = 0
        self.num_ended = 0
        self.occupied_s = 0.0

    @property
    @abstractmethod
    def slots_total(self) -> int:
        """How many requests may be held at once."""

    @property
    def slots_used(self) -> int:
        return len(self._held) + len(self._reserved)

    @property
    def slots_leased(self) -> int:
        """Those whose KV waits to be fetched."""
        return sum(held.lease_id is not None for held in self._held.values())

    @property
    def is_computing(self) -> bool:
        """Whether anything is left for the engine, or on its way to it."""
        return bool(self._reserved) or any(held.lease_id is None for held in self._held.values())

    def knows(self, request_id: str) -> bool:
        """Whether it holds something for a request."""
        return request_id in self._held or request_id in self._reserved

    def unchanged(self, now: float) -> dict[str, list[str]]:
        """Returns, for each gateway that has requests here, those that have not come forward for a while."""
        found: dict[str, list[str]] = {reserved.ask.gateway_id: [] for reserved in self._reserved.values()}
        for held in self._held.values():
            ids = found.setdefault(held.gateway_id, [])
            if now - held.changed_at > UNCHANGED_AFTER_S:
                ids.append(held.request_id)
        return found

    def handle(self, verb: str, incoming: Incoming) -> None:
        """A message about requests that are held, by this role or another."""
        if verb == "cancel":
            self.release_requests(incoming.parse(Cancel).request_ids)

    def release_requests(self, request_ids: Iterable[str]) -> None:
        """Releases requests without a word to their gateways, which do not want them any more."""
        for request_id in request_ids:
            self.rejections.remove_request(request_id)
            if request_id in self._held:
                self.end(self._held[request_id])
            elif request_id in self._reserved:
                self.release_reserved(self._reserved[request_id])
        self.parts.notify_gateways()

    def release_gateway(self, gateway_id: str) -> None:
        """Releases everything that is held for a gateway that is dead."""
        self.rejections.remove_gateway(gateway_id)
        self.end_all(held for held in self._held.values() if held.gateway_id == gateway_id)
        for reserved in list(self._reserved.values()):
            if reserved.ask.gateway_id == gateway_id:
                self.release_reserved(reserved)

    def admissions(self) -> Admissions:
        """What has been accepted and rejected in this role."""
        return Admissions(
            num_accepted=self.num_accepted,
            num_rejected=self.num_rejected,
            num_ended=self.num_ended,
            occupied_s=self.occupied_s,
        )

    @abstractmethod
    async def take(self, incoming: Incoming) -> AskReply:
        """Accepts a request, or rejects it; at once."""

    @abstractmethod
    def start(self, start: Start) -> bool:
        """Starts an accepted request with its work; False if it is not waiting for it here."""

    @abstractmethod
    def notify_gateways(self) -> None:
        """Tells a gateway that was rejected, if one of its requests would be accepted now."""

    @abstractmethod
    async def on_tokens(self, tokens: list[NewToken]) -> None:
        """What one engine step generated."""

    def end_all(self, several: Iterable[Held], failure: Failure | None = None) -> None:
        for held in list(several):
            self.end(held, failure)

    def end(self, held: Held, failure: Failure | None = None) -> None:
        """Begins to let a request go, whatever it is at; tells its gateway why, if there is a reason to tell."""
        if held.ending:
            return
        held.reservation.is_ending = True
        self.run(held.request_id, self._let_go(held, failure))

    def release_reserved(self, reserved: Reserved, failure: Failure | None = None) -> None:
        """Releases a request whose work has not come; tells its gateway why, if there is a reason to tell."""
        self._remove_reserved(reserved)
        self._after_reserved(reserved, failure)

    def _remove_reserved(self, reserved: Reserved) -> None:
        del self._reserved[reserved.request_id]
        self.reservations.release(reserved.reservation, [])

    def _after_reserved(self, reserved: Reserved, failure: Failure | None) -> None:
        """The request has ended without having been started."""
        gateway_id, request_id = reserved.ask.gateway_id, reserved.request_id
        self._less.set()
        self.parts.outbox.ended(gateway_id, request_id)
        if failure is not None:
            self.run(request_id, self._send_failure(gateway_id, request_id, failure))
        self.parts.room_came_free()

    def run(self, request_id: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs work for one request in a task of its own. An exception ends that request, and nothing else."""
        return self.parts.tasks.create_task(self.guard([request_id], work))

    async def guard(self, request_ids: list[str], work: Coroutine[Any, Any, None]) -> None:
        """Does work for some requests. An exception ends these requests, and nothing else."""
        try:
            await work
        except Exception:
            log.exception("Internal error while handling %s.", ", ".join(request_ids))
            self.fail_requests(request_ids, "an internal error of the instance")

    def fail_requests(self, request_ids: Iterable[str], why: str) -> None:
        """Fails requests that met a fault of this program."""
        for held in [self._held[one] for one in request_ids if one in self._held]:
            self.end(held, Failure(InternalError(why)))

    def fail_sequences(self, failed: Iterable[FailedSequence]) -> None:
        """Fails the requests whose sequences the engine has dropped."""
        for one in failed:
            held = self.holding(one.request_id)
            if held is not None:
                self.end(held, Failure(InstanceFailed(one.message)))

    def fail_all(self, why: str, *, counts: bool) -> None:
        """Gives all requests up: their gateways take them elsewhere."""
        self.end_all(self._held.values(), Failure(InstanceFailed(why), counts))
        self._fail_reserved(why)

    def fail_crashed(self, why: str) -> None:
        """Fails all requests after an engine step raised; only those that were in the engine may have caused it."""
        for held in list(self._held.values()):
            failure = Failure(InstanceFailed(why), counts=held.in_engine, in_failed_step=held.in_engine)
            self.end(held, failure)
        self._fail_reserved(why)

    def fail_computing(self, why: str) -> None:
        """Gives those up that the engine is not done with."""
        computing = [held for held in self._held.values() if held.lease_id is None]
        self.end_all(computing, Failure(InstanceFailed(why), counts=False))
        self._fail_reserved(why)

    def _fail_reserved(self, why: str) -> None:
        for reserved in list(self._reserved.values()):
            self.release_reserved(reserved, Failure(InstanceFailed(why), counts=False))

    def bus_came_back(self) -> None:
        """Gives up what may have lost a message."""
        self.fail_all(BUS_WAS_AWAY, counts=False)

    def sweep(self, now: float) -> None:
        """Ends the requests whose deadline has passed, and those whose work has not come. `now` is monotonic."""
        late = [held for held in self._held.values() if held.deadline <= now]
        self.end_all(late, Failure(DeadlineExceeded("the request's deadline has passed")))
        for reserved in list(self._reserved.values()):
            if now - reserved.accepted_at > START_TIMEOUT_S:
                self.release_reserved(reserved)
        self.rejections.expire(now)

    def close(self) -> None:  # noqa: B027 - most roles have nothing to close
        """Lets go of what the role keeps between requests."""

    async def move_all(self) -> None:
        """Gets requests on their way to other instances of this role, as far as it can be done."""
        self._fail_reserved("this instance changes its role")

    async def until_idle(self) -> None:
        """Returns once nothing is held."""
        await self._until(lambda: self.slots_used == 0)

    async def until_computed(self) -> None:
        """Returns once what is held, if anything, only waits to be fetched."""
        await self._until(lambda: not self.is_computing)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._less.clear()
            await self._less.wait()

    def lease(self, held: Held) -> KVLease:
        """Keeps the KV of a request that the engine is done with until somebody fetches it, or its time is over."""
        parts = self.parts
        layout = parts.loaded.layout
        num_tokens = held.sequence.num_computed_tokens
        num_bytes = layout.num_blocks(num_tokens) * layout.block_bytes
        expires_in_s = max(0.0, min(held.deadline - time.monotonic(), parts.settings.lease_s))
        held.lease_id = secrets.token_urlsafe(16)
        held.changed_at = time.monotonic()
        lease = Lease(
            lease_id=held.lease_id,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            export=lambda skip_blocks: parts.staging.export(
                held.sequence.blocks[skip_blocks:], num_bytes - skip_blocks * layout.block_bytes
            ),
            expires_at=time.monotonic() + expires_in_s,
            let_go=lambda fetched: self.forget(held),
        )
        held.span.set_attribute(tracing.KV_BYTES, num_bytes)
        parts.holder.hold(lease)
        self._less.set()
        return KVLease(
            lease_id=lease.lease_id,
            instance_id=parts.instance_id,
            host=parts.holder.host,
            port=parts.holder.port,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            expires_in_s=expires_in_s,
        )

    def holding(self, request_id: str) -> Held | None:
        """The request if a token of it is this role's: the engine works on it, and it is not being let go.

        A role that was left may still lease the KV of a request that goes on here, in the next role.
        """
        held = self._held.get(request_id)
        return held if held is not None and held.in_engine and not held.ending else None

    def forget(self, held: Held) -> None:
        """The last act: blocks and slot are free. What the blocks hold may be of use to others."""
        sequence = held.sequence
        self.reservations.release(held.reservation, sequence.token_ids[: sequence.num_computed_tokens])
        del self._held[held.request_id]
        self._less.set()
        self.num_ended += 1
        self.occupied_s += time.monotonic() - held.accepted_at
        self.parts.outbox.ended(held.gateway_id, held.request_id)
        held.span.end()
        self.parts.room_came_free()

    def room_came_free(self) -> None:  # noqa: B027 - where requests do not grow, nobody waits for room
        """Blocks have been let go of, by this role or another."""

    async def _let_go(self, held: Held, failure: Failure | None) -> None:
        if failure is not None:
            await self._send_failure(held.gateway_id, held.request_id, failure)
        if held.transfer is not None:
            held.transfer.cancel()
            await asyncio.wait([held.transfer])
        if held.in_engine:
            await self.parts.runner.remove([held.request_id])
        if held.lease_id is not None:
            self.parts.holder.release(held.lease_id)
        else:
            self.forget(held)

    async def _send_failure(self, gateway_id: str, request_id: str, failure: Failure) -> None:
        log.warning("Request %s has failed here: %s", request_id, failure.error.message)
        try:
            await self.parts.outbox.failed(gateway_id, request_id, failure)
        except Exception:  # the edge to the bus: whatever it was, the request's blocks must be released
            log.exception("Gateway %s was not told that request %s has failed.", gateway_id, request_id)


def find_role(name: str) -> type[Role]:
    """The class that plays a role, by the entry point of that name in the group `pdserve.roles`."""
    for entry in entry_points(group="pdserve.roles", name=name):
        found: type[Role] = entry.load()
        return found
    raise SettingsInvalid(f"there is no role {name!r}: install the project again (make setup)")
