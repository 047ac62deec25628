"""The request API on NATS: a JSON request with a reply inbox, chunks there, and exactly one terminal message.

`docs/protocol.md` is its manual. It shares everything below the wire with the HTTP API.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from opentelemetry.trace import SpanKind, get_current_span

from services.gateway.api import ApiContext, check_model
from shared.text.text_stream import complete
from shared.bus.reply_inbox import Inbox
from services.gateway.telemetry import ChoiceTimer
from services.gateway.sampling import DEFAULT_MAX_TOKENS, check_prompt, sampling_params
from shared.bus import subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import Cancelled, InternalError, InvalidRequest, RequestError, gateway_is_ending
from shared.messages.generate_api import (
    CancelGenerate,
    GenerateChunk,
    GenerateDone,
    GenerateFailed,
    GenerateRequest,
    GenerateUsage,
)
from shared.sampling import FinishReason, SamplingParams
from shared.telemetry import tracing

ENDPOINT = "nats"
LINGER_S = 15.0
"""How long an answer that is over is kept, as its last message may have to be sent again: longer than clients take."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Answering:
    """A request that is being answered. `key` is ours, and unique everywhere; `id` is what the client calls it."""

    key: str
    id: str
    inbox: Inbox
    task: asyncio.Task[None] | None = None
    ended_by: RequestError | None = None
    is_over: bool = False


class NatsApi:
    """Serves `pdserve.v1.generate` and `pdserve.v1.cancel`."""

    def __init__(self, api: ApiContext, bus: Bus, gateway_id: str, tasks: asyncio.TaskGroup) -> None:
        self._api = api
        self._bus = bus
        self._gateway_id = gateway_id
        self._tasks = tasks
        self._answering: dict[str, Answering] = {}
        """By key; those that are over stay for a while, as their last message may have to be sent again."""
        self._stop_taking: Callable[[], Awaitable[None]] | None = None
        self._draining = False

    async def subscribe(self) -> None:
        self._bus.on_reconnect(self._bus_came_back)
        self._stop_taking = await self._bus.subscribe(subjects.GENERATE, self._on_generate, queue=subjects.GATEWAYS)
        await self._bus.subscribe(subjects.CANCEL, self._on_cancel)

    def nobody_heard(self, key_and_index: str) -> None:
        """NATS tells that nobody listened to a message of an answer."""
        key, _, index = key_and_index.partition(".")
        if key in self._answering:
            self._answering[key].inbox.unheard(int(index))

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets those that it has end for a while, then ends them."""
        self._draining = True
        if self._stop_taking is not None:
            await self._stop_taking()
        running = [one.task for one in self._answering.values() if one.task is not None and not one.is_over]
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for answering in list(self._answering.values()):
            self._end(answering, gateway_is_ending())

    def _bus_came_back(self) -> None:
        for answering in self._answering.values():
            answering.inbox.bus_came_back()

    def _end(self, answering: Answering, why: RequestError) -> None:
        if answering.is_over or answering.ended_by is not None:
            return
        answering.ended_by = why
        if answering.task is not None:
            answering.task.cancel()

    async def _on_cancel(self, incoming: Incoming) -> None:
        try:
            wanted = incoming.parse(CancelGenerate).id
        except InvalidRequest as error:
            log.warning("cannot read a cancel: %s", error.message)
            return
        answering = self._running(wanted)
        if answering is not None:
            self._end(answering, Cancelled("cancelled by the client"))

    async def _on_generate(self, incoming: Incoming) -> None:
        if not incoming.reply_to:
            log.warning("passed over a request without a reply inbox")
            return
        answering = self._begin(incoming.reply_to)
        try:
            request = incoming.parse(GenerateRequest)
            if request.id is not None and self._running(request.id) is not None:
                raise InvalidRequest(f"a request with the id {request.id} is being served: take another", param="id")
            answering.id = request.id or answering.key
            if self._draining:
                raise gateway_is_ending()
        except RequestError as error:
            await self._fail(answering, error)
            self._forget_later(answering)
            self._api.metrics.requests.labels(ENDPOINT, error.code).inc()
            return
        self._tasks.create_task(self._answer(request, answering, incoming))

    def _begin(self, reply_to: str) -> Answering:
        key = f"gen-{secrets.token_hex(12)}"
        told = subjects.gateway(self._gateway_id, subjects.gone(key))

        def on_gone() -> None:
            if key in self._answering:  # an answer that is over may be forgotten before its client is given up
                self._end(self._answering[key], Cancelled("nobody listens in the reply inbox"))

        answering = Answering(key, key, Inbox(self._bus, reply_to, told, self._tasks, on_gone))
        self._answering[key] = answering
        return answering

    def _running(self, request_id: str) -> Answering | None:
        return next((one for one in self._answering.values() if one.id == request_id and not one.is_over), None)

    def _forget_later(self, answering: Answering) -> None:
        answering.is_over = True
        asyncio.get_running_loop().call_later(LINGER_S, self._answering.pop, answering.key)

    async def _answer(self, request: GenerateRequest, answering: Answering, incoming: Incoming) -> None:
        """Serves one request; whatever happens, its inbox gets one terminal message."""
        code = "ok"
        self._api.metrics.in_flight.labels(ENDPOINT).inc()
        # Only now: a task that is cancelled before it has begun never begins, and nobody would be told.
        answering.task = asyncio.current_task()
        try:
            if answering.ended_by is not None:
                raise answering.ended_by
            with self._api.tracer.start_as_current_span(
                "generate", incoming.trace_context, SpanKind.SERVER, {tracing.REQUEST_ID: answering.key}
            ):
                await self._generate(request, answering)
        except RequestError as error:
            code = error.code
            await self._fail(answering, error)
        except Exception:
            log.exception("request %s met a fault of this program", answering.id)
            failure = InternalError("the gateway failed at this request; its log says why")
            code = failure.code
            await self._fail(answering, failure)
        except asyncio.CancelledError:
            why = answering.ended_by or gateway_is_ending()
            code = why.code
            await self._fail(answering, why)
            if answering.ended_by is None:
                raise
        finally:
            self._forget_later(answering)
            self._api.metrics.in_flight.labels(ENDPOINT).dec()
            self._api.metrics.requests.labels(ENDPOINT, code).inc()

    async def _generate(self, request: GenerateRequest, answering: Answering) -> None:
        timer = ChoiceTimer(self._api.metrics, ENDPOINT, time.monotonic())
        timeout_s = min(request.timeout_s or self._api.request_timeout_s, self._api.request_timeout_s)
        deadline = time.time() + timeout_s
        prompt_token_ids, sampling = await self._read(request)
        num_tokens = num_cached_tokens = 0
        finish_reason: FinishReason | None = None
        tokens = self._api.core.generate(
            prompt_token_ids,
            sampling,
            request_id=answering.key,
            deadline=deadline,
            scenario=request.scenario,
            priority=request.priority,
        )
        deltas = complete(
            tokens,
            detokenizer=self._api.tokenizer.detokenizer(prompt_token_ids),
            stop=_stop(request),
            min_tokens=request.min_tokens,
        )
        async with aclosing(deltas):
            async for delta in deltas:
                timer.token(time.monotonic())
                num_tokens += len(delta.token_ids)
                if delta.num_cached_tokens is not None:
                    num_cached_tokens = delta.num_cached_tokens
                finish_reason = delta.finish_reason
                chunk = GenerateChunk(
                    id=answering.id,
                    index=answering.inbox.index,
                    text=delta.text,
                    token_ids=delta.token_ids,
                    logprobs=delta.logprobs or None,
                )
                await answering.inbox.send(chunk)
        assert finish_reason is not None, "complete() ends with a finish reason or raises"
        timer.end()
        span = get_current_span()
        span.set_attribute(tracing.NUM_PROMPT_TOKENS, len(prompt_token_ids))
        span.set_attribute(tracing.NUM_OUTPUT_TOKENS, num_tokens)
        usage = GenerateUsage(
            prompt_tokens=len(prompt_token_ids),
            completion_tokens=num_tokens,
            total_tokens=len(prompt_token_ids) + num_tokens,
            cached_tokens=num_cached_tokens,
        )
        done = GenerateDone(id=answering.id, index=answering.inbox.index, finish_reason=finish_reason, usage=usage)
        await answering.inbox.send(done)

    async def _read(self, request: GenerateRequest) -> tuple[list[int], SamplingParams]:
        """The prompt's tokens and complete sampling parameters."""
        api = self._api
        if request.model is not None:
            check_model(api, request.model)
        if request.timeout_s is not None and request.timeout_s <= 0:
            raise InvalidRequest("`timeout_s` must be over 0", param="timeout_s")
        max_model_len = api.core.max_model_len()
        param, prompt_token_ids = await self._prompt(request, max_model_len)
        check_prompt(prompt_token_ids, api.tokenizer, max_model_len, param)
        api.metrics.prompt_tokens.inc(len(prompt_token_ids))
        sampling = sampling_params(
            request,
            tokenizer=api.tokenizer,
            num_prompt_tokens=len(prompt_token_ids),
            max_model_len=max_model_len,
            max_tokens=request.max_tokens,
            default_max_tokens=None if request.messages is not None else DEFAULT_MAX_TOKENS,
            logprobs=request.logprobs,
        )
        return prompt_token_ids, sampling

    async def _prompt(self, request: GenerateRequest, max_model_len: int) -> tuple[str, list[int]]:
        given = [name for name in ("prompt", "prompt_token_ids", "messages") if getattr(request, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"give exactly one of prompt, prompt_token_ids and messages, not {' and '.join(given) or 'none'}"
            )
        [param] = given
        tokenizer = self._api.tokenizer
        if request.messages is not None:
            messages = [message.model_dump() for message in request.messages]
            return param, await tokenizer.encode_chat(messages, max_tokens=max_model_len)
        if request.prompt is not None:
            return param, await tokenizer.encode(request.prompt, max_tokens=max_model_len)
        assert request.prompt_token_ids is not None
        return param, request.prompt_token_ids

    async def _fail(self, answering: Answering, error: RequestError) -> None:
        failed = GenerateFailed(id=answering.id, index=answering.inbox.index, error=error.body)
        await answering.inbox.send(failed)


def _stop(request: GenerateRequest) -> list[str]:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if not all(stop):
        raise InvalidRequest("a stop string is empty: leave it out", param="stop")
    return stop
