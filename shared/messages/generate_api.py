"""Messages of the public request API over NATS, version 1: a client's request, and its answer in chunks."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from shared.errors import ErrorBody
from shared.messages.serving import TokenLogprobs
from shared.sampling import FinishReason


class ApiMessage(BaseModel):
    """A message of the public request API: unknown fields are rejected, so that a misspelt one is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ChatMessage(ApiMessage):
    role: str
    content: str


Scenario = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Priority = Literal["interactive", "batch"]
"""A waiting interactive request is served before every batch request."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024


def _stop_strings(value: object) -> object:
    """Returns one stop string or a list of them as a list; one error names the field and one reason."""
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(one, str) for one in strings):
        raise PydanticCustomError("request", "must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS or any(not 0 < len(one) <= MAX_STOP_CHARS for one in strings):
        message = "may have {count} strings of 1 to {chars} characters"
        raise PydanticCustomError("request", message, {"count": MAX_STOP_STRINGS, "chars": MAX_STOP_CHARS})
    return strings


def _logit_bias(value: object) -> object:
    if isinstance(value, dict):
        bad = next((key for key in value if not (isinstance(key, str) and key.isdecimal() and len(key) < 10)), None)
        if bad is not None:
            raise PydanticCustomError("request", "has the key {key}, which is not a token id", {"key": repr(bad)[:40]})
    return value


class GenerateRequest(ApiMessage):
    """A client's request on GENERATE: exactly one of `prompt`, `prompt_token_ids` and `messages`.

    Fields left out take the values the HTTP API gives them. `timeout_s` bounds the whole request.
    """

    v: Literal[1] = 1
    id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    model: str | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
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
    logit_bias: Annotated[Annotated[dict[int, float], Field(max_length=1024)] | None, BeforeValidator(_logit_bias)] = (
        None
    )
    logprobs: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop_strings)] = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
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
