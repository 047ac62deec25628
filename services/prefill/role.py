"""Prefill: accept or refuse at once, compute, hand the first token to the gateway, hold the KV under a lease.

A slot is held from acceptance until the KV is fetched, so that slow decoding shows up as refusals here (P/D-Serve, 3.4:
on-demand forwarding), and there is no queue in which a request could be stuck.
"""

import secrets
import time

from shared.bus.connection import Incoming
from shared.bus.messages import Answer, KVLease, Prefilled, PrefillRequest
from shared.engine.sequence import NewToken
from shared.instance.outbox import output_token
from shared.instance.reservations import Room
from shared.instance.role import Held, Role
from shared.kv.holder import Lease
from shared.telemetry import tracing


class PrefillRole(Role):
    verb = "prefill"

    @property
    def slots_total(self) -> int:
        return self.parts.settings.prefill_slots

    async def take(self, incoming: Incoming) -> Answer:
        request = incoming.parse(PrefillRequest)
        room = self.admit(request, incoming.deadline, lambda: self._room(request))
        if not isinstance(room, Room):
            return Answer(accepted=False, reason=room)
        held = self.hold(request, room, incoming, num_to_generate=1)
        # From now on requests that begin alike share its blocks: they follow while the engine fills them.
        self.parts.cache.name(held.reservation.allocation, request.token_ids)
        held.in_engine = True
        self.parts.runner.add(held.sequence)
        return Answer(accepted=True)

    def _room(self, request: PrefillRequest) -> Room:
        num_blocks = self.parts.loaded.layout.num_blocks(len(request.token_ids))
        return Room(self.parts.cache.match(request.token_ids, pending=True), num_blocks, num_blocks)

    async def on_tokens(self, tokens: list[NewToken]) -> None:
        for token in tokens:
            held = self.holding(token.request_id)
            if held is not None:
                await self._finish(held, token)

    async def _finish(self, held: Held, token: NewToken) -> None:
        """The prompt is done: the token goes out at once; the KV waits to be fetched unless the request has ended."""
        held.in_engine = False
        held.span.add_event("first token")
        held.span.set_attribute(tracing.NUM_CACHED_TOKENS, held.sequence.num_cached_tokens)
        lease = self._lease(held) if token.finish_reason is None else None
        event = Prefilled(
            instance_id=self.parts.instance_id,
            token=output_token(token),
            lease=lease,
            num_cached_tokens=held.sequence.num_cached_tokens,
        )
        await self.parts.outbox.prefilled(held.gateway_id, event)
        if lease is None:
            self.end(held)

    def _lease(self, held: Held) -> KVLease:
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
        return KVLease(
            lease_id=lease.lease_id,
            instance_id=parts.instance_id,
            host=parts.holder.host,
            port=parts.holder.port,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            expires_at=lease.expires_at,
        )
