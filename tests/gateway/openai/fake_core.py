"""A fake in place of the gateway's core: it yields scripted tokens, and remembers what it was asked. No model runs."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from services.gateway.api import FirstToken
from shared.errors import RequestError
from shared.messages.generate_api import Priority
from shared.messages.serving import OutputToken, TokenLogprobs, TopLogprob
from shared.sampling import SamplingParams

Step = int | RequestError | asyncio.Event | Exception


@dataclass
class Call:
    """One generation asked for, and how it ended."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    request_id: str
    deadline: float
    scenario: str | None
    priority: Priority
    num_given: int = 0
    is_closed: bool = False


@dataclass
class FakeCore:
    """Gives each call the steps of `script(call)`: a token id is yielded, an error raised, an event waited for.

    The last token is that of `max_tokens`, a stop token, or the last of the script; a script may end without any.
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

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        deadline: float,
        scenario: str | None = None,
        priority: Priority = "interactive",
    ) -> AsyncGenerator[OutputToken, None]:
        call = Call(prompt_token_ids, sampling, request_id, deadline, scenario, priority)
        self.calls.append(call)
        steps = self.script(call)
        last = next((number for number in reversed(range(len(steps))) if isinstance(steps[number], int)), None)
        try:
            for number, step in enumerate(steps):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                token = self._token(call, step, is_last=number == last == len(steps) - 1)
                call.num_given += 1
                yield token
                if token.finish_reason is not None:
                    return
        finally:
            call.is_closed = True

    def _token(self, call: Call, token_id: int, *, is_last: bool) -> OutputToken:
        logprobs = None
        if call.sampling.logprobs is not None:
            top = [TopLogprob(token_id=token_id + rank, logprob=-1.0 - rank) for rank in range(call.sampling.logprobs)]
            logprobs = TokenLogprobs(logprob=-1.0, top=top)
        is_stop = token_id in call.sampling.stop_token_ids and call.num_given >= call.sampling.min_tokens
        is_over = is_last or call.num_given + 1 == call.sampling.max_tokens
        token = OutputToken(
            request_id=call.request_id,
            index=call.num_given,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason="stop" if is_stop else "length" if is_over else None,
        )
        if call.num_given:
            return token
        return FirstToken.model_validate(dict(token) | {"num_cached_tokens": self.num_cached(call)})
