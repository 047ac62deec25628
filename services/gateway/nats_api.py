"""The request API on NATS: a JSON request with a reply inbox, chunks there, and exactly one terminal message.

`docs/protocol.md` is its manual. It shares everything below the wire with the HTTP API.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

from opentelemetry.trace import SpanKind, get_current_span

from services.gateway.api import ApiContext, check_model
from services.gateway.request import Request, TokenOutput
from shared.bus import subjects
from shared.bus.client_answers import Answer, ClientAnswers, new_key
from shared.bus.connection import Bus, Incoming
from shared.bus.reply_inbox import ReplyInbox
from shared.errors import (
    RETRY_AFTER_S,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    Overloaded,
    RequestError,
    gateway_is_ending,
)
from shared.messages.generate_api import (
    CancelGenerate,
    GenerateChunk,
    GenerateDone,
    GenerateFailed,
    GenerateRequest,
    GenerateUsage,
)
from shared.registry.open_answers import OpenAnswer, OpenAnswers
from shared.sampling import FinishReason
from shared.telemetry import tracing
from shared.telemetry.gateway_metrics import ChoiceTimer
from shared.text.generate_request import read_request
from shared.text.text_stream import TextDelta, TextStream
from shared.throttled_log import ThrottledWarnings

ENDPOINT = "nats"
GRACE_S = 1.0
"""The core keeps the deadline and knows better what it waited for; this bounds what the core does not see."""
LARGE_REQUEST_BYTES = 256 * 2**10
"""Larger requests are parsed in a thread, so that other streams go on."""
MAX_OPEN_ANSWERS = 16_384
"""Further requests are rejected with `overloaded`."""
MAX_TOKENS_PER_CHUNK = 256
"""Of tokens that have waited, so that a chunk with log probabilities fits into a message."""

log = logging.getLogger(__name__)


class NatsApi:
    """Serves `pdserve.v1.generate` and `pdserve.v1.cancel`."""

    def __init__(self, api: ApiContext, bus: Bus, gateway_id: str, open_answers: OpenAnswers) -> None:
        self._api = api
        self._bus = bus
        self._gateway_id = gateway_id
        self._open_answers = open_answers
        self._answers = ClientAnswers()
        self._unsubscribe: Callable[[], Awaitable[None]] | None = None
        self._is_draining = False
        self._skipped_requests = ThrottledWarnings(log)
        self._skipped_cancels = ThrottledWarnings(log)

    async def subscribe(self) -> None:
        self._bus.on_reconnect(self._bus_reconnected)
        self._open_answers.on_claimed(self._claimed)
        self._unsubscribe = await self._bus.subscribe(subjects.GENERATE, self._on_generate, queue=subjects.GATEWAYS)
        await self._bus.subscribe(subjects.CANCEL, self._on_cancel)

    def on_no_responders(self, key_and_index: str) -> None:
        """Handles NATS' report that nobody was subscribed for a message of an answer."""
        key, _, index = key_and_index.partition(".")
        answer = self._answers.get(key)
        if answer is not None and index.isdecimal() and len(index) < 12:
            answer.inbox.on_no_responders(int(index))

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets the open ones finish for a while, then ends them."""
        self._is_draining = True
        if self._unsubscribe is not None:
            await self._unsubscribe()
        running = [one.task for one in self._answers if one.task is not None and not one.is_finished]
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for answer in self._answers:
            answer.end(gateway_is_ending())
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for answer in self._answers:
            answer.inbox.close()

    def _bus_reconnected(self) -> None:
        self._open_answers.renew_soon()
        for answer in self._answers:
            answer.inbox.bus_reconnected()

    def _claimed(self, keys: Collection[str]) -> None:
        """Ends answers whose clients another gateway has told that this one has died: they get nothing more."""
        for answer in filter(None, map(self._answers.get, keys)):
            answer.inbox.close()
            answer.end(InternalError("Another gateway took this one for dead and ended the request."))
            answer.has_ended = True

    async def _on_cancel(self, incoming: Incoming) -> None:
        try:
            cancel = incoming.parse(CancelGenerate)
        except InvalidRequest as error:
            self._skipped_cancels.warning("skipping a malformed cancel: %s", error.message)
            return
        answer = self._answers.cancelled(cancel.id, cancel.inbox)
        if answer is not None:
            answer.end(_cancelled_by_client())

    async def _on_generate(self, incoming: Incoming) -> None:
        arrived_at = time.monotonic()
        if not incoming.reply_to:
            self._skipped_requests.warning("skipping a request without a reply inbox")
            return
        request: GenerateRequest | None = None
        error: RequestError | None = None
        try:
            if incoming.num_bytes <= LARGE_REQUEST_BYTES:
                request = incoming.parse(GenerateRequest)
        except InvalidRequest as invalid:
            error = invalid
        try:
            if self._answers.num_open >= MAX_OPEN_ANSWERS:
                await self._reject_overload(incoming.reply_to, request)
                return
            answer = self._open(incoming.reply_to)
        except (InvalidRequest, MessageTooLarge) as unusable:
            self._skipped_requests.warning("skipping a request that cannot be answered: %s", unusable)
            return
        try:
            if error is not None:
                raise error
            if request is None:
                self._answers.expect_id(answer)
            else:
                self._name(answer, request)
            if self._is_draining:
                raise gateway_is_ending()
        except RequestError as rejection:
            await self._fail(answer, rejection)
            self._finished(answer, rejection.code)
            return
        answer.task = asyncio.create_task(self._answer(incoming, request, answer, arrived_at))
        if request is not None:
            self._open_answers.add(answer.key, OpenAnswer(inbox=answer.inbox.subject, id=answer.id))

    def _open(self, reply_to: str) -> Answer:
        """Opens the answer to a request.

        Raises:
            InvalidRequest, MessageTooLarge: the reply subject cannot be used.
        """
        key = new_key()
        reports = subjects.gateway(self._gateway_id, subjects.gone(key))

        def on_gone() -> None:
            answer = self._answers.get(key)
            if answer is not None:
                answer.end(Cancelled("nobody is subscribed to the reply inbox"))

        return self._answers.open(key, ReplyInbox(self._bus, reply_to, reports, on_gone))

    def _name(self, answer: Answer, request: GenerateRequest) -> None:
        """Gives an answer the id that its request names.

        Raises:
            InvalidRequest: the id is in use.
        """
        if self._answers.name(answer, request.id):
            answer.end(_cancelled_by_client())

    async def _reject_overload(self, inbox: str, request: GenerateRequest | None) -> None:
        """Answers a request beyond `MAX_OPEN_ANSWERS`, of which nothing is kept."""
        error = Overloaded(
            f"This gateway has {MAX_OPEN_ANSWERS} requests on NATS already: try again later.",
            retry_after_s=RETRY_AFTER_S,
        )
        request_id = (request.id if request is not None else None) or new_key()
        self._api.metrics.requests.labels(ENDPOINT, error.code).inc()
        await self._bus.publish(inbox, GenerateFailed(id=request_id, index=0, error=error.body))

    def _finished(self, answer: Answer, code: str) -> None:
        self._answers.finish(answer)
        self._open_answers.remove(answer.key)
        self._api.metrics.requests.labels(ENDPOINT, code).inc()

    async def _answer(
        self, incoming: Incoming, request: GenerateRequest | None, answer: Answer, arrived_at: float
    ) -> None:
        """Serves one request: its inbox gets exactly one terminal message, and no error leaves this task.

        Args:
            request: None if it is large, and so has to be parsed here.
        """
        in_flight = self._api.metrics.endpoint(ENDPOINT).in_flight
        in_flight.inc()
        error: RequestError | None = None
        answer.has_started = True
        try:
            attributes = {tracing.REQUEST_ID: answer.key}
            span = self._api.tracer.start_as_current_span
            with span("generate", incoming.trace_context, SpanKind.SERVER, attributes):
                if request is None:
                    request = await asyncio.to_thread(incoming.parse, GenerateRequest)
                    self._name(answer, request)
                    self._open_answers.add(answer.key, OpenAnswer(inbox=answer.inbox.subject, id=answer.id))
                if answer.ended_by is not None:
                    raise answer.ended_by
                await self._generate(request, answer, arrived_at)
        except RequestError as known:
            error = known
        except MessageTooLarge as too_large:
            error = InternalError(f"The answer does not fit into a message: {too_large}")
        except asyncio.CancelledError:
            error = answer.ended_by or gateway_is_ending()
        except Exception:
            log.exception("internal error while handling request %s", answer.id)
            error = InternalError("The gateway failed at this request; its log says why.")
        try:
            if error is not None and not answer.has_ended:
                await self._fail(answer, error)
        except Exception:
            log.exception("the error of request %s could not be sent", answer.id)
        finally:
            in_flight.dec()
            self._finished(answer, "ok" if error is None else error.code)

    async def _generate(self, request: GenerateRequest, answer: Answer, arrived_at: float) -> None:
        if request.timeout_s is not None and request.timeout_s <= 0:
            raise InvalidRequest("`timeout_s` must be over 0.", param="timeout_s")
        timeout_s = min(request.timeout_s or self._api.request_timeout_s, self._api.request_timeout_s)
        left_s = arrived_at + timeout_s + GRACE_S - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                usage, finish_reason = await self._serve(request, answer, arrived_at, arrived_at + timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"The request was not done within {timeout_s:g} s.") from error
        if answer.ended_by is not None:
            raise answer.ended_by
        done = GenerateDone(id=answer.id, index=answer.inbox.index, finish_reason=finish_reason, usage=usage)
        await self._send_end(answer, done)

    async def _serve(
        self, request: GenerateRequest, answer: Answer, arrived_at: float, deadline: float
    ) -> tuple[GenerateUsage, FinishReason]:
        """Sends everything but the terminal message."""
        api = self._api
        if request.model is not None:
            check_model(api, request.model)
        prompt_token_ids, sampling = await read_request(request, api.tokenizer, api.core.max_model_len())
        api.metrics.prompt_tokens.inc(len(prompt_token_ids))
        served = Request(
            id=answer.key,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            deadline=deadline,
            arrived_at=arrived_at,
            output=TokenOutput(),
            scenario=request.scenario,
            is_batch=request.priority == "batch",
        )
        detokenizer = api.tokenizer.detokenizer(prompt_token_ids)
        text = TextStream(detokenizer, stop=request.stop or (), min_tokens=request.min_tokens)
        async with api.core.serving([served]):
            usage, finish_reason = await self._stream(served, text, answer)
        span = get_current_span()
        span.set_attribute(tracing.NUM_PROMPT_TOKENS, usage.prompt_tokens)
        span.set_attribute(tracing.NUM_OUTPUT_TOKENS, usage.completion_tokens)
        return usage, finish_reason

    async def _stream(self, served: Request, text: TextStream, answer: Answer) -> tuple[GenerateUsage, FinishReason]:
        """Sends a chunk for all tokens that have arrived, again and again, up to the last token."""
        timer = ChoiceTimer(self._api.metrics, ENDPOINT, served.arrived_at)
        num_tokens = num_cached_tokens = 0
        while True:
            deltas: list[TextDelta] = []
            for _, token in await served.output.read():
                deltas.append(text.feed(token))
                timer.token(time.monotonic())
                if deltas[-1].finish_reason is not None:
                    break
            num_tokens += len(deltas)
            num_cached_tokens += sum(delta.num_cached_tokens or 0 for delta in deltas)
            finish_reason = deltas[-1].finish_reason
            if finish_reason is not None:
                self._api.core.finish(served)
            for start in range(0, len(deltas), MAX_TOKENS_PER_CHUNK):
                await answer.inbox.send(_chunk(answer, deltas[start : start + MAX_TOKENS_PER_CHUNK]))
            if finish_reason is not None:
                timer.end()
                usage = GenerateUsage(
                    prompt_tokens=len(served.prompt_token_ids),
                    completion_tokens=num_tokens,
                    total_tokens=len(served.prompt_token_ids) + num_tokens,
                    cached_tokens=num_cached_tokens,
                )
                return usage, finish_reason

    async def _fail(self, answer: Answer, error: RequestError) -> None:
        await self._send_end(answer, GenerateFailed(id=answer.id, index=answer.inbox.index, error=error.body))

    async def _send_end(self, answer: Answer, message: GenerateDone | GenerateFailed) -> None:
        """Sends the terminal message. From now on nobody else can end the answer.

        Raises:
            MessageTooLarge: it was not sent, so the answer still needs one.
        """
        answer.has_ended = True
        try:
            await answer.inbox.send(message)
        except MessageTooLarge:
            answer.has_ended = False
            raise


def _cancelled_by_client() -> Cancelled:
    return Cancelled("cancelled by the client")


def _chunk(answer: Answer, deltas: Sequence[TextDelta]) -> GenerateChunk:
    logprobs = [one for delta in deltas for one in delta.logprobs]
    return GenerateChunk(
        id=answer.id,
        index=answer.inbox.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs or None,
    )
