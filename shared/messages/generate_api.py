"""Messages of the public request API over NATS, version 1: a client's request, and its answer in chunks."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from shared.errors import ErrorBody
from shared.messages.serving import TokenLogprobs
from shared.sampling import FinishReason


class ApiMessage(BaseModel):
    """A message of the public request API: unknown fields are rejected, so that a misspelt one is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ChatMessage(ApiMessage):
    role: str
    content: str


Scenario = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Priority = Literal["interactive", "batch"]
"""A waiting interactive request is served before every batch request."""
MAX_MESSAGES = 10_000
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_CHOSEN_TOKENS = 1024
"""In `stop_token_ids` and in `logit_bias`."""


def fault(message: str, field: str = "") -> PydanticCustomError:
    """Says what is wrong with a value, or with a field of it: the rest of a sentence that begins with its name."""
    # The message goes in as a value, as braces in it would be taken for fields of a template.
    return PydanticCustomError("request", "{message}", {"message": message, "field": field})


def is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _stop(value: object) -> list[str] | None:
    """Returns one stop string or a list of them as a list; one error names the field and one reason."""
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise fault("must be a string or a list of strings")
    if len(value) > MAX_STOP_STRINGS:
        raise fault(f"may have {MAX_STOP_STRINGS} strings at most, and has {len(value)}")
    if not all(value):
        raise fault(f"must not contain an empty string: give strings of 1 to {MAX_STOP_CHARS} characters")
    if max(map(len, value), default=0) > MAX_STOP_CHARS:
        raise fault(f"may have strings of 1 to {MAX_STOP_CHARS} characters")
    return value


def _stop_token_ids(value: object) -> object:
    if value is not None and not is_token_ids(value):
        raise fault("must be a list of token ids")
    if isinstance(value, list) and len(value) > MAX_CHOSEN_TOKENS:
        raise fault(f"may have {MAX_CHOSEN_TOKENS} tokens at most, and has {len(value)}")
    return value


def _logit_bias(value: object) -> object:
    """JSON's keys are strings; a token id in decimal digits is meant."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise fault("must be an object from token ids to numbers from -100 to 100")
    if len(value) > MAX_CHOSEN_TOKENS:
        raise fault(f"may have {MAX_CHOSEN_TOKENS} tokens at most, and has {len(value)}")
    bad = next((key for key in value if not (isinstance(key, str) and key.isdecimal() and len(key) < 10)), None)
    if bad is not None:
        raise fault(f"has the key {str(bad)[:40]!r}, which is not a token id")
    return {int(key): bias for key, bias in value.items()}


def _messages(value: object) -> object:
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise fault(f"may have {MAX_MESSAGES} messages at most, and has {len(value)}")
    return value


Stop = Annotated[list[str] | None, BeforeValidator(_stop)]
StopTokenIds = Annotated[list[int] | None, BeforeValidator(_stop_token_ids)]
LogitBias = Annotated[dict[int, float] | None, BeforeValidator(_logit_bias)]
AtMostMaxMessages = BeforeValidator(_messages)
"""Of a list of messages. Like the three types above, it is what both APIs accept."""


class GenerateRequest(ApiMessage):
    """A client's request on GENERATE: exactly one of `prompt`, `prompt_token_ids` and `messages`.

    Fields left out take the values the HTTP API gives them. `timeout_s` bounds the whole request.
    """

    v: Literal[1] = 1
    id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    model: str | None = None
    prompt: str | None = None
    prompt_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), AtMostMaxMessages] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias = None
    logprobs: int | None = None
    stop: Stop = None
    stop_token_ids: StopTokenIds = None
    ignore_eos: bool = False
    timeout_s: float | None = None
    scenario: Scenario | None = None
    priority: Priority = "interactive"


class GenerateChunk(ApiMessage):
    """A part of the answer, sent to the client's inbox; `index` counts messages from 0, so that a gap is noticed."""

    v: Literal[1] = 1
    type: Literal["chunk"] = "chunk"
    id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


class GenerateUsage(ApiMessage):
    """Tokens of a request; `cached_tokens` of its prompt were found in a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0


class GenerateDone(ApiMessage):
    """The terminal message of a request that was served."""

    v: Literal[1] = 1
    type: Literal["done"] = "done"
    id: str
    index: int
    finish_reason: FinishReason
    usage: GenerateUsage


class GenerateFailed(ApiMessage):
    """The terminal message of a request that failed; `error.code` is one of `shared/errors.py`.

    `index` is -1 where the gateway that sent the chunks has died and another one ends the request.
    """

    v: Literal[1] = 1
    type: Literal["error"] = "error"
    id: str
    index: int
    error: ErrorBody


class CancelGenerate(ApiMessage):
    """A client asks on CANCEL to end its request; the stream then ends with the error `cancelled`.

    An id that the client chose itself counts only together with the request's reply inbox, as others may guess it.
    """

    v: Literal[1] = 1
    id: str
    inbox: str | None = None
