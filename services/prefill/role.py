"""Prefill: accept or reject at once, compute, hand the first token to the gateway, hold the KV under a lease.

A slot is held from acceptance until the KV is fetched, so that slow decoding shows up as rejections here (P/D-Serve,
3.4: on-demand forwarding). Work that is not computed yet is bounded by what fits into the next engine step, so there is
no queue in which a request could be stuck.
"""

import time

from shared.engine.prefix_cache import Match
from shared.engine.sequence import NewToken
from shared.instance.accepting import AcceptingRole
from shared.instance.outbox import output_token
from shared.instance.parts import Held
from shared.instance.reservations import Room
from shared.messages.serving import Ask, Prefilled
from shared.telemetry import tracing


class PrefillRole(AcceptingRole):
    verb = "prefill"
    shares_pending_blocks = True

    @property
    def slots_total(self) -> int:
        return self.parts.settings.prefill_slots

    def _is_prompt(self, ask: Ask) -> bool:
        return True

    def _is_valid(self, ask: Ask) -> bool:
        return True

    def _num_to_generate(self, ask: Ask) -> int:
        return 1

    def _room(self, ask: Ask, match: Match) -> Room:
        num_blocks = self.parts.loaded.layout.num_blocks(ask.num_tokens)
        return Room(match, num_blocks, num_blocks)

    def _work_on(self, held: Held, ask: Ask) -> None:
        # From now on requests that begin alike share its blocks: they follow while the engine fills them.
        self.parts.cache.name(held.reservation.allocation, held.sequence.token_ids)
        held.computes_prompt = True
        held.in_engine = True
        self.parts.runner.add(held.sequence)

    async def on_tokens(self, tokens: list[NewToken]) -> None:
        for token in tokens:
            held = self.holding(token.request_id)
            if held is not None:
                await self.guard([held.request_id], self._finish(held, token))

    async def _finish(self, held: Held, token: NewToken) -> None:
        """The prompt is done: the token goes out at once; the KV waits to be fetched unless the request has ended."""
        held.in_engine = False
        held.computes_prompt = False
        held.changed_at = time.monotonic()
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
