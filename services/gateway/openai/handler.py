"""One generating request: read and check it, serve its choices together, and write their tokens as they arrive."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol

from opentelemetry.trace import get_current_span
from starlette.types import Receive, Scope, Send

from services.gateway.api import ApiContext
from services.gateway.openai.idempotency import IdempotentAnswers
from services.gateway.openai.middleware import RequestContext
from services.gateway.openai.schemas import MAX_CHOICES, GenerationFields, Schema, parse_request
from services.gateway.openai.sse import EventStream
from services.gateway.request import Request, TokenOutput
from services.gateway.sampling import check_prompt, choice_seed, sampling_params
from services.gateway.telemetry import ChoiceTimer
from shared.errors import Cancelled, DeadlineExceeded, InvalidRequest
from shared.messages.serving import OutputToken
from shared.sampling import FinishReason
from shared.telemetry import tracing
from shared.text.text_stream import TextDelta, TextStream

GRACE_S = 1.0
"""The core keeps the deadline and knows better what it waited for; this bounds what the core does not see."""
LARGE_BODY_BYTES = 256 * 2**10
"""Larger bodies are parsed in a thread, so that other streams go on."""
MAX_TOKENS_PER_WRITE = 256
"""Of tokens that have waited for a slow client, so that what is written together stays small."""

Json = dict[str, object]


@dataclass(slots=True)
class Choice:
    """One generation of a completion, and what it has generated so far. `prompt_index` counts the prompts."""

    request: Request
    prompt_index: int
    text: TextStream
    timer: ChoiceTimer
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    deltas: list[TextDelta] = field(default_factory=list)
    """Kept unless they are streamed."""

    def feed(self, token: OutputToken, now: float) -> TextDelta:
        """Returns what a token adds."""
        self.timer.token(now)
        delta = self.text.feed(token)
        self.num_tokens += 1
        self.num_cached_tokens = delta.num_cached_tokens or self.num_cached_tokens
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.timer.end()
        return delta

    def whole(self) -> TextDelta:
        """Returns all kept deltas as one."""
        return TextDelta(
            "".join(delta.text for delta in self.deltas),
            [token_id for delta in self.deltas for token_id in delta.token_ids],
            [item for delta in self.deltas for item in delta.logprobs],
            self.finish_reason,
        )


class Writer(Protocol):
    """Puts what choices generate into an endpoint's form."""

    def chunk(self, index: int, delta: TextDelta) -> Json:
        """Returns one event of a stream."""

    def usage_chunk(self, usage: Json) -> Json:
        """Returns the event after those of all choices."""

    def whole(self, choices: Sequence[TextDelta], usage: Json) -> Json:
        """Returns the response in one piece; choices by their index."""


@dataclass(slots=True)
class Completion:
    """A request that has been checked, and its choices.

    Attributes:
        num_open: choices that are not finished.
        sends_empty: whether events without text matter, as they carry logprobs or token ids.
        include_usage: whether a stream ends with an event that has the usage.
    """

    choices: list[Choice]
    output: TokenOutput
    num_prompt_tokens: int
    writer: Writer
    stream: bool
    include_usage: bool
    sends_empty: bool
    num_open: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_open = len(self.choices)

    def usage(self) -> Json:
        """Returns the tokens of each prompt once, and those generated over all choices.

        Tokens of a prompt count as cached if none of its choices had to compute them.
        """
        cached: dict[int, int] = {}
        for choice in self.choices:
            before = cached.get(choice.prompt_index, choice.num_cached_tokens)
            cached[choice.prompt_index] = min(before, choice.num_cached_tokens)
        num_generated = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self.num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }


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


def check_num_choices(num_prompts: int, n: int | None) -> None:
    """Rejects more choices than a request may have, before work is spent on any of them.

    Raises:
        InvalidRequest: says how many they are.
    """
    num_choices = num_prompts * (n or 1)
    if num_choices > MAX_CHOICES:
        raise InvalidRequest(
            f"{num_prompts} prompts with n = {n or 1} make {num_choices} choices, but a request may have "
            f"{MAX_CHOICES}: send several requests.",
            param="n" if num_prompts == 1 else "prompt",
        )


def make_completion(
    api: ApiContext,
    context: RequestContext,
    fields: GenerationFields,
    prompts: list[list[int]],
    writer: Writer,
    *,
    param: str,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> Completion:
    """Checks prompts and sampling parameters, and makes one choice for each prompt and each of `n`.

    Choice j of a prompt samples by the request's seed and j, so that a prompt gives the same among others as alone.

    Args:
        param: the field with the prompts.
        max_tokens, default_max_tokens, logprobs: as of `sampling_params`.

    Raises:
        InvalidRequest: among them ContextTooLong.
    """
    n, max_model_len = fields.n or 1, api.core.max_model_len()
    output = TokenOutput()
    choices: list[Choice] = []
    for prompt_index, token_ids in enumerate(prompts):
        check_prompt(token_ids, api.tokenizer, max_model_len, param)
        sampling = sampling_params(
            fields,
            tokenizer=api.tokenizer,
            num_prompt_tokens=len(token_ids),
            max_model_len=max_model_len,
            max_tokens=max_tokens,
            default_max_tokens=default_max_tokens,
            logprobs=logprobs,
        )
        for number in range(n):
            index = len(choices)
            request = Request(
                id=context.request_id if n * len(prompts) == 1 else f"{context.request_id}-{index}",
                prompt_token_ids=token_ids,
                sampling=sampling.model_copy(update={"seed": choice_seed(sampling.seed, number)}),
                deadline=context.arrived_at + api.request_timeout_s,
                output=output,
                arrived_at=context.arrived_at,
                choice=index,
                scenario=fields.scenario,
                is_batch=fields.priority == "batch",
            )
            detokenizer = api.tokenizer.detokenizer(token_ids)
            text = TextStream(detokenizer, stop=fields.stop or (), min_tokens=sampling.min_tokens)
            timer = ChoiceTimer(api.metrics, context.endpoint, context.arrived_at)
            choices.append(Choice(request, prompt_index, text, timer))
    return Completion(
        choices=choices,
        output=output,
        num_prompt_tokens=sum(map(len, prompts)),
        writer=writer,
        stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        sends_empty=bool(fields.return_token_ids) or logprobs is not None,
    )


@asynccontextmanager
async def connected(context: RequestContext) -> AsyncIterator[None]:
    """Cancels the block when the client disconnects before its response has ended.

    Raises:
        Cancelled: the client disconnected.
        Exception: the block's first error, be it of one of its own tasks.
    """

    async def watch() -> None:
        while (await context.receive())["type"] != "http.disconnect":
            pass
        if not context.has_ended:
            raise Cancelled("The client disconnected before its response was complete.")

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            yield
            watching.cancel()
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns what went wrong first; what followed from it stays in the group."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
