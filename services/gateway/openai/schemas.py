"""Requests as clients write them: the fields of both endpoints, and which of OpenAI's fields have no effect or fail.

Types are checked here, the ranges of sampling parameters by SamplingParams. The validators of fields that may have
several types are written out, so that the error names the field and one reason; and lists fail at their first bad item,
so that a large bad body costs no more than a good one.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import from_json

from shared.errors import InvalidRequest, invalid_request
from shared.messages.generate_api import (
    AtMostMaxMessages,
    LogitBias,
    Priority,
    Scenario,
    Stop,
    StopTokenIds,
    fault,
    is_token_ids,
)
from shared.sampling import MAX_LOGPROBS

MAX_CHOICES = 128

FIELDS_BY_HEADER = {"scenario": "x-scenario", "priority": "x-priority"}
"""Fields that a proxy may set without reading the body."""
IGNORED = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields without effect here: they are about accounts, billing and speed, not about the generated text."""

NO_TOOLS = "tools are not supported: describe them in the prompt, and read the calls from the text"
NO_AUDIO = "only text is generated: remove it"
NO_REASONING = "the reasoning of earlier answers is not supported: remove it, or make it part of the content"

UNSUPPORTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is supported: ask for the format in the prompt'),
    "modalities": ((["text"],), 'only ["text"] is supported'),
    "audio": ((), NO_AUDIO),
    "web_search_options": ((), "there is no web search: remove it"),
    "reasoning_effort": ((), "it is not supported: remove it"),
    "verbosity": (("medium",), "it is not supported: ask for it in the prompt"),
    "echo": ((False,), "the prompt is not repeated: put it before the text yourself"),
    "suffix": (("",), "inserting before a suffix is not supported: remove it"),
}
"""Features that do not exist here: the values that do not ask for them, and what to do instead."""

UNSUPPORTED_IN_MESSAGES: Mapping[str, str] = {
    "tool_calls": f"must be empty, since {NO_TOOLS}",
    "tool_call_id": f"must be empty, since {NO_TOOLS}",
    "function_call": f"must be empty, since {NO_TOOLS}",
    "reasoning_content": f"must be empty, since {NO_REASONING}",
    "reasoning": f"must be empty, since {NO_REASONING}",
    "audio": f"must be empty, since {NO_AUDIO}",
}
"""Fields of messages as other servers write them: empty ones are accepted in every message history."""

EMPTY: tuple[object, ...] = (None, "", [], {})
Fields = TypeVar("Fields")
Schema = TypeVar("Schema", bound="GenerationFields")
Prompts: TypeAlias = list[str | list[int]]


def parse_request(schema: type[Schema], body: bytes, headers: Mapping[str, str]) -> Schema:
    """Parses a JSON body and checks it. Fields of the body win over those that headers give.

    Raises:
        InvalidRequest: the first fault, by the field's name.
    """
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON in UTF-8: {error}.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(
            f"The body must be a JSON object, but at line 1 column 1 a {type(content).__name__} begins."
        )
    given = {field: headers[name] for field, name in FIELDS_BY_HEADER.items() if name in headers}
    try:
        return schema.model_validate({**given, **supported_fields(content)})
    except ValidationError as error:
        raise invalid_request(error) from error


def supported_fields(content: Mapping[str, object]) -> dict[str, object]:
    """Returns the fields of a request that have an effect.

    Raises:
        InvalidRequest: one asks for a feature that does not exist here.
    """
    for name, (inactive, instead) in UNSUPPORTED.items():
        value = content.get(name)
        if value is not None and value not in inactive:
            raise InvalidRequest(f"`{name}`: {instead}.", param=name)
    return {name: value for name, value in content.items() if name not in IGNORED and name not in UNSUPPORTED}


def _prompts(value: object) -> Prompts:
    """Returns a string, a list of strings, token ids, or a list of lists of token ids, as a list of prompts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise fault("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        raise fault("is empty: give at least one token")
    if all(type(item) is int for item in value):
        return [value]
    if not all(isinstance(item, str) for item in value) and not all(is_token_ids(item) for item in value):
        raise fault("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not all(value):
        raise fault("is empty: give at least one token")
    return value


def _content(value: object) -> str:
    """Returns a message's content: a string, or text parts, which are joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fault("must be a string or a list of text parts")
    return "\n".join(_part_text(number, part) for number, part in enumerate(value))


def _part_text(number: int, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text":
        shown = f"is of type {str(kind)[:40]!r}" if kind else "has no type"
        raise fault(f'part {number} {shown}, but only {{"type": "text", "text": ...}} is supported: remove the part')
    if not isinstance(text, str):
        raise fault(f"part {number} must have a string as its `text`")
    return text


class Strict(BaseModel):
    """An object in a request: unknown fields are rejected, the first one by name."""

    model_config = ConfigDict(frozen=True, strict=True)
    known: ClassVar[frozenset[str]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        cls.known = frozenset(cls.model_fields)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown(cls, value: Fields) -> Fields:
        if isinstance(value, dict):
            unknown = next((name for name in value if name not in cls.known), None)
            if unknown is not None:
                raise fault("is unknown: remove it, or check its spelling", str(unknown)[:40])
        return value


class ChatMessage(Strict):
    """One message. Clients send back what other servers added to theirs: fields without a value are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if value.get("role") == "assistant" and value.get("content", "") is None:
            value = {**value, "content": ""}
        if value.keys() <= cls.known:
            return value
        kept = {name: item for name, item in value.items() if name in cls.known or item not in EMPTY}
        unsupported = next((name for name in kept if name in UNSUPPORTED_IN_MESSAGES), None)
        if unsupported is not None:
            raise fault(UNSUPPORTED_IN_MESSAGES[unsupported], unsupported)
        return kept


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationFields(Strict):
    """What both endpoints take. None everywhere means that the client leaves it to us."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = None
    stop_token_ids: StopTokenIds = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias = None
    return_token_ids: bool | None = None
    scenario: Scenario | None = None
    priority: Priority | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise fault("is only for streams: set `stream` to true, or remove it", "stream_options")
        return self


class CompletionRequest(GenerationFields):
    prompt: Annotated[Prompts, BeforeValidator(_prompts)]
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise fault("must equal `n`, as no choices are dropped: remove it", "best_of")
        return self


class ChatCompletionRequest(GenerationFields):
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1), AtMostMaxMessages]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise fault("needs `logprobs`: set that to true, or remove it", "top_logprobs")
        return self
