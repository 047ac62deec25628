"""The request API on NATS: a JSON request with a reply inbox, chunks there, and exactly one terminal message.

`docs/protocol.md` is its manual. It shares everything below the wire with the HTTP API.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, get_current_span

from services.gateway.api import ApiContext, check_model
from services.gateway.request import Request, TokenOutput
from shared.bus import subjects
from shared.bus.connection import Bus, Incoming
from shared.bus.reply_inbox import ReplyInbox
from shared.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
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
from shared.sampling import FinishReason, SamplingParams
from shared.telemetry import tracing
from shared.telemetry.gateway_metrics import ChoiceTimer
from shared.text.sampling_fields import DEFAULT_MAX_TOKENS, check_prompt, sampling_params
from shared.text.text_stream import TextDelta, TextStream

ENDPOINT = "nats"
GRACE_S = 1.0
"""The core keeps the deadline and knows better what it waited for; this bounds what the core does not see."""
LINGER_S = 15.0
"""How long a finished answer is kept, as its last message may have to be sent again after a reconnect."""
MAX_OPEN_ANSWERS = 16_384
MAX_TOKENS_PER_CHUNK = 256
"""Of tokens that have waited, so that a chunk with log probabilities fits into a message."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Answer:
    """An answer to a client.

    Attributes:
        key: ours: unique everywhere, and nobody can guess it.
        id: the client's name for it, or the key.
        has_started: whether its task runs: only then can cancelling the task end it with an error.
    """

    key: str
    id: str
    inbox: ReplyInbox
    task: asyncio.Task[None] | None = None
    has_started: bool = False
    ended_by: RequestError | None = None
    is_finished: bool = False


class NatsApi:
    """Serves `pdserve.v1.generate` and `pdserve.v1.cancel`."""

    def __init__(self, api: ApiContext, bus: Bus, gateway_id: str, open_answers: OpenAnswers) -> None:
        self._api = api
        self._bus = bus
        self._gateway_id = gateway_id
        self._open_answers = open_answers
        self._answers: dict[str, Answer] = {}
        """By key; finished ones stay for `LINGER_S`."""
        self._unsubscribe: Callable[[], Awaitable[None]] | None = None
        self._is_draining = False

    async def subscribe(self) -> None:
        self._bus.on_reconnect(self._bus_reconnected)
        self._unsubscribe = await self._bus.subscribe(subjects.GENERATE, self._on_generate, queue=subjects.GATEWAYS)
        await self._bus.subscribe(subjects.CANCEL, self._on_cancel)

    def on_no_responders(self, key_and_index: str) -> None:
        """Handles NATS' report that nobody was subscribed for a message of an answer."""
        key, _, index = key_and_index.partition(".")
        if key in self._answers and index.isdecimal() and len(index) < 12:
            self._answers[key].inbox.on_no_responders(int(index))

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets the open ones finish for a while, then ends them."""
        self._is_draining = True
        if self._unsubscribe is not None:
            await self._unsubscribe()
        running = [one.task for one in self._answers.values() if one.task is not None and not one.is_finished]
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for answer in list(self._answers.values()):
            self._end(answer, gateway_is_ending())
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for answer in self._answers.values():
            answer.inbox.close()

    def _bus_reconnected(self) -> None:
        for answer in self._answers.values():
            answer.inbox.bus_reconnected()

    def _end(self, answer: Answer, error: RequestError) -> None:
        if not answer.is_finished and answer.ended_by is None:
            answer.ended_by = error
            if answer.task is not None and answer.has_started:
                answer.task.cancel()

    async def _on_cancel(self, incoming: Incoming) -> None:
        try:
            cancel = incoming.parse(CancelGenerate)
        except InvalidRequest as error:
            log.warning("skipping a malformed cancel: %s", error.message)
            return
        answer = self._running(cancel.id)
        # Others can guess an id that a client has chosen, but neither a key of ours nor the client's inbox.
        if answer is not None and (cancel.id == answer.key or cancel.inbox == answer.inbox.subject):
            self._end(answer, Cancelled("cancelled by the client"))

    async def _on_generate(self, incoming: Incoming) -> None:
        arrived_at = time.monotonic()
        try:
            answer = self._open(incoming.reply_to)
        except (RequestError, MessageTooLarge) as error:
            log.warning("skipping a request that cannot be answered: %s", error)
            return
        try:
            request = incoming.parse(GenerateRequest)
            if request.id is not None and self._running(request.id) is not None:
                raise InvalidRequest(f"A request with the id {request.id} is open: use another id.", param="id")
            answer.id = request.id or answer.key
            if self._is_draining:
                raise gateway_is_ending()
        except RequestError as error:
            await self._fail(answer, error)
            self._finished(answer, error.code)
            return
        answer.task = asyncio.create_task(self._answer(request, answer, incoming.trace_context, arrived_at))
        self._open_answers.add(answer.key, OpenAnswer(inbox=incoming.reply_to, id=answer.id))

    def _open(self, reply_to: str) -> Answer:
        """Opens the answer to a request.

        Raises:
            InvalidRequest, MessageTooLarge: the reply subject cannot be used.
        """
        if not reply_to:
            raise InvalidRequest("a request without a reply inbox")
        if len(self._answers) >= MAX_OPEN_ANSWERS:
            raise InvalidRequest(f"{MAX_OPEN_ANSWERS} answers are open already")
        key = f"gen-{secrets.token_hex(12)}"
        reports = subjects.gateway(self._gateway_id, subjects.gone(key))

        def on_gone() -> None:
            if key in self._answers:
                self._end(self._answers[key], Cancelled("nobody is subscribed to the reply inbox"))

        answer = Answer(key, key, ReplyInbox(self._bus, reply_to, reports, on_gone))
        self._answers[key] = answer
        return answer

    def _running(self, request_id: str) -> Answer | None:
        return next((one for one in self._answers.values() if one.id == request_id and not one.is_finished), None)

    def _finished(self, answer: Answer, code: str) -> None:
        answer.is_finished = True
        self._open_answers.remove(answer.key)
        self._api.metrics.requests.labels(ENDPOINT, code).inc()
        asyncio.get_running_loop().call_later(LINGER_S, self._forget, answer)

    def _forget(self, answer: Answer) -> None:
        answer.inbox.close()
        self._answers.pop(answer.key, None)

    async def _answer(self, request: GenerateRequest, answer: Answer, context: Context, arrived_at: float) -> None:
        """Serves one request: its inbox gets exactly one terminal message, and no error leaves this task."""
        in_flight = self._api.metrics.endpoint(ENDPOINT).in_flight
        in_flight.inc()
        error: RequestError | None = None
        answer.has_started = True
        try:
            if answer.ended_by is not None:
                raise answer.ended_by
            attributes = {tracing.REQUEST_ID: answer.key}
            with self._api.tracer.start_as_current_span("generate", context, SpanKind.SERVER, attributes):
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
            if error is not None:
                await self._fail(answer, error)
        except Exception:
            log.exception("the error of request %s could not be sent", answer.id)
        finally:
            in_flight.dec()
            self._finished(answer, "ok" if error is None else error.code)

    async def _generate(self, request: GenerateRequest, answer: Answer, arrived_at: float) -> None:
        api = self._api
        timeout_s = min(request.timeout_s or api.request_timeout_s, api.request_timeout_s)
        prompt_token_ids, sampling = await self._read(request)
        served = Request(
            id=answer.key,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            deadline=arrived_at + timeout_s,
            arrived_at=arrived_at,
            output=TokenOutput(),
            scenario=request.scenario,
            is_batch=request.priority == "batch",
        )
        detokenizer = api.tokenizer.detokenizer(prompt_token_ids)
        text = TextStream(detokenizer, stop=request.stop or (), min_tokens=request.min_tokens)
        try:
            async with asyncio.timeout(timeout_s + GRACE_S), api.core.serving([served]):
                usage, finish_reason = await self._stream(served, text, answer)
        except TimeoutError as error:
            raise DeadlineExceeded(f"The request was not done within {timeout_s:g} s.") from error
        span = get_current_span()
        span.set_attribute(tracing.NUM_PROMPT_TOKENS, usage.prompt_tokens)
        span.set_attribute(tracing.NUM_OUTPUT_TOKENS, usage.completion_tokens)
        done = GenerateDone(id=answer.id, index=answer.inbox.index, finish_reason=finish_reason, usage=usage)
        await answer.inbox.send(done)

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

    async def _read(self, request: GenerateRequest) -> tuple[list[int], SamplingParams]:
        """Returns the prompt's tokens and complete sampling parameters."""
        api = self._api
        if request.model is not None:
            check_model(api, request.model)
        if request.timeout_s is not None and request.timeout_s <= 0:
            raise InvalidRequest("`timeout_s` must be over 0.", param="timeout_s")
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
                f"Give exactly one of prompt, prompt_token_ids and messages, not {' and '.join(given) or 'none'}."
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

    async def _fail(self, answer: Answer, error: RequestError) -> None:
        await answer.inbox.send(GenerateFailed(id=answer.id, index=answer.inbox.index, error=error.body))


async def end_orphans(bus: Bus, open_answers: OpenAnswers, gateway_id: str) -> None:
    """Sends a terminal error to the clients of a gateway that has died.

    Raises:
        RegistryUnavailable: nothing was sent; call again.
    """
    orphans = await open_answers.claim(gateway_id)
    if orphans:
        log.warning("gateway %s has died: ending its %d open answers on NATS", gateway_id, len(orphans))
    error = InternalError("The gateway that served this request has died: send the request again.", retry_after_s=0.0)
    for orphan in orphans:
        if not subjects.is_inbox(orphan.inbox):
            log.warning("an open answer of %s cannot be ended: its reply subject is not an inbox", gateway_id)
            continue
        try:
            await bus.publish(orphan.inbox, GenerateFailed(id=orphan.id, index=-1, error=error.body))
        except (MessageTooLarge, InvalidRequest) as unsendable:
            log.warning("an open answer of %s cannot be ended: %s", gateway_id, unsendable)


def _chunk(answer: Answer, deltas: Sequence[TextDelta]) -> GenerateChunk:
    logprobs = [one for delta in deltas for one in delta.logprobs]
    return GenerateChunk(
        id=answer.id,
        index=answer.inbox.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs or None,
    )
