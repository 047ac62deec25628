"""Prefill: accept or refuse at once, compute, hand the first token to the gateway, hold the KV under a lease.

A slot is held from acceptance until the KV is fetched, so that slow decoding shows up as refusals here (P/D-Serve, 3.4:
on-demand forwarding), and there is no queue in which a request could be stuck.
"""

import secrets
import time

from opentelemetry import trace

from shared.bus.connection import Incoming
from shared.bus.messages import Answer, KVLease, Prefilled, PrefillRequest
from shared.engine.sequence import NewToken
from shared.instance.outbox import output_token
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
        num_tokens = len(request.token_ids)
        reason = self.refusal(request, num_tokens=num_tokens, deadline=incoming.deadline)
        if reason is not None:
            return Answer(accepted=False, reason=reason)
        sequence = self.sequence(request, num_tokens=num_tokens, num_computed_tokens=0, num_to_generate=1)
        span = tracing.tracer.start_span(
            "prefill",
            incoming.trace_context,
            trace.SpanKind.SERVER,
            {
                tracing.INSTANCE_ID: self.parts.instance_id,
                tracing.REQUEST_ID: request.request_id,
                tracing.NUM_PROMPT_TOKENS: num_tokens,
                tracing.NUM_BLOCKS: len(sequence.blocks),
            },
        )
        self.hold(Held(request.request_id, request.gateway_id, sequence, incoming.deadline, span, in_engine=True))
        self.parts.runner.add(sequence)
        return Answer(accepted=True)

    async def on_tokens(self, tokens: list[NewToken]) -> None:
        for token in tokens:
            held = self.holding(token.request_id)
            if held is not None:
                await self._finish(held, token)

    async def _finish(self, held: Held, token: NewToken) -> None:
        """The prompt is done: the token goes out at once; the KV waits to be fetched unless the request has ended."""
        held.in_engine = False
        held.span.add_event("first token")
        lease = self._lease(held) if token.finish_reason is None else None
        event = Prefilled(instance_id=self.parts.instance_id, token=output_token(token), lease=lease)
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
            views=parts.pool.byte_views(held.sequence.blocks, num_bytes),
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
