"""Messages of the public request API over NATS, version 1: a client's request, and its answer in chunks."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


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
    logit_bias: Annotated[dict[int, float], Field(max_length=1024)] | None = None
    logprobs: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
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
    """A client asks on CANCEL to end its request; the stream then ends with the error `cancelled`."""

    v: Literal[1] = 1
    id: str
