"""One request's way through prefill and decode, and over the failure of instances, to its last token.

    wait for a prefill instance -> first token and lease -> wait for a decode instance -> tokens

An attempt that an instance fails is followed by another that prefills the prompt and all tokens so far, so the client
sees one unbroken stream. Draws depend on seed and position alone, so it is also the stream that it would have been.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from services.gateway import policy
from services.gateway.api import FirstToken
from services.gateway.line import Line, Wish
from services.gateway.streams import AttemptFailed, Stream, Streams
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.bus.messages import Cancel, DecodeRequest, KVLease, OutputToken, Prefilled, PrefillRequest
from shared.errors import RETRY_AFTER_S, DeadlineExceeded, InstanceFailed, Overloaded
from shared.registry.records import InstanceRecord, Role
from shared.sampling import SamplingParams
from shared.settings import GatewaySettings
from shared.telemetry import tracing

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Generation:
    """A request: what was asked for, when it came, and what has been generated so far."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    deadline: float
    arrived_at: float = field(default_factory=time.time)
    output_token_ids: list[int] = field(default_factory=list)
    fingerprint: str | None = None
    """Of the weights that the request has begun with: it never goes on with others."""

    @property
    def has_begun(self) -> bool:
        return bool(self.output_token_ids)

    @property
    def num_tokens_at_end(self) -> int:
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids


class Generator:
    """Takes requests through the instances."""

    def __init__(
        self,
        settings: GatewaySettings,
        bus: Bus,
        streams: Streams,
        instances: Callable[[Role], list[InstanceRecord]],
        prefill_line: Line,
        decode_line: Line,
    ) -> None:
        self._settings = settings
        self._instances = instances
        self._bus = bus
        self._streams = streams
        self._prefill_line = prefill_line
        self._decode_line = decode_line

    async def generate(
        self, prompt_token_ids: list[int], sampling: SamplingParams, *, request_id: str, deadline: float
    ) -> AsyncGenerator[OutputToken, None]:
        """The tokens, one after another; the last has a finish reason. Closing the generator cancels the request
        everywhere.

        Args:
            request_id: unique among this gateway's open requests.
            deadline: of the whole request, in Unix seconds.

        Raises:
            RequestError: the request ends without being served to its end.
        """
        generation = Generation(request_id, prompt_token_ids, sampling, deadline)
        num_failures = 0
        attempt = 0
        while True:
            try:
                async with aclosing(self._attempt(generation, attempt)) as tokens:
                    async for token in tokens:
                        generation.output_token_ids.append(token.token_id)
                        yield token
                        if token.finish_reason is not None:
                            return
            except AttemptFailed as failure:
                log.warning("attempt %d at request %s failed: %s", attempt, generation.request_id, failure)
                num_failures += failure.counts
                if num_failures >= self._settings.max_attempts:
                    raise InstanceFailed(
                        f"{num_failures} instances failed this request, at last: {failure}"
                    ) from failure
            attempt += 1

    async def _attempt(self, generation: Generation, attempt: int) -> AsyncGenerator[OutputToken, None]:
        """One attempt, from prefill to the last token."""
        with self._streams.open(f"{generation.request_id}.{attempt}") as stream:
            try:
                prefill = await self._start_prefill(generation, stream)
                prefilled = await stream.prefilled(self._patience_s(generation))
                _check_index(prefilled.token, generation)
                token_ids = [*generation.token_ids, prefilled.token.token_id]
                yield prefilled.token if generation.has_begun else _first_token(prefilled)
                if prefilled.lease is None:
                    stream.holders.discard(prefill.id)
                    return
                decode = await self._start_decode(generation, stream, token_ids, prefilled.lease)
                async with aclosing(self._decode(generation, stream, prefill.id)) as tokens:
                    async for token in tokens:
                        yield token
                stream.holders.discard(decode.id)
            finally:
                await self._cancel(stream)
                self._prefill_line.hint()
                self._decode_line.hint()

    async def _decode(
        self, generation: Generation, stream: Stream, prefill_id: str
    ) -> AsyncGenerator[OutputToken, None]:
        while True:
            token = await stream.token(self._patience_s(generation))
            if prefill_id in stream.holders:
                # Decode has begun, so the KV was fetched. The cancel is for a slot whose acknowledgement got lost.
                stream.holders.discard(prefill_id)
                await self._tell_to_cancel(prefill_id, stream.request_id)
                self._prefill_line.hint()
            if token.index < len(generation.output_token_ids):
                continue
            _check_index(token, generation)
            yield token
            if token.finish_reason is not None:
                return

    async def _start_prefill(self, generation: Generation, stream: Stream) -> InstanceRecord:
        def request_for(instance: InstanceRecord) -> PrefillRequest:
            return PrefillRequest(
                request_id=stream.request_id,
                gateway_id=self._streams.gateway_id,
                epoch=instance.epoch,
                fingerprint=instance.fingerprint,
                token_ids=generation.token_ids,
                num_prompt_tokens=len(generation.prompt_token_ids),
                sampling=generation.sampling,
                arrived_at=generation.arrived_at,
            )

        until = generation.deadline
        if not generation.has_begun:
            until = min(until, time.time() + self._settings.ttft_timeout_s)

        def suits(instance: InstanceRecord) -> bool:
            decoders = self._instances("decode")
            return policy.can_prefill(generation.fingerprint, generation.num_tokens_at_end, decoders, instance)

        try:
            instance = await self._wait(
                self._prefill_line, "wait_prefill", stream, request_for, suits, until, generation
            )
        except TimeoutError as error:
            if until == generation.deadline:
                raise DeadlineExceeded("no prefill instance had a free slot before the request's deadline") from error
            raise Overloaded(
                f"no prefill instance had a free slot within {self._settings.ttft_timeout_s:g} s: try again later",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        generation.fingerprint = instance.fingerprint
        return instance

    async def _start_decode(
        self, generation: Generation, stream: Stream, token_ids: list[int], lease: KVLease
    ) -> InstanceRecord:
        def request_for(instance: InstanceRecord) -> DecodeRequest:
            return DecodeRequest(
                request_id=stream.request_id,
                gateway_id=self._streams.gateway_id,
                epoch=instance.epoch,
                fingerprint=instance.fingerprint,
                token_ids=token_ids,
                num_prompt_tokens=len(generation.prompt_token_ids),
                sampling=generation.sampling,
                arrived_at=generation.arrived_at,
                lease=lease,
            )

        until = min(generation.deadline, lease.expires_at)
        suits = partial(policy.can_decode, generation.fingerprint, generation.num_tokens_at_end)
        try:
            return await self._wait(self._decode_line, "wait_decode", stream, request_for, suits, until, generation)
        except TimeoutError as error:
            if until == generation.deadline:
                raise DeadlineExceeded("no decode instance had a free slot before the request's deadline") from error
            raise AttemptFailed(
                "no decode instance had a free slot before the lease on the KV ended", counts=False
            ) from error

    async def _wait(
        self,
        line: Line,
        name: str,
        stream: Stream,
        request_for: Callable[[InstanceRecord], PrefillRequest] | Callable[[InstanceRecord], DecodeRequest],
        suits: Callable[[InstanceRecord], bool],
        until: float,
        generation: Generation,
    ) -> InstanceRecord:
        # Not made current: what instances do for the request belongs to the request, not to this wait.
        span = tracing.tracer.start_span(name, attributes={tracing.REQUEST_ID: stream.request_id})
        wish = Wish(request_for, suits, stream.holders, until, generation.deadline, generation.has_begun)
        try:
            accepted = await line.ask(wish)
            span.set_attribute(tracing.INSTANCE_ID, accepted.instance.id)
            span.set_attribute(tracing.REFUSALS, accepted.num_refusals)
            return accepted.instance
        finally:
            span.end()

    async def _cancel(self, stream: Stream) -> None:
        """Tells whoever still may hold something of the attempt to let it go."""
        for instance_id in stream.holders:
            await self._tell_to_cancel(instance_id, stream.request_id)

    async def _tell_to_cancel(self, instance_id: str, request_id: str) -> None:
        await self._bus.publish(subjects.instance(instance_id, "cancel"), Cancel(request_ids=[request_id]))

    def _patience_s(self, generation: Generation) -> float:
        left = generation.deadline - time.time()
        if left <= 0:
            raise DeadlineExceeded("the request's deadline has passed")
        return min(left, self._settings.token_timeout_s)


def _first_token(prefilled: Prefilled) -> FirstToken:
    return FirstToken(**dict(prefilled.token), num_cached_tokens=prefilled.num_cached_tokens)


def _check_index(token: OutputToken, generation: Generation) -> None:
    if token.index != len(generation.output_token_ids):
        raise AttemptFailed(
            f"token {token.index} came where {len(generation.output_token_ids)} was due: messages are lost"
        )
