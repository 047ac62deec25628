"""The way of one request through an endpoint: read, prepare, run the choices together, and answer."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import TypeVar

from opentelemetry.trace import get_current_span
from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.api import ApiContext
from shared.text.text_stream import TextDelta, complete
from services.gateway.telemetry import ChoiceTimer
from services.gateway.openai.body import read_object
from services.gateway.openai.exchange import Exchange
from services.gateway.openai.job import Choice, Collected, Job, Usage
from services.gateway.openai.sse import EventStream
from shared.errors import Cancelled, DeadlineExceeded
from shared.telemetry import tracing

GRACE_S = 1.0
"""The core keeps the deadline, and says better what it waited for; this bounds what the core does not see."""

FIELDS_BY_HEADER = {"scenario": "x-scenario", "priority": "x-priority"}
"""Fields that a proxy may set without reading the body."""

T = TypeVar("T")
Prepare = Callable[[ApiContext, str, Mapping[str, object]], Awaitable[Job]]
Emit = Callable[[int, TextDelta], Awaitable[None]]


class Endpoint:
    """An ASGI application that answers one path's requests.

    Args:
        api: its surroundings.
        prepare: makes the job of a request body.
    """

    def __init__(self, api: ApiContext, prepare: Prepare) -> None:
        self._api = api
        self._prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = time.time() + self._api.request_timeout_s
        try:
            async with asyncio.timeout(self._api.request_timeout_s + GRACE_S):
                exchange = Exchange.of(scope)
                http = Request(scope, receive)
                body = with_headers(await read_object(http, self._api.max_body_bytes), http.headers)
                job = await self._prepare(self._api, exchange.request_id, body)
                run = Run(self._api, exchange, job, deadline)
                if job.stream:
                    stream = EventStream(send)
                    await while_connected(receive, run.stream_into(stream))
                    await stream.end()
                else:
                    answer = await while_connected(receive, run.collect())
                    await Response(answer, media_type="application/json")(scope, receive, send)
        except TimeoutError as error:
            raise DeadlineExceeded(f"The request was not done within {self._api.request_timeout_s:g} s.") from error


class Run:
    """All choices of one job, side by side. One that fails ends the others, and the job."""

    def __init__(self, api: ApiContext, exchange: Exchange, job: Job, deadline: float) -> None:
        self._api = api
        self._exchange = exchange
        self._job = job
        self._deadline = deadline
        self._usage = Usage(job.num_prompt_tokens)
        self._finish_reasons = [""] * len(job.choices)
        api.metrics.prompt_tokens.inc(job.num_prompt_tokens)

    async def stream_into(self, stream: EventStream) -> None:
        """Write an event for each token that gives the client anything."""
        job = self._job

        async def emit(index: int, delta: TextDelta) -> None:
            if delta.text or delta.finish_reason or job.sends_empty:
                await stream.write(job.writer.chunk(index, delta))

        await self._run(emit)
        if job.include_usage:
            await stream.write(job.writer.last_chunk(self._usage))

    async def collect(self) -> bytes:
        """The whole answer as JSON."""
        collected = [Collected() for _ in self._job.choices]

        async def emit(index: int, delta: TextDelta) -> None:
            collected[index].add(delta)

        await self._run(emit)
        return to_json(self._job.writer.whole(collected, self._usage))

    async def _run(self, emit: Emit) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self._job.choices:
                    group.create_task(self._run_choice(choice, emit))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        finally:
            self._describe()

    async def _run_choice(self, choice: Choice, emit: Emit) -> None:
        tokens = self._api.core.generate(
            choice.prompt_token_ids,
            choice.sampling,
            request_id=choice.request_id,
            deadline=self._deadline,
            scenario=self._job.scenario,
            priority=self._job.priority,
        )
        deltas = complete(
            tokens,
            detokenizer=self._api.tokenizer.detokenizer(choice.prompt_token_ids),
            stop=choice.stop,
            min_tokens=choice.sampling.min_tokens,
        )
        timer = ChoiceTimer(self._api.metrics, self._exchange.endpoint, self._exchange.arrived_s)
        async with aclosing(deltas):
            async for delta in deltas:
                timer.token(time.perf_counter())
                self._usage.completion_tokens += len(delta.token_ids)
                if delta.num_cached_tokens is not None:
                    self._usage.add_cached(choice.prompt_index, delta.num_cached_tokens)
                if delta.finish_reason is not None:
                    self._finish_reasons[choice.index] = delta.finish_reason
                await emit(choice.index, delta)
        timer.end()

    def _describe(self) -> None:
        span = get_current_span()
        if span.is_recording():
            span.set_attribute(tracing.REQUEST_ID, self._exchange.request_id)
            span.set_attribute("pdserve.model", self._api.served_model_name)
            span.set_attribute(tracing.NUM_PROMPT_TOKENS, self._usage.prompt_tokens)
            span.set_attribute(tracing.NUM_OUTPUT_TOKENS, self._usage.completion_tokens)
            span.set_attribute("pdserve.finish_reasons", self._finish_reasons)


def with_headers(body: Mapping[str, object], headers: Headers) -> Mapping[str, object]:
    """A request body, with the fields that headers give and that it has not."""
    given = {field: headers[name] for field, name in FIELDS_BY_HEADER.items() if name in headers}
    return {**given, **body}


async def while_connected(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The result of `work`, which is cancelled when the client goes.

    Raises:
        Cancelled: the client went first.
    """
    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_raise_on_disconnect(receive))
            result = await work
            watch.cancel()
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors
    return result


async def _raise_on_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise Cancelled("The client went before its answer was complete.")


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first; what followed from it stays in the group."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
