"""How an instance accepts requests: it answers every `Ask` at once, and never has more prompt work than it can start.

Ask with its work     -> accepted, started
Ask without its work  -> accepted, a slot and blocks reserved -> Start -> started
                                                              -> nothing for START_TIMEOUT_S -> released
Ask                   -> rejected -> SlotFreed once it would be accepted
"""

import asyncio
import logging
import time
from abc import abstractmethod
from typing import ClassVar

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from shared.bus.connection import Incoming
from shared.engine.prefix_cache import Match
from shared.engine.runner import check
from shared.engine.sequence import Sequence
from shared.engine.work import PromptWork
from shared.errors import InstanceFailed, InternalError, InvalidRequest, RequestError
from shared.instance.admission import BlockNeeds, InstanceFacts, RequestFacts, can_start_next, rejection, tokens_free
from shared.instance.outbox import Failure
from shared.instance.parts import Held, InstanceParts, Reserved
from shared.instance.prefix_index import PrefixIndex
from shared.instance.rejections import NO_CAPACITY, RejectedRequest
from shared.instance.reservations import Room
from shared.instance.role import Role
from shared.messages.serving import (
    MAX_SECONDS,
    Ask,
    AskReply,
    Capacity,
    RejectionReason,
    SlotFreed,
    Start,
    check_start,
)
from shared.telemetry import tracing

NOTIFY_NEXT_AFTER_S = 0.05
"""After so long the next gateway is told, if the one before has not used what was free."""
NO_BLOCKS = BlockNeeds(alone=0, now=0)

log = logging.getLogger(__name__)


class AcceptingRole(Role):
    """A role that accepts requests. Subclasses say which blocks a request needs, and begin the work on it."""

    shares_pending_blocks: ClassVar[bool] = False
    """Whether requests share blocks whose KV is still being computed."""

    def __init__(self, parts: InstanceParts, *, step_tokens: int = 0) -> None:
        super().__init__(parts, step_tokens=step_tokens)
        self._prefix_index = PrefixIndex(parts.loaded.layout.block_size)
        self._notify_timer: asyncio.TimerHandle | None = None

    @abstractmethod
    def _is_prompt(self, ask: Ask) -> bool:
        """Returns whether the prompt of a request would be computed here."""

    @abstractmethod
    def _is_valid(self, ask: Ask) -> bool:
        """Returns whether the figures of a request fit the model."""

    @abstractmethod
    def _num_to_generate(self, ask: Ask) -> int:
        """For how many tokens blocks are reserved at first."""

    @abstractmethod
    def _room(self, ask: Ask, match: Match) -> Room:
        """Which blocks a request needs."""

    @abstractmethod
    def _work_on(self, held: Held, ask: Ask) -> None:
        """Begins the work on a request."""

    async def take(self, incoming: Incoming) -> AskReply:
        ask = incoming.parse(Ask)
        try:
            reason = self._consider(ask, incoming.trace_context)
        except RequestError as error:
            log.warning("Rejected request %s: %s", ask.request_id, error.message)
            reason = "invalid"
        if reason is None:
            self.num_accepted += 1
            self.rejections.remove_request(ask.request_id)
            self.notify_gateways()  # what is left may be enough for another gateway
        return AskReply(accepted=reason is None, reason=reason, capacity=self.capacity())

    def start(self, start: Start) -> bool:
        reserved = self._reserved.get(start.request_id)
        if reserved is None:
            return False
        self._remove_reserved(reserved)
        try:
            self._start_reserved(reserved, start)
        except RequestError as error:
            counts = not isinstance(error, InstanceFailed)
            self._after_reserved(reserved, Failure(error, counts=counts))
        except Exception:  # an edge: this request ends, and its gateway learns of it
            log.exception("Internal error while starting request %s.", start.request_id)
            self._after_reserved(reserved, Failure(InternalError("The instance failed to start the request.")))
        return True

    def _start_reserved(self, reserved: Reserved, start: Start) -> None:
        """Raises RequestError if the work is not that which was asked for, or its blocks do not suffice."""
        ask = reserved.ask
        try:
            check_start(ask, start)
        except ValueError as error:
            raise InvalidRequest(f"The work does not match the accepted question: {error}.") from error
        room = self._room(ask, self._match(start))
        if self.reservations.rejection(self.reservations.needs(room)) is not None:
            raise InstanceFailed("Fewer blocks of the prompt are cached than its prefix keys promised.")
        self._begin(reserved, start, room)

    def capacity(self) -> Capacity:
        """Returns how much more would be accepted now."""
        if not self.parts.accepting():
            return Capacity()
        supply = self.reservations.supply()
        return Capacity(
            slots_free=max(0, self.slots_total - self.slots_used),
            tokens_free=self._tokens_free(),
            blocks_free=max(0, supply.free - supply.next_step),
            starts_in_s=min(MAX_SECONDS, self._starts_in_s()),
        )

    def notify_gateways(self) -> None:
        parts = self.parts
        if self._notify_timer is not None:
            self._notify_timer.cancel()
            self._notify_timer = None
        if not parts.accepting():
            return
        gateway_id = self.rejections.next_gateway(self._would_accept, time.monotonic())
        if gateway_id is None:
            return
        event = SlotFreed(instance_id=parts.instance_id, group=parts.group(), role=self.verb, capacity=self.capacity())
        self.run(f"of gateway {gateway_id}", parts.outbox.slot_freed(gateway_id, event))
        if len(self.rejections):
            loop = asyncio.get_running_loop()
            self._notify_timer = loop.call_later(NOTIFY_NEXT_AFTER_S, parts.notify_gateways)

    def _consider(self, ask: Ask, trace_context: Context) -> RejectionReason | None:
        """Accepts a request, or returns why it is rejected. Raises RequestError where its work is invalid."""
        now = time.monotonic()
        arrived_at = now - ask.age_s
        reason = self._fact_rejection(ask)
        needs = NO_BLOCKS
        num_uncomputed = ask.num_tokens if self._is_prompt(ask) else 0
        if reason is None:
            if not self._is_valid(ask):
                return "invalid"
            room = self._room(ask, self._match(ask.start) if ask.start else self._estimated_match(ask))
            needs = self.reservations.needs(room)
            if num_uncomputed:
                num_uncomputed -= len(room.match.blocks) * self.parts.loaded.layout.block_size
            reason = self._block_rejection(ask.request_id, arrived_at, needs, is_canary=ask.is_canary)
            if reason is None and not ask.is_canary and not self._can_compute(num_uncomputed):
                reason = "busy"
        if reason is not None:
            if reason in NO_CAPACITY:
                self.num_rejected += 1
                if not ask.is_canary:
                    rejected = RejectedRequest(ask.request_id, ask.gateway_id, arrived_at, needs, num_uncomputed, now)
                    self.rejections.add(rejected, reason)
            return reason
        reservation = self.reservations.reserve(ask.request_id, arrived_at, room, is_counted=ask.start is not None)
        reserved = Reserved(
            ask=ask,
            reservation=reservation,
            arrived_at=arrived_at,
            deadline=now + ask.expires_in_s,
            num_uncomputed_tokens=num_uncomputed,
            trace_context=trace_context,
        )
        if ask.start is None:
            self._reserved[ask.request_id] = reserved
        else:
            self._hold(reserved, ask.start)
        return None

    def _fact_rejection(self, ask: Ask) -> RejectionReason | None:
        parts = self.parts
        return rejection(
            RequestFacts(
                epoch=ask.epoch,
                fingerprint=ask.fingerprint,
                is_known=self.knows(ask.request_id),
                expires_in_s=ask.expires_in_s,
                is_prompt=self._is_prompt(ask) and not ask.is_canary,
            ),
            InstanceFacts(
                epoch=parts.epoch(),
                fingerprint=parts.loaded.fingerprint,
                draining=not parts.accepting(),
                slots_free=1 if ask.is_canary else self.slots_total - self.slots_used,
                tokens_free=self._tokens_free(),
            ),
        )

    def _block_rejection(
        self, request_id: str, arrived_at: float, needs: BlockNeeds, *, is_canary: bool = False
    ) -> RejectionReason | None:
        older = None if is_canary else self.rejections.older_than(request_id, arrived_at, time.monotonic())
        return self.reservations.rejection(needs, older.needs if older else None)

    def _would_accept(self, request: RejectedRequest) -> bool:
        if self.slots_used >= self.slots_total or not self._can_compute(request.num_uncomputed_tokens):
            return False
        return self._block_rejection(request.request_id, request.arrived_at, request.needs) is None

    def _can_compute(self, num_prompt_tokens: int) -> bool:
        """Returns whether so many prompt tokens may be accepted; always if a request has none."""
        return num_prompt_tokens == 0 or can_start_next(num_prompt_tokens, self._tokens_free(), self._num_uncomputed())

    def _tokens_free(self) -> int:
        settings = self.parts.settings
        max_uncomputed = max(settings.max_step_tokens, settings.max_uncomputed_tokens)
        num_decode_rows = sum(held.in_engine and not held.computes_prompt for held in self._held.values())
        return tokens_free(max_uncomputed, num_decode_rows, self._num_uncomputed())

    def _num_uncomputed(self) -> int:
        """Returns the prompt tokens of accepted requests that are left after the step under way."""
        block_size = self.parts.loaded.layout.block_size
        num_held = sum(held.num_uncomputed_tokens(block_size) for held in self._held.values())
        return num_held + sum(reserved.num_uncomputed_tokens for reserved in self._reserved.values())

    def _starts_in_s(self) -> float:
        """Returns the seconds until everything is computed that comes before a prompt that is accepted now."""
        parts = self.parts
        parts.latency.observe(parts.work())
        block_size = parts.loaded.layout.block_size
        left = [(held.num_tokens, held.num_uncomputed_tokens(block_size)) for held in self._held.values()]
        left += [(reserved.ask.num_tokens, reserved.num_uncomputed_tokens) for reserved in self._reserved.values()]
        after = sum((PromptWork.of(num_tokens, num_tokens - num_left) for num_tokens, num_left in left), PromptWork())
        in_step = sum((held.work_in_step() for held in self._held.values()), PromptWork())
        return max(0.0, parts.latency.seconds(in_step) - parts.in_step_s()) + parts.latency.seconds(after)

    def _match(self, start: Start) -> Match:
        return self.parts.cache.match(start.token_ids, pending=self.shares_pending_blocks)

    def _estimated_match(self, ask: Ask) -> Match:
        """Which blocks are probably here of a request whose token ids are not known yet."""
        names = self._prefix_index.names(ask.prefix_keys)
        return self.parts.cache.match_names(names, ask.num_tokens, pending=self.shares_pending_blocks)

    def _begin(self, reserved: Reserved, start: Start, room: Room) -> None:
        """Starts a request whose first reservation is released. Raises RequestError if it is not for this model."""
        reserved.reservation = self.reservations.reserve(reserved.request_id, reserved.arrived_at, room)
        self._hold(reserved, start)

    def _hold(self, reserved: Reserved, start: Start) -> None:
        """Holds a request with its work, and begins that. Whatever is raised, nothing stays of the request.

        Raises:
            RequestError: it is not for this model.
        """
        try:
            self._hold_unguarded(reserved, start)
        except BaseException:
            held = self._held.pop(reserved.request_id, None)
            if held is not None:
                held.span.end()
            self.reservations.release(reserved.reservation, [])
            raise

    def _hold_unguarded(self, reserved: Reserved, start: Start) -> None:
        parts, ask, reservation = self.parts, reserved.ask, reserved.reservation
        sequence = Sequence(
            request_id=ask.request_id,
            token_ids=start.token_ids,
            num_prompt_tokens=ask.num_prompt_tokens,
            blocks=list(reservation.allocation.blocks),
            sampling=start.sampling,
            num_to_generate=self._num_to_generate(ask),
            num_shared_blocks=reservation.allocation.num_matched,
        )
        check(sequence, parts.loaded.vocab_size, parts.loaded.max_position_embeddings)
        self._prefix_index.remember(ask.prefix_keys, reservation.allocation.hashes)
        attributes: dict[str, str | int] = {
            tracing.INSTANCE_ID: parts.instance_id,
            tracing.REQUEST_ID: ask.request_id,
            tracing.NUM_PROMPT_TOKENS: ask.num_prompt_tokens,
            tracing.NUM_BLOCKS: len(sequence.blocks),
        }
        held = Held(
            request_id=ask.request_id,
            gateway_id=ask.gateway_id,
            num_tokens=ask.num_tokens,
            sequence=sequence,
            reservation=reservation,
            deadline=reserved.deadline,
            span=tracing.tracer.start_span(self.verb, reserved.trace_context, SpanKind.SERVER, attributes),
            accepted_at=reserved.accepted_at,
        )
        self._held[ask.request_id] = held
        self._work_on(held, ask)
