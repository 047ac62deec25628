"""Decode: reserve, accept, fetch the KV that is not here in one chunk, decode with the others, tell gateways each step.

Room for some hundred tokens is reserved before a request is accepted, and again each time it is used up. A request for
which there is none then waits, out of the engine, until there is; so that there will be, the youngest request is given
up: its gateway takes it, with all its tokens, to where there is room.
"""

import asyncio
import time
from collections import defaultdict
from dataclasses import replace

from opentelemetry import trace

from shared.engine.prefix_cache import Match
from shared.engine.sequence import NewToken, Sequence
from shared.errors import InstanceFailed, TransferFailed
from shared.instance.accepting import AcceptingRole
from shared.instance.outbox import Failure, output_token
from shared.instance.parts import Held, InstanceParts
from shared.instance.reservations import Room
from shared.kv.fetcher import KVFetcher
from shared.messages.serving import Ask, KVLease, Moved, OutputToken
from shared.telemetry import tracing


class DecodeRole(AcceptingRole):
    verb = "decode"
    can_move = True

    def __init__(self, parts: InstanceParts) -> None:
        super().__init__(parts, step_tokens=parts.settings.decode_reserve_tokens)
        self._moves = False
        self._fetcher = KVFetcher(parts.loaded.layout, parts.settings.stall_timeout_s)

    @property
    def slots_total(self) -> int:
        return self.parts.settings.decode_slots

    def close(self) -> None:
        self._fetcher.close()

    def _is_prompt(self, ask: Ask) -> bool:
        return ask.lease is None

    def _is_valid(self, ask: Ask) -> bool:
        layout, lease = self.parts.loaded.layout, ask.lease
        return lease is None or lease.num_bytes == layout.num_blocks(lease.num_tokens) * layout.block_bytes

    def _num_to_generate(self, ask: Ask) -> int:
        return self._num_reserved(ask.num_prompt_tokens + ask.max_tokens - ask.num_tokens)

    def _room(self, ask: Ask, match: Match) -> Room:
        layout = self.parts.loaded.layout
        return Room(
            match=match,
            num_blocks=layout.num_blocks(ask.num_tokens + self._num_to_generate(ask) - 1),
            max_blocks=layout.num_blocks(ask.num_prompt_tokens + ask.max_tokens - 1),
        )

    def _work_on(self, held: Held, ask: Ask) -> None:
        if ask.lease is None:
            self._compute(held)
        else:
            held.transfer = self.run(held.request_id, self._fetch(held, ask.lease))

    async def on_tokens(self, tokens: list[NewToken]) -> None:
        by_gateway: dict[str, list[OutputToken]] = defaultdict(list)
        growing: list[Held] = []
        now = time.monotonic()
        for token in tokens:
            held = self.holding(token.request_id)
            if held is None:
                continue
            by_gateway[held.gateway_id].append(_told(token, held))
            held.changed_at = now
            held.span.set_attribute(tracing.NUM_OUTPUT_TOKENS, token.index + 1)
            if not token.last:
                continue
            held.in_engine = False
            if token.finish_reason is None:
                growing.append(held)
            else:
                self.end(held)
        if not self._moves:
            for held in growing:
                self._want_room(held)
        for gateway_id, for_gateway in by_gateway.items():
            request_ids = [token.request_id for token in for_gateway]
            await self.guard(request_ids, self.parts.outbox.tokens(gateway_id, for_gateway))
        if growing:
            # Only now: who is given up is told so behind its last token.
            self.room_came_free()

    async def move_all(self) -> None:
        """Takes every request out of the batch and keeps its KV for another decode instance to fetch."""
        await super().move_all()
        self._moves = True
        moving = [held for held in self._held.values() if held.lease_id is None and not held.ending]
        transfers = [held.transfer for held in moving if held.transfer is not None]
        if transfers:
            await asyncio.wait(transfers)
        await self.parts.runner.remove([held.request_id for held in moving])
        await self.parts.told()
        for held in moving:
            if not held.ending and held.lease_id is None:
                await self._move(held)

    async def _move(self, held: Held) -> None:
        held.in_engine = False
        if held.computes_prompt:
            error = InstanceFailed("this instance changes its role, and has not prefilled yet")
            self.end(held, Failure(error, counts=False))
            return
        held.reservation.wanted_blocks = None
        held.reservation.max_blocks = len(held.reservation.allocation.blocks)
        held.span.add_event("moved")
        event = Moved(instance_id=self.parts.instance_id, request_id=held.request_id, lease=self.lease(held))
        await self.parts.outbox.moved(held.gateway_id, event)

    def _compute(self, held: Held) -> None:
        """A prompt so short that handing its KV over would take longer: the engine prefills it beside its decodes."""
        held.computes_prompt = True
        held.in_engine = True
        self.parts.runner.add(held.sequence)

    async def _fetch(self, held: Held, lease: KVLease) -> None:
        """Fetches the KV that is not here, then joins the running batch."""
        parts = self.parts
        allocation = held.reservation.allocation
        num_matched = allocation.num_matched
        num_bytes = lease.num_bytes - num_matched * parts.loaded.layout.block_bytes
        parcel = parts.staging.receive(allocation.blocks[num_matched:], num_bytes)
        with tracing.tracer.start_as_current_span(
            "kv_transfer",
            trace.set_span_in_context(held.span),
            attributes={tracing.INSTANCE_ID: parts.instance_id, tracing.KV_BYTES: num_bytes},
        ):
            try:
                await self._fetcher.fetch(lease, parcel.views, parts.settings.fetch_timeout_s, skip_blocks=num_matched)
            except TransferFailed as error:
                held.transfer = None
                failed = InstanceFailed(f"the KV could not be fetched: {error}")
                self.end(held, Failure(failed, kv_source_id=lease.instance_id))
                return
            await parcel.settle()
        held.transfer = None
        held.sequence.num_computed_tokens = lease.num_tokens
        parts.cache.fill(allocation, held.sequence.token_ids[: lease.num_tokens])
        held.in_engine = True
        parts.runner.add(held.sequence)

    def _num_reserved(self, num_left: int) -> int:
        """For how many of the tokens that are left to reserve blocks now (the last of them needs none)."""
        return min(num_left, self.parts.settings.decode_reserve_tokens)

    def _num_to_continue(self, sequence: Sequence) -> int:
        return self._num_reserved(sequence.sampling.max_tokens - sequence.output_index)

    def _want_room(self, held: Held) -> None:
        """Asks for blocks for the next tokens; the KV so far is for others to find."""
        sequence = held.sequence
        self.parts.cache.fill(held.reservation.allocation, sequence.token_ids[: sequence.num_computed_tokens])
        num_tokens = len(sequence.token_ids) + self._num_to_continue(sequence) - 1
        held.reservation.wanted_blocks = self.parts.loaded.layout.num_blocks(num_tokens)

    def room_came_free(self) -> None:
        """Requests that wait go on where there is room now; where there is not, the youngest of all is given up."""
        if self._moves:
            return
        for reservation in self.reservations.grow():
            self._go_on(self._held[reservation.request_id])
        victim = self.reservations.victim()
        if victim is not None:
            error = InstanceFailed("the KV pool is full, and this is the youngest request")
            self.end(self._held[victim], Failure(error, counts=False))

    def _go_on(self, held: Held) -> None:
        before = held.sequence
        held.sequence = replace(
            before,
            blocks=list(held.reservation.allocation.blocks),
            num_to_generate=self._num_to_continue(before),
            num_generated=0,
        )
        held.in_engine = True
        self.parts.runner.add(held.sequence)


def _told(token: NewToken, held: Held) -> OutputToken:
    """The token as it travels; the first of a prompt that was computed here says how much of it was cached."""
    told = output_token(token)
    if not held.computes_prompt:
        return told
    held.computes_prompt = False
    return told.model_copy(update={"num_cached_tokens": held.sequence.num_cached_tokens})
