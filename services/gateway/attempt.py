"""One attempt at a request: a prefill instance, a decode instance, and whoever goes on when that one gives it up.

    wait for a prefill instance -> first token and lease -> wait for a decode instance -> tokens

A decode instance that changes its role gives the request back with its KV (`moved`), and another goes on with it. A
short prompt may stay at a decode instance altogether.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from services.gateway import affinity, policy
from services.gateway.api import FirstToken
from services.gateway.costs import Gaps
from services.gateway.generation import Generation
from services.gateway.groups import Group
from services.gateway.line import Line, NobodyHere, TooLate, Wish
from services.gateway.streams import AttemptFailed, Stream, Streams
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import RETRY_AFTER_S, DeadlineExceeded, Overloaded
from shared.messages.records import InstanceRecord
from shared.messages.serving import Cancel, DecodeRequest, KVLease, Moved, OutputToken, PrefillRequest
from shared.sampling import SamplingParams
from shared.settings import GatewaySettings
from shared.telemetry import tracing

LOCAL_PATIENCE_S = 0.05
"""How long a short prompt waits for a decode instance that computes it itself, before it goes the usual way."""


@dataclass(slots=True)
class Attempt:
    """One attempt at `generation`, in one group; what instances say comes in `stream`.

    Args:
        is_elsewhere: whether another group can serve the request, and this one not any more.
    """

    settings: GatewaySettings
    bus: Bus
    streams: Streams
    group: Group
    generation: Generation
    stream: Stream
    is_elsewhere: Callable[[], bool]

    async def tokens(self) -> AsyncGenerator[OutputToken, None]:
        """To the last token. Raises `AttemptFailed` where another attempt may do better, or a RequestError."""
        try:
            local = await self._stay_at_decode()
            tokens = self._hand_over() if local is None else self._all_at_decode(local)
            async with aclosing(tokens):
                async for token in tokens:
                    yield token
        finally:
            await self._let_go()
            self.group.hint()

    async def _hand_over(self) -> AsyncGenerator[OutputToken, None]:
        """Prefill at one instance, decode at another."""
        generation = self.generation
        prefill = await self._start_prefill()
        accepted_at = time.monotonic()
        prefilled = await self.stream.prefilled(self._patience_s())
        num_computed = len(generation.token_ids) - prefilled.num_cached_tokens
        self.group.costs.prefilled(time.monotonic() - accepted_at, num_computed)
        self._check_index(prefilled.token)
        token_ids = [*generation.token_ids, prefilled.token.token_id]
        if prefilled.lease is None:
            self.stream.holders.discard(prefill.id)
        yield self._told(prefilled.token, prefilled.num_cached_tokens)
        async with aclosing(self._go_on(token_ids, prefilled.lease)) as tokens:
            async for token in tokens:
                yield token

    async def _all_at_decode(self, decode: InstanceRecord) -> AsyncGenerator[OutputToken, None]:
        """Prefill and decode at one decode instance; at another if that one moves the request."""
        handover = _Handover(decode.id)
        async with aclosing(self._decode(handover)) as tokens:
            async for token in tokens:
                if token.finish_reason is not None:
                    self.stream.holders.discard(decode.id)
                yield self._told(token, token.num_cached_tokens or 0)
        async with aclosing(self._go_on(self.generation.token_ids, handover.moved)) as tokens:
            async for token in tokens:
                yield token

    async def _go_on(self, token_ids: list[int], lease: KVLease | None) -> AsyncGenerator[OutputToken, None]:
        """From one decode instance to the next, as long as somebody keeps the KV for another; to the last token."""
        while lease is not None:
            gaps = Gaps()
            decode = await self._start_decode(token_ids, lease)
            handover = _Handover(lease.instance_id)
            async with aclosing(self._decode(handover)) as tokens:
                async for token in tokens:
                    if gaps.are_measured():
                        self.group.costs.decoded(*gaps.seconds)
                    if token.finish_reason is not None:
                        self.stream.holders.discard(decode.id)
                    yield token
            token_ids, lease = self.generation.token_ids, handover.moved

    async def _decode(self, handover: "_Handover") -> AsyncGenerator[OutputToken, None]:
        """Tokens of one decode instance: to the last, or until it moves the request (`handover.moved`)."""
        while True:
            event = await self.stream.token_or_move(self._patience_s())
            if handover.source_id in self.stream.holders and handover.source_id != event.instance_id:
                # Decode has begun, so the KV was fetched. The cancel is for a slot whose acknowledgement got lost.
                self.stream.holders.discard(handover.source_id)
                await self._tell_to_cancel(handover.source_id)
                self.group.prefill_line.hint()
            if isinstance(event, Moved):
                self._check_move(event)
                handover.moved = event.lease
                return
            token = event.token
            if token.index < len(self.generation.output_token_ids):
                continue
            self._check_index(token)
            yield token
            if token.finish_reason is not None:
                return

    async def _start_prefill(self) -> InstanceRecord:
        generation = self.generation
        first_token_by = generation.first_token_by(self.group.map.ttft_s)
        until = generation.deadline
        if not generation.has_begun:
            until = min(until, first_token_by or generation.arrived_at + self.settings.ttft_timeout_s)

        def request_for(instance: InstanceRecord) -> PrefillRequest:
            return PrefillRequest(
                **self._common(instance), token_ids=generation.token_ids, first_token_by=first_token_by
            )

        def suits(instance: InstanceRecord) -> bool:
            decoders = self.group.ready("decode")
            return policy.can_prefill(generation.fingerprint, generation.num_tokens_at_end, decoders, instance)

        waits_since = time.monotonic()
        try:
            instance = await self._wait(self.group.prefill_line, "wait_prefill", request_for, suits, until)
        except (TimeoutError, TooLate) as error:
            if until == generation.deadline:
                raise DeadlineExceeded("no prefill instance had a free slot before the request's deadline") from error
            within_s = self.group.map.ttft_s if first_token_by is not None else until - generation.arrived_at
            raise Overloaded(
                f"no prefill instance can give the first token within {within_s:g} s: try again later",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        self.group.costs.wait_s.add(time.monotonic() - waits_since)
        generation.fingerprint = instance.fingerprint
        return instance

    async def _start_decode(self, token_ids: list[int], lease: KVLease) -> InstanceRecord:
        generation = self.generation
        until = min(generation.deadline, lease.expires_at)
        suits = partial(policy.can_decode, generation.fingerprint, generation.num_tokens_at_end)
        request_for = self._decode_request(token_ids, lease)
        try:
            waiting = self._wait(self.group.decode_line, "wait_decode", request_for, suits, until)
            return await self.stream.unless_failed(waiting)
        except TimeoutError as error:
            if until == generation.deadline:
                raise DeadlineExceeded("no decode instance had a free slot before the request's deadline") from error
            raise AttemptFailed(
                "no decode instance had a free slot before the lease on the KV ended", counts=False
            ) from error

    async def _stay_at_decode(self) -> InstanceRecord | None:
        """The decode instance that has accepted to prefill the request itself; None if it goes the usual way."""
        is_needed = self._has_no_prefill_left()
        if not is_needed and not self._is_quicker_at_decode():
            return None

        def suits(instance: InstanceRecord) -> bool:
            fingerprint = self.generation.fingerprint or instance.fingerprint
            return policy.can_decode(fingerprint, self.generation.num_tokens_at_end, instance)

        request_for = self._decode_request(self.generation.token_ids, None)
        until = self.generation.deadline if is_needed else min(self.generation.deadline, time.time() + LOCAL_PATIENCE_S)
        try:
            instance = await self._wait(self.group.decode_line, "wait_decode", request_for, suits, until)
        except (TimeoutError, Overloaded) as error:
            if is_needed:
                raise DeadlineExceeded("no decode instance had a free slot before the request's deadline") from error
            await self._let_go()  # one may have accepted whose answer had not come
            return None
        self.generation.fingerprint = instance.fingerprint
        return instance

    def _has_no_prefill_left(self) -> bool:
        """Whether the weights that the request has begun with are left at decode instances only: late in an upgrade."""
        fingerprint = self.generation.fingerprint
        prefill = {one.fingerprint for one in self.group.ready("prefill")}
        decode = {one.fingerprint for one in self.group.ready("decode")}
        return self.generation.has_begun and bool(prefill) and fingerprint not in prefill and fingerprint in decode

    def _is_not_for_prefill(self) -> bool:
        """Whether the request can be served, but by no prefill instance of this group any more."""
        return self.is_elsewhere() or self._has_no_prefill_left()

    def _is_quicker_at_decode(self) -> bool:
        """Whether a decode instance had better compute the prompt itself; only for requests that begin."""
        decoders = self.group.ready("decode")
        if self.settings.local_prefill == "off" or self.generation.has_begun or not decoders:
            return False
        num_open = self.streams.num_open()
        num_rows = 1 + min(num_open[one.id] for one in decoders)
        return self.group.costs.is_quicker_at_decode(len(self.generation.prompt_token_ids), num_rows)

    def _decode_request(self, token_ids: list[int], lease: KVLease | None) -> Callable[[InstanceRecord], DecodeRequest]:
        return lambda instance: DecodeRequest(**self._common(instance), token_ids=token_ids, lease=lease)

    def _common(self, instance: InstanceRecord) -> "_Common":
        """What requests to either role say."""
        return {
            "request_id": self.stream.request_id,
            "gateway_id": self.streams.gateway_id,
            "epoch": instance.epoch,
            "fingerprint": instance.fingerprint,
            "num_prompt_tokens": len(self.generation.prompt_token_ids),
            "sampling": self.generation.sampling,
            "arrived_at": self.generation.arrived_at,
        }

    async def _wait(
        self,
        line: Line,
        name: str,
        request_for: Callable[[InstanceRecord], PrefillRequest] | Callable[[InstanceRecord], DecodeRequest],
        suits: Callable[[InstanceRecord], bool],
        until: float,
    ) -> InstanceRecord:
        """Stands in a line until an instance accepts, under a span of that name."""
        generation = self.generation
        # Not made current: what instances do for the request belongs to the request, not to this wait.
        attributes = {tracing.REQUEST_ID: self.stream.request_id, tracing.GROUP: self.group.name}
        span = tracing.tracer.start_span(name, attributes=attributes)
        matched = self.group.affinity.matched(generation.prefix_keys)
        wish = Wish(
            request_for,
            suits,
            self.stream.holders,
            until,
            generation.deadline,
            generation.has_begun,
            generation.fingerprint,
            generation.is_batch,
            affinity.shares(matched, len(generation.prompt_token_ids)),
            self._is_not_for_prefill if line is self.group.prefill_line else self.is_elsewhere,
        )
        try:
            accepted = await line.ask(wish)
        except NobodyHere as error:
            raise AttemptFailed(f"group {self.group.name}: {error}", counts=False) from error
        else:
            span.set_attribute(tracing.INSTANCE_ID, accepted.instance.id)
            span.set_attribute(tracing.REFUSALS, accepted.num_refusals)
            self.group.affinity.remember(accepted.instance.id, generation.prefix_keys)
            return accepted.instance
        finally:
            span.end()

    async def _let_go(self) -> None:
        """Tells whoever still may hold something of the attempt to cancel it, and hears them no more."""
        for instance_id in list(self.stream.holders):
            self.stream.holders.discard(instance_id)
            await self._tell_to_cancel(instance_id)

    async def _tell_to_cancel(self, instance_id: str) -> None:
        await self.bus.publish(subjects.instance(instance_id, "cancel"), Cancel(request_ids=[self.stream.request_id]))

    def _patience_s(self) -> float:
        left = self.generation.deadline - time.time()
        if left <= 0:
            raise DeadlineExceeded("the request's deadline has passed")
        return min(left, self.settings.token_timeout_s)

    def _told(self, token: OutputToken, num_cached_tokens: int) -> OutputToken:
        """The token as the client's side gets it: the request's first one says more."""
        if self.generation.has_begun:
            return token
        fields = dict(token) | {"num_cached_tokens": num_cached_tokens}
        return FirstToken(**fields, scenario=self.group.map.scenario)

    def _check_index(self, token: OutputToken) -> None:
        due = len(self.generation.output_token_ids)
        if token.index != due:
            raise AttemptFailed(f"token {token.index} came where {due} was due: messages are lost")

    def _check_move(self, moved: Moved) -> None:
        num_tokens = len(self.generation.token_ids)
        if moved.lease.num_tokens != num_tokens - 1:
            raise AttemptFailed(f"a request of {num_tokens} tokens moves with the KV of {moved.lease.num_tokens}")


class _Common(TypedDict):
    request_id: str
    gateway_id: str
    epoch: int
    fingerprint: str
    num_prompt_tokens: int
    sampling: SamplingParams
    arrived_at: float


@dataclass(slots=True)
class _Handover:
    """From whom a decode instance fetches, and the lease under which it gives the request on, if it does."""

    source_id: str
    moved: KVLease | None = None
