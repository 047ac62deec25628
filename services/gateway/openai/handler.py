"""One generating request: read and check it, serve its choices together, and write their tokens as they arrive."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Generic

from opentelemetry.trace import get_current_span
from starlette.types import Receive, Scope, Send

from services.gateway.api import ApiContext
from services.gateway.openai.completion import Completion, Json
from services.gateway.openai.idempotency import IdempotentAnswers
from services.gateway.openai.middleware import RequestContext, connected, first_error
from services.gateway.openai.schemas import Schema, parse_request
from services.gateway.openai.sse import EventStream
from services.gateway.request import Request
from shared.errors import DeadlineExceeded
from shared.messages.serving import OutputToken
from shared.telemetry import tracing

GRACE_S = 1.0
"""The core keeps the deadline and knows better what it waited for; this bounds what the core does not see."""
LARGE_BODY_BYTES = 256 * 2**10
"""Larger bodies are parsed in a thread, so that other streams go on."""
MAX_TOKENS_PER_WRITE = 256
"""Of tokens that have waited for a slow client, so that what is written together stays small."""

Prepare = Callable[[ApiContext, RequestContext, Schema], Awaitable[Completion]]


class Handler(Generic[Schema]):
    """An ASGI application that serves one path's requests.

    Args:
        schema: what a body must be.
        prepare: makes the completion that a body asks for, or raises a RequestError.
        answers: answers of requests with an Idempotency-Key; None ignores such keys.
    """

    def __init__(
        self, api: ApiContext, schema: type[Schema], prepare: Prepare[Schema], answers: IdempotentAnswers | None
    ) -> None:
        self._api = api
        self._schema = schema
        self._prepare = prepare
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = RequestContext.of(scope)
        body = await context.read_body(self._api.max_body_bytes)
        async with connected(context):
            if self._answers is None or "idempotency-key" not in context.headers:
                await self._serve(context, body, send)
            else:
                serve = partial(self._serve, context, body)
                await self._answers.follow(scope["path"], context.headers, body, serve, send)

    async def _serve(self, context: RequestContext, body: bytes, send: Send) -> None:
        timeout_s = self._api.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                parse = partial(parse_request, self._schema, body, context.headers)
                request = await asyncio.to_thread(parse) if len(body) > LARGE_BODY_BYTES else parse()
                completion = await self._prepare(self._api, context, request)
                try:
                    await self._generate(completion, send)
                finally:
                    self._describe(context, completion)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        except TimeoutError as error:
            raise DeadlineExceeded(f"The request was not done within {timeout_s:g} s.") from error

    async def _generate(self, completion: Completion, send: Send) -> None:
        """Writes all events of a batch of tokens together, or the whole response once all choices are finished."""
        choices, writer, stream = completion.choices, completion.writer, EventStream(send)
        self._api.metrics.prompt_tokens.inc(completion.num_prompt_tokens)
        async with self._api.core.serving([choice.request for choice in choices]):
            while completion.num_open:
                batch = await completion.output.read()
                for start in range(0, len(batch), MAX_TOKENS_PER_WRITE):
                    events = self._feed(completion, batch[start : start + MAX_TOKENS_PER_WRITE])
                    await stream.write(events, is_last=completion.stream and not completion.num_open)
                    if not completion.num_open:
                        break
            if not completion.stream:
                await stream.respond(writer.whole([choice.whole() for choice in choices], completion.usage()))

    def _feed(self, completion: Completion, batch: Sequence[tuple[Request, OutputToken]]) -> list[Json]:
        """Turns tokens into the events of a stream; keeps what they add if there is none."""
        now = time.monotonic()
        events: list[Json] = []
        for request, token in batch:
            choice = completion.choices[request.choice]
            if choice.finish_reason is not None:
                continue  # generated after a stop string
            delta = choice.feed(token, now)
            if delta.finish_reason is not None:
                completion.num_open -= 1
                if token.finish_reason is None:
                    self._api.core.finish(request)
            if not completion.stream:
                choice.deltas.append(delta)
            elif delta.text or delta.finish_reason or completion.sends_empty:
                events.append(completion.writer.chunk(request.choice, delta))
        if completion.stream and completion.include_usage and not completion.num_open:
            events.append(completion.writer.usage_chunk(completion.usage()))
        return events

    def _describe(self, context: RequestContext, completion: Completion) -> None:
        span = get_current_span()
        if span.is_recording():
            span.set_attribute(tracing.REQUEST_ID, context.request_id)
            span.set_attribute("pdserve.model", self._api.served_model_name)
            span.set_attribute(tracing.NUM_PROMPT_TOKENS, completion.num_prompt_tokens)
            span.set_attribute(tracing.NUM_OUTPUT_TOKENS, sum(choice.num_tokens for choice in completion.choices))
            span.set_attribute("pdserve.finish_reasons", [choice.finish_reason or "" for choice in completion.choices])
