"""Decode: reserve, accept, fetch the KV in one chunk, decode with the others, tell each gateway once per step.

Room for some hundred tokens is reserved before a request is accepted, and again each time it is used up. A request for
which there is none then is given up: its gateway takes it, with all its tokens, to where there is room.
"""

from collections import defaultdict
from dataclasses import replace

from opentelemetry import trace
from opentelemetry.trace import Span

from shared.bus.connection import Incoming
from shared.bus.messages import Answer, DecodeRequest, KVLease, OutputToken
from shared.engine.sequence import NewToken, Sequence
from shared.errors import InstanceFailed, TransferFailed
from shared.instance.outbox import output_token
from shared.instance.role import Held, InstanceParts, Role
from shared.kv.fetcher import KVFetcher
from shared.telemetry import tracing


class DecodeRole(Role):
    verb = "decode"

    def __init__(self, parts: InstanceParts) -> None:
        super().__init__(parts)
        self._fetcher = KVFetcher(parts.loaded.layout, parts.settings.stall_timeout_s)

    @property
    def slots_total(self) -> int:
        return self.parts.settings.decode_slots

    def close(self) -> None:
        self._fetcher.close()

    async def take(self, incoming: Incoming) -> Answer:
        request = incoming.parse(DecodeRequest)
        num_to_generate = self._room(request)
        num_tokens = len(request.token_ids) + num_to_generate - 1
        reason = self.refusal(request, num_tokens=num_tokens, deadline=incoming.deadline)
        if reason is not None:
            return Answer(accepted=False, reason=reason)
        sequence = self.sequence(
            request,
            num_tokens=num_tokens,
            num_computed_tokens=request.lease.num_tokens,
            num_to_generate=num_to_generate,
        )
        span = self._span(request, incoming)
        held = Held(request.request_id, request.gateway_id, sequence, incoming.deadline, span)
        self.hold(held)
        held.transfer = self.parts.tasks.create_task(self._begin(held, request.lease))
        return Answer(accepted=True)

    async def on_tokens(self, tokens: list[NewToken]) -> None:
        by_gateway: dict[str, list[OutputToken]] = defaultdict(list)
        for token in tokens:
            held = self.holding(token.request_id)
            if held is None:
                continue
            by_gateway[held.gateway_id].append(output_token(token))
            held.span.set_attribute(tracing.NUM_OUTPUT_TOKENS, token.index + 1)
            if token.last:
                held.in_engine = False
                self._grow(held) if token.finish_reason is None else self.end(held)
        for gateway_id, for_gateway in by_gateway.items():
            await self.parts.outbox.tokens(gateway_id, for_gateway)

    async def _begin(self, held: Held, lease: KVLease) -> None:
        """Fetches the KV, then joins the running batch."""
        views = self.parts.pool.byte_views(held.sequence.blocks, lease.num_bytes)
        with tracing.tracer.start_as_current_span(
            "kv_transfer",
            trace.set_span_in_context(held.span),
            attributes={tracing.INSTANCE_ID: self.parts.instance_id, tracing.KV_BYTES: lease.num_bytes},
        ):
            try:
                await self._fetcher.fetch(lease, views, self.parts.settings.fetch_timeout_s)
            except TransferFailed as error:
                held.transfer = None
                self.end(held, InstanceFailed(f"the KV could not be fetched: {error}"))
                return
        held.transfer = None
        held.in_engine = True
        self.parts.runner.add(held.sequence)

    def _room(self, request: DecodeRequest | Sequence) -> int:
        """For how many more tokens to reserve blocks now (the last of them needs none)."""
        num_left = request.num_prompt_tokens + request.sampling.max_tokens - len(request.token_ids)
        return min(num_left, self.parts.settings.decode_reserve_tokens)

    def _grow(self, held: Held) -> None:
        """Reserves room for the next tokens and goes on; without room gives the request up, to be taken elsewhere."""
        before = held.sequence
        num_to_generate = self._room(before)
        num_blocks = self.parts.loaded.layout.num_blocks(len(before.token_ids) + num_to_generate - 1)
        more = self.parts.blocks.extend(before.blocks, num_blocks)
        if more is None:
            self.end(held, InstanceFailed("the KV pool is full"), counts=False)
            return
        held.sequence = replace(
            before,
            blocks=more,
            num_computed_tokens=len(before.token_ids) - 1,
            num_to_generate=num_to_generate,
            num_generated=0,
        )
        held.in_engine = True
        self.parts.runner.add(held.sequence)

    def _span(self, request: DecodeRequest, incoming: Incoming) -> Span:
        return tracing.tracer.start_span(
            "decode",
            incoming.trace_context,
            trace.SpanKind.SERVER,
            {
                tracing.INSTANCE_ID: self.parts.instance_id,
                tracing.REQUEST_ID: request.request_id,
                tracing.NUM_PROMPT_TOKENS: request.num_prompt_tokens,
            },
        )
