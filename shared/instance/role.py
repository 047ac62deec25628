"""What prefill and decode have in common: requests they hold, and how a request ends, whatever ends it.

A request that an instance has accepted is held by exactly one `Held`. It is let go once: the engine and any transfer
are done with its blocks before they are released. Everything here runs in the event loop; only the engine has a thread
of its own.
"""

import asyncio
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import ClassVar

from opentelemetry.trace import SpanKind

from shared.bus.connection import Incoming
from shared.engine.runner import check
from shared.engine.sequence import NewToken, Sequence
from shared.engine.work import PromptWork
from shared.errors import DeadlineExceeded, InstanceFailed, RequestError, SettingsInvalid
from shared.instance.admission import InstanceFacts, RequestFacts, refusal, room_refusal
from shared.instance.outbox import BUS_WAS_AWAY
from shared.instance.parts import Held, InstanceParts
from shared.instance.reservations import Reservations, Room
from shared.kv.holder import Lease
from shared.messages.records import Admissions
from shared.messages.records import Role as RoleName
from shared.messages.serving import AskReply, Cancel, InstanceRequest, KVLease, RejectionReason
from shared.telemetry import tracing

WANTS_ROOM: frozenset[RejectionReason] = frozenset({"no_slot", "no_blocks"})
"""A gateway that is refused for these is told when there is room again."""

log = logging.getLogger(__name__)


class Role(ABC):
    """A role: takes requests on its verb, holds them in slots, lets them go. Subclasses say what happens between."""

    verb: ClassVar[RoleName]
    can_move: ClassVar[bool] = False
    """Whether a request can go on at another instance of this role with its KV."""

    def __init__(self, parts: InstanceParts, *, step_tokens: int = 0) -> None:
        self.parts = parts
        self.reservations = Reservations(parts.cache, parts.loaded.layout.num_blocks(step_tokens))
        self._held: dict[str, Held] = {}
        self._less = asyncio.Event()
        """There is less to do than before."""
        self._refused: dict[str, None] = {}
        """Gateways that wait for room, the first to be refused first."""
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
        return len(self._held)

    @property
    def slots_leased(self) -> int:
        """Those whose KV waits to be fetched."""
        return sum(held.lease_id is not None for held in self._held.values())

    @property
    def is_computing(self) -> bool:
        """Whether anything is left for the engine, or on its way to it."""
        return any(held.lease_id is None for held in self._held.values())

    def uncomputed(self) -> PromptWork:
        """What is left of all that the engine works on."""
        sequences = [held.sequence for held in self._held.values() if held.in_engine]
        left = (PromptWork.of(len(one.token_ids), one.num_computed_tokens) for one in sequences)
        return sum(left, PromptWork())

    def handle(self, verb: str, key: str, incoming: Incoming) -> None:
        """A message about requests that are held, by this role or another."""
        if verb == "cancel":
            self.end_all(self._held[one] for one in incoming.parse(Cancel).request_ids if one in self._held)
        elif verb == "gone" and incoming.nobody_listens:
            self.end_all(held for held in self._held.values() if held.gateway_id == key)

    def admissions(self) -> Admissions:
        """What has been accepted and refused in this role."""
        return Admissions(
            num_accepted=self.num_accepted,
            num_rejected=self.num_rejected,
            num_ended=self.num_ended,
            occupied_s=self.occupied_s,
        )

    @abstractmethod
    async def take(self, incoming: Incoming) -> AskReply:
        """Accepts a request and starts on it, or refuses it; at once."""

    @abstractmethod
    async def on_tokens(self, tokens: list[NewToken]) -> None:
        """What one engine step generated."""

    def end_all(self, several: Iterable[Held], error: RequestError | None = None, *, counts: bool = True) -> None:
        for held in list(several):
            self.end(held, error, counts=counts)

    def end(self, held: Held, error: RequestError | None = None, *, counts: bool = True) -> None:
        """Begins to let a request go, whatever it is at; tells its gateway why, if there is a reason to tell."""
        if held.ending:
            return
        held.reservation.is_ending = True
        self.parts.tasks.create_task(self._let_go(held, error, counts))

    def fail_all(self, why: str, *, counts: bool) -> None:
        """Gives all requests up: their gateways take them elsewhere."""
        self.end_all(self._held.values(), InstanceFailed(why), counts=counts)

    def fail_computing(self, why: str) -> None:
        """Gives those up that the engine is not done with."""
        self.end_all([held for held in self._held.values() if held.lease_id is None], InstanceFailed(why), counts=False)

    def bus_came_back(self) -> None:
        """Gives up what may have lost a message."""
        self.fail_all(BUS_WAS_AWAY, counts=False)

    def sweep(self, now: float) -> None:
        """Ends the requests whose deadline has passed."""
        late = [held for held in self._held.values() if held.deadline <= now]
        self.end_all(late, DeadlineExceeded("the request's deadline has passed"))

    def close(self) -> None:  # noqa: B027 - most roles have nothing to close
        """Lets go of what the role keeps between requests."""

    async def move_all(self) -> None:  # noqa: B027 - where requests are soon done, none is moved
        """Gets requests on their way to other instances of this role, as far as it can be done."""

    async def until_idle(self) -> None:
        """Returns once nothing is held."""
        await self._until(lambda: not self._held)

    async def until_computed(self) -> None:
        """Returns once what is held, if anything, only waits to be fetched."""
        await self._until(lambda: not self.is_computing)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._less.clear()
            await self._less.wait()

    def admit(self, request: InstanceRequest, deadline: float, room_for: Callable[[], Room]) -> Room | RejectionReason:
        """The room that a request is to have, or why this instance cannot take it.

        Only who may come in at all is looked up in the cache, which takes as long as its prompt.
        """
        parts = self.parts
        reason = refusal(
            RequestFacts(
                epoch=request.epoch,
                fingerprint=request.fingerprint,
                is_held=request.request_id in self._held,
                deadline=deadline,
            ),
            InstanceFacts(
                epoch=parts.epoch(),
                fingerprint=parts.loaded.fingerprint,
                draining=not parts.accepting(),
                slots_free=1 if request.is_canary else self.slots_total - self.slots_used,
                now=time.time(),
            ),
        )
        if reason is None:
            room = room_for()
            reason = room_refusal(self.reservations.needs(room), self.reservations.supply()) or self.lateness(
                request, room
            )
        if reason is None:
            self.num_accepted += 1
            return room
        self.num_rejected += reason in WANTS_ROOM or reason == "no_time"
        if reason in WANTS_ROOM and not request.is_canary:
            self._refused.setdefault(request.gateway_id)
        return reason

    def hold(self, request: InstanceRequest, room: Room, incoming: Incoming, num_to_generate: int) -> Held:
        """Reserves blocks and a slot for a request that admission has accepted.

        Raises:
            RequestError: it is not for this model; nothing is held.
        """
        parts = self.parts
        reservation = self.reservations.reserve(request.request_id, request.arrived_at, room)
        try:
            sequence = Sequence(
                request_id=request.request_id,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                blocks=list(reservation.allocation.blocks),
                sampling=request.sampling,
                num_to_generate=num_to_generate,
                num_shared_blocks=reservation.allocation.num_matched,
            )
            check(sequence, parts.loaded.vocab_size, parts.loaded.max_position_embeddings)
        except RequestError:
            self.reservations.release(reservation, [])
            raise
        attributes: dict[str, str | int] = {
            tracing.INSTANCE_ID: parts.instance_id,
            tracing.REQUEST_ID: request.request_id,
            tracing.NUM_PROMPT_TOKENS: request.num_prompt_tokens,
            tracing.NUM_BLOCKS: room.num_blocks,
        }
        span = tracing.tracer.start_span(self.verb, incoming.trace_context, SpanKind.SERVER, attributes)
        held = Held(request.request_id, request.gateway_id, sequence, reservation, incoming.deadline, span)
        self._held[request.request_id] = held
        return held

    def lateness(self, request: InstanceRequest, room: Room) -> RejectionReason | None:
        """Why a request that there is room for would come too late; None if it would not."""
        return None

    def lease(self, held: Held) -> KVLease:
        """Keeps the KV of a request that the engine is done with until somebody fetches it, or its time is over."""
        parts = self.parts
        layout = parts.loaded.layout
        num_tokens = held.sequence.num_computed_tokens
        num_bytes = layout.num_blocks(num_tokens) * layout.block_bytes
        held.lease_id = secrets.token_urlsafe(16)
        lease = Lease(
            lease_id=held.lease_id,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            export=lambda skip_blocks: parts.staging.export(
                held.sequence.blocks[skip_blocks:], num_bytes - skip_blocks * layout.block_bytes
            ),
            expires_at=min(held.deadline, time.time() + parts.settings.lease_s),
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
            expires_at=lease.expires_at,
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

    def tell_who_waits(self) -> None:
        """One gateway for each slot, in turns: told all at once they would ask in vain."""
        if self._refused:
            gateway_id = next(iter(self._refused))
            del self._refused[gateway_id]
            self.parts.tasks.create_task(self.parts.outbox.free(gateway_id, self.parts.group(), self.verb))

    def room_came_free(self) -> None:  # noqa: B027 - where requests do not grow, nobody waits for room
        """Blocks have been let go of, by this role or another."""

    async def _let_go(self, held: Held, error: RequestError | None, counts: bool) -> None:
        if error is not None:
            log.warning("request %s is given up: %s", held.request_id, error.message)
            await self.parts.outbox.failed(held.gateway_id, held.request_id, error, counts=counts)
        if held.transfer is not None:
            held.transfer.cancel()
            await asyncio.wait([held.transfer])
        if held.in_engine:
            await self.parts.runner.remove([held.request_id])
        if held.lease_id is not None:
            self.parts.holder.release(held.lease_id)
        else:
            self.forget(held)


def find_role(name: str) -> type[Role]:
    """The class that plays a role, by the entry point of that name in the group `pdserve.roles`."""
    for entry in entry_points(group="pdserve.roles", name=name):
        found: type[Role] = entry.load()
        return found
    raise SettingsInvalid(f"there is no role {name!r}: install the project again (make setup)")
