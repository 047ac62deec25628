"""How the next token is chosen: the parameters of one request, as the APIs take them and the engine reads them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_LOGPROBS = 20
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has not; as in OpenAI's API."""

FinishReason = Literal["stop", "length"]
"""Why a request ended: a stop token or stop string, or `max_tokens`."""


class SamplingParams(BaseModel):
    """Sampling parameters of one request, complete: no field is left to a default of the instance.

    `seed` and the position of a token in its request alone decide the draw, so that a request gives the same text
    alone, in a batch, and when another instance takes it over. Penalties are OpenAI's (presence, frequency: over
    generated tokens) and that of CTRL (arXiv 1909.05858; repetition: over prompt and generated tokens).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request (finish reason `stop`) once `min_tokens` are out; before that they are not drawn."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """How many likeliest tokens to report beside the chosen one; None reports none at all."""
