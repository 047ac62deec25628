"""Prefill: accept or refuse at once, compute, hand the first token to the gateway, hold the KV under a lease.

A slot is held from acceptance until the KV is fetched, so that slow decoding shows up as refusals here (P/D-Serve, 3.4:
on-demand forwarding), and there is no queue in which a request could be stuck.
"""

import time

from shared.bus.connection import Incoming
from shared.engine.sequence import NewToken
from shared.engine.work import PromptWork
from shared.instance.outbox import output_token
from shared.instance.pace import Pace
from shared.instance.parts import Held, InstanceParts
from shared.instance.reservations import Room
from shared.instance.role import Role
from shared.messages.serving import AskReply, InstanceRequest, Prefilled, PrefillRequest, RejectionReason
from shared.telemetry import tracing


class PrefillRole(Role):
    verb = "prefill"

    def __init__(self, parts: InstanceParts) -> None:
        super().__init__(parts)
        self._pace = Pace(parts.settings.max_step_tokens)

    @property
    def slots_total(self) -> int:
        return self.parts.settings.prefill_slots

    async def take(self, incoming: Incoming) -> AskReply:
        request = incoming.parse(PrefillRequest)
        room = self.admit(request, incoming.deadline, lambda: self._room(request))
        if not isinstance(room, Room):
            return AskReply(accepted=False, reason=room)
        expected_s = self._expected_s(request, room)
        held = self.hold(request, room, incoming, num_to_generate=1)
        held.expected_s = expected_s
        # From now on requests that begin alike share its blocks: they follow while the engine fills them.
        self.parts.cache.name(held.reservation.allocation, request.token_ids)
        held.in_engine = True
        self.parts.runner.add(held.sequence)
        return AskReply(accepted=True)

    def _room(self, request: PrefillRequest) -> Room:
        num_blocks = self.parts.loaded.layout.num_blocks(len(request.token_ids))
        return Room(self.parts.cache.match(request.token_ids, pending=True), num_blocks, num_blocks)

    def lateness(self, request: InstanceRequest, room: Room) -> RejectionReason | None:
        """An instance that was slow once, and refuses all, would never learn that it is quick again: so it tries."""
        if not isinstance(request, PrefillRequest) or request.first_token_by is None:
            return None
        if not self.is_computing and self._pace.is_old():
            return None
        seconds = self._pace.promised_s(self._expected_s(request, room))
        return "no_time" if time.time() + seconds > request.first_token_by else None

    def _expected_s(self, request: PrefillRequest, room: Room) -> float:
        """Prompts are computed one after another: this one when all that are here are done."""
        parts = self.parts
        num_cached = len(room.match.blocks) * parts.loaded.layout.block_size
        self._pace.look(parts.work())
        ahead_s = max(0.0, self._pace.seconds(self.uncomputed()) - parts.in_step_s())
        return ahead_s + self._pace.seconds(PromptWork.of(len(request.token_ids), num_cached))

    async def on_tokens(self, tokens: list[NewToken]) -> None:
        for token in tokens:
            held = self.holding(token.request_id)
            if held is not None:
                await self._finish(held, token)

    async def _finish(self, held: Held, token: NewToken) -> None:
        """The prompt is done: the token goes out at once; the KV waits to be fetched unless the request has ended."""
        self._pace.took(time.monotonic() - held.accepted_at, held.expected_s)
        held.in_engine = False
        held.span.add_event("first token")
        held.span.set_attribute(tracing.NUM_CACHED_TOKENS, held.sequence.num_cached_tokens)
        lease = self.lease(held) if token.finish_reason is None else None
        event = Prefilled(
            instance_id=self.parts.instance_id,
            token=output_token(token),
            lease=lease,
            num_cached_tokens=held.sequence.num_cached_tokens,
        )
        await self.parts.outbox.prefilled(held.gateway_id, event)
        if lease is None:
            self.end(held)
