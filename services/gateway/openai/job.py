"""What a request makes the gateway do: one generation for each choice, and a writer for what they give."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.api import ApiContext
from shared.text.text_stream import TextDelta
from services.gateway.openai.schemas import MAX_CHOICES, GenerationFields
from services.gateway.sampling import check_prompt, choice_seed, sampling_params
from shared.errors import InvalidRequest
from shared.messages.generate_api import Priority
from shared.messages.serving import TokenLogprobs
from shared.sampling import FinishReason, SamplingParams

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Choice:
    """One generation. `index` counts them over all prompts of a request, `prompt_index` the prompts."""

    index: int
    prompt_index: int
    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...]


@dataclass(slots=True)
class Collected:
    """All that one choice has given."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: TextDelta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason


@dataclass(slots=True)
class Usage:
    """Tokens of a request: those of each prompt once, those generated over all choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)
    """By prompt: those that none of its choices had to compute."""

    def add_cached(self, prompt_index: int, num_cached_tokens: int) -> None:
        """One choice of a prompt found so many of its tokens in a prefix cache."""
        before = self.cached_tokens.get(prompt_index, num_cached_tokens)
        self.cached_tokens[prompt_index] = min(before, num_cached_tokens)

    def json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


class Writer(Protocol):
    """Puts what choices give into an endpoint's form."""

    def chunk(self, index: int, delta: TextDelta) -> Json:
        """One event of a stream."""

    def last_chunk(self, usage: Usage) -> Json:
        """The event after those of all choices."""

    def whole(self, choices: Sequence[Collected], usage: Usage) -> Json:
        """The answer in one piece; choices by their index."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request, checked and ready to run.

    Attributes:
        sends_empty: whether events without text matter, as they carry logprobs or token ids.
        include_usage: whether a stream ends with an event that tells the usage.
    """

    choices: list[Choice]
    num_prompt_tokens: int
    writer: Writer
    stream: bool
    include_usage: bool
    sends_empty: bool
    scenario: str | None = None
    priority: Priority = "interactive"


def check_num_choices(num_prompts: int, n: int | None) -> None:
    """Refuse more choices than a request may have, before work is spent on any of them.

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


def make_job(
    api: ApiContext,
    request: GenerationFields,
    request_id: str,
    prompts: list[list[int]],
    writer: Writer,
    *,
    param: str,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> Job:
    """Check prompts and sampling parameters, and make one choice for each prompt and each of `n`.

    A prompt's choice j draws by the request's seed and j, so that a prompt gives the same among others as alone.

    Args:
        param: the field that holds the prompts.
        max_tokens, default_max_tokens, logprobs: as of `sampling_params`.

    Raises:
        InvalidRequest: among them ContextTooLong.
    """
    n = request.n or 1
    max_model_len = api.core.max_model_len()
    choices: list[Choice] = []
    for prompt_index, token_ids in enumerate(prompts):
        check_prompt(token_ids, api.tokenizer, max_model_len, param)
        sampling = sampling_params(
            request,
            tokenizer=api.tokenizer,
            num_prompt_tokens=len(token_ids),
            max_model_len=max_model_len,
            max_tokens=max_tokens,
            default_max_tokens=default_max_tokens,
            logprobs=logprobs,
        )
        for number in range(n):
            seeded = sampling.model_copy(update={"seed": choice_seed(sampling.seed, number)})
            index = len(choices)
            choice_id = request_id if n * len(prompts) == 1 else f"{request_id}-{index}"
            stop = tuple(request.stop or ())
            choices.append(Choice(index, prompt_index, choice_id, token_ids, seeded, stop))
    options = request.stream_options
    return Job(
        choices=choices,
        num_prompt_tokens=sum(map(len, prompts)),
        writer=writer,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        sends_empty=bool(request.return_token_ids) or logprobs is not None,
        scenario=request.scenario,
        priority=request.priority or "interactive",
    )
