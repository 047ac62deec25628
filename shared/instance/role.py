"""What prefill and decode have in common: requests they hold, and how a request ends, whatever ends it.

A request that an instance has accepted is held by exactly one `Held`. It is let go once: the engine and any transfer
are done with its blocks before they are released. Everything here runs in the event loop; only the engine has a thread
of its own.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import ClassVar

from opentelemetry.trace import Span, SpanKind

from shared.bus.connection import Incoming
from shared.bus.messages import Answer, Cancel, InstanceRequest, RefusalReason
from shared.engine.model import LoadedModel
from shared.engine.prefix_cache import PrefixCache
from shared.engine.runner import EngineRunner, check
from shared.engine.sequence import NewToken, Sequence
from shared.engine.staging import Staging
from shared.errors import DeadlineExceeded, InstanceFailed, RequestError, SettingsInvalid
from shared.instance.admission import InstanceFacts, RequestFacts, refusal, room_refusal
from shared.instance.outbox import Outbox
from shared.instance.reservations import Reservation, Reservations, Room
from shared.kv.holder import KVHolder
from shared.settings import InstanceSettings
from shared.telemetry import tracing

SWEEP_S = 0.25
RECENT = 256
"""How many ended requests are remembered for `bus_came_back`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstanceParts:
    """What an instance has, whichever role it plays."""

    settings: InstanceSettings
    instance_id: str
    epoch: Callable[[], int]
    draining: Callable[[], bool]
    loaded: LoadedModel
    staging: Staging
    cache: PrefixCache
    runner: EngineRunner
    holder: KVHolder
    outbox: Outbox
    tasks: asyncio.TaskGroup


@dataclass(slots=True, eq=False)
class Held:
    """A request that this instance has accepted, and all that it holds for it."""

    request_id: str
    gateway_id: str
    sequence: Sequence
    reservation: Reservation
    deadline: float
    span: Span
    in_engine: bool = False
    lease_id: str | None = None
    """The only key to its KV, while that waits to be fetched."""
    transfer: asyncio.Task[None] | None = None

    @property
    def ending(self) -> bool:
        return self.reservation.is_ending


class Role(ABC):
    """A role: takes requests on its verb, holds them in slots, lets them go. Subclasses say what happens between."""

    verb: ClassVar[str]

    def __init__(self, parts: InstanceParts, *, step_tokens: int = 0) -> None:
        self.parts = parts
        self.reservations = Reservations(parts.cache, parts.loaded.layout.num_blocks(step_tokens))
        self._held: dict[str, Held] = {}
        self._forgotten = asyncio.Event()
        self._ended: deque[tuple[str, str]] = deque(maxlen=RECENT)

    @property
    @abstractmethod
    def slots_total(self) -> int:
        """How many requests may be held at once."""

    @property
    def slots_used(self) -> int:
        return len(self._held)

    async def handle(self, verb: str, key: str, incoming: Incoming) -> None:
        """One message to this instance."""
        if verb == self.verb:
            answer = await self.take(incoming)
            await incoming.respond(answer)
        elif verb == "cancel":
            self.end_all(self._held[one] for one in incoming.parse(Cancel).request_ids if one in self._held)
        elif verb == "gone" and incoming.nobody_listens:
            self.end_all(held for held in self._held.values() if held.gateway_id == key)
        elif incoming.reply_to:
            await incoming.respond(Answer(accepted=False, reason="wrong_role"))

    @abstractmethod
    async def take(self, incoming: Incoming) -> Answer:
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

    def bus_came_back(self) -> None:
        """Gives up what may have lost a message, and what has just ended, since its last message may be lost too."""
        error = InstanceFailed("the connection to the bus was lost for a while")
        for request_id, gateway_id in self._ended:
            self.parts.tasks.create_task(self.parts.outbox.failed(gateway_id, request_id, error, counts=False))
        self._ended.clear()
        self.fail_all(error.message, counts=False)

    def sweep(self, now: float) -> None:
        """Ends the requests whose deadline has passed."""
        late = [held for held in self._held.values() if held.deadline <= now]
        self.end_all(late, DeadlineExceeded("the request's deadline has passed"))

    def close(self) -> None:  # noqa: B027 - most roles have nothing to close
        """Lets go of what the role keeps between requests."""

    async def idle(self) -> None:
        """Returns once nothing is held."""
        while self._held:
            self._forgotten.clear()
            await self._forgotten.wait()

    async def sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(time.time())

    def admit(self, request: InstanceRequest, deadline: float, room_for: Callable[[], Room]) -> Room | RefusalReason:
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
                draining=parts.draining(),
                slots_free=self.slots_total - self.slots_used,
                now=time.time(),
            ),
        )
        if reason is not None:
            return reason
        room = room_for()
        return room_refusal(self.reservations.needs(room), self.reservations.supply()) or room

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

    def holding(self, request_id: str) -> Held | None:
        """The request if it is held and not being let go."""
        held = self._held.get(request_id)
        return held if held is not None and not held.ending else None

    def forget(self, held: Held) -> None:
        """The last act: blocks and slot are free. What the blocks hold may be of use to others."""
        sequence = held.sequence
        self.reservations.release(held.reservation, sequence.token_ids[: sequence.num_computed_tokens])
        del self._held[held.request_id]
        self._forgotten.set()
        self._ended.append((held.request_id, held.gateway_id))
        held.span.end()
        self.room_came_free()

    def room_came_free(self) -> None:  # noqa: B027 - where requests do not grow, nobody waits for room
        """Blocks have been let go of."""

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
