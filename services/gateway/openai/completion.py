"""What a body asks for, checked: a `Request` for each choice, and what each choice has generated so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.api import ApiContext
from services.gateway.openai.middleware import RequestContext
from services.gateway.openai.schemas import MAX_CHOICES, GenerationFields
from services.gateway.request import Request, TokenOutput
from shared.errors import InvalidRequest
from shared.messages.serving import OutputToken
from shared.sampling import FinishReason
from shared.telemetry.gateway_metrics import ChoiceTimer
from shared.text.sampling_fields import check_prompt, choice_seed, sampling_params
from shared.text.text_stream import TextDelta, TextStream

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
