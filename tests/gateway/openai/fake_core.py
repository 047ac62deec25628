"""A fake in place of the gateway's core: it pushes scripted tokens, and remembers its requests. No model runs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.gateway.openai.middleware import first_error
from services.gateway.request import Request
from shared.errors import RequestError
from shared.messages.serving import OutputToken, TokenLogprobs, TopLogprob
from shared.sampling import SamplingParams

Step = int | RequestError | asyncio.Event | Exception


@dataclass(eq=False)
class Call:
    """One request to generate, and how it ended."""

    request: Request
    num_given: int = 0
    is_closed: bool = False
    is_finished: bool = False
    """Whether the API said that it needs no more tokens."""
    task: asyncio.Task[None] | None = None

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def request_id(self) -> str:
        return self.request.id


@dataclass
class FakeCore:
    """Gives each call the steps of `script(call)`: a token id is pushed, an error fails it, an event is waited for.

    The last token is that of `max_tokens`, a stop token, or the last of the script; a script may end without any. An
    exception that is no RequestError is a fault of the core.
    """

    script: Callable[[Call], list[Step]] = lambda call: [10, 11, 12]
    num_cached: Callable[[Call], int] = lambda call: 0
    """How many tokens of the prompt were in a prefix cache."""
    calls: list[Call] = field(default_factory=list)
    context: int = 4096
    reason: str | None = None

    def max_model_len(self) -> int:
        return self.context

    def not_ready(self) -> str | None:
        return self.reason

    @asynccontextmanager
    async def serving(self, requests: Sequence[Request]) -> AsyncIterator[None]:
        calls = [Call(request) for request in requests]
        self.calls += calls
        try:
            async with asyncio.TaskGroup() as tasks:
                for call in calls:
                    call.task = tasks.create_task(self._generate(call))
                try:
                    yield
                finally:
                    for call in calls:
                        assert call.task is not None
                        call.task.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        finally:
            for call in calls:
                call.is_closed = True

    def finish(self, request: Request) -> None:
        call = next(call for call in self.calls if call.request is request)
        call.is_finished = call.is_closed = True
        assert call.task is not None
        call.task.cancel()

    async def _generate(self, call: Call) -> None:
        steps = self.script(call)
        last = next((number for number in reversed(range(len(steps))) if isinstance(steps[number], int)), None)
        for number, step in enumerate(steps):
            if isinstance(step, RequestError):
                call.request.output.fail(step)
                return
            if isinstance(step, Exception):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            token = self._token(call, step, is_last=number == last == len(steps) - 1)
            call.num_given += 1
            call.request.push_token("fake", token)
            if token.finish_reason is not None:
                return

    def _token(self, call: Call, token_id: int, *, is_last: bool) -> OutputToken:
        logprobs = None
        if call.sampling.logprobs is not None:
            top = [TopLogprob(token_id=token_id + rank, logprob=-1.0 - rank) for rank in range(call.sampling.logprobs)]
            logprobs = TokenLogprobs(logprob=-1.0, top=top)
        is_stop = token_id in call.sampling.stop_token_ids and call.num_given >= call.sampling.min_tokens
        is_over = is_last or call.num_given + 1 == call.sampling.max_tokens
        return OutputToken(
            request_id=call.request_id,
            index=call.num_given,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason="stop" if is_stop else "length" if is_over else None,
            num_cached_tokens=None if call.num_given else self.num_cached(call),
        )
