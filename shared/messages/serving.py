"""Messages between gateways and instances, version 1: requests first, then what instances tell a gateway.

`control.py` has those of the controller, `api.py` those of clients; `docs/protocol.md` says how they follow each other.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import ErrorBody
from shared.messages.records import Role
from shared.sampling import FinishReason, SamplingParams

RefusalReason = Literal[
    "no_slot",
    "no_blocks",
    "too_long",
    "no_time",
    "draining",
    "wrong_role",
    "wrong_epoch",
    "wrong_model",
    "duplicate",
    "expired",
    "invalid",
]


class Message(BaseModel):
    """A message between services. Unknown fields are ignored, so that a newer peer may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: Literal[1] = 1


class KVLease(Message):
    """Where a request's KV waits, in `num_bytes` bytes, until `expires_at` (Unix seconds)."""

    lease_id: str
    instance_id: str
    host: str
    port: int
    num_tokens: int
    num_bytes: int
    expires_at: float


class InstanceRequest(Message):
    """What the requests of a gateway to an instance have in common. Answered at once by `Answer`.

    `token_ids` are the prompt's `num_prompt_tokens` and what has been generated so far. `arrived_at` (Unix seconds) is
    when the gateway took the request in: over all attempts it stays, and the oldest are given up last.
    """

    request_id: str
    gateway_id: str
    epoch: int
    fingerprint: str
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]]
    num_prompt_tokens: Annotated[int, Field(ge=1)]
    sampling: SamplingParams
    arrived_at: float = 0.0
    is_canary: bool = False
    """A controller's few tokens, which are taken though all slots are: an instance joins just when others are full."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        num_outputs = len(self.token_ids) - self.num_prompt_tokens
        if not 0 <= num_outputs < self.sampling.max_tokens:
            raise ValueError(
                f"{len(self.token_ids)} tokens do not fit {self.num_prompt_tokens} of prompt and max_tokens"
            )
        return self


class PrefillRequest(InstanceRequest):
    """Gateway to prefill instance: compute the KV of `token_ids` and the next token.

    An instance that expects to be later than `first_token_by` (Unix seconds; None: whenever) refuses with `no_time`.
    """

    first_token_by: float | None = None


class DecodeRequest(InstanceRequest):
    """Gateway to decode instance: fetch the KV under `lease` and go on from `token_ids`, whose last has no KV yet.

    Without a lease the instance computes the KV itself.
    """

    lease: KVLease | None = None

    @model_validator(mode="after")
    def _lease_fits(self) -> Self:
        if self.lease is not None and self.lease.num_tokens != len(self.token_ids) - 1:
            raise ValueError(f"the lease has {self.lease.num_tokens} tokens, but {len(self.token_ids) - 1} are due")
        return self


class Answer(Message):
    """An instance's answer to a request: accepted, or refused with the reason. No work has been done either way."""

    accepted: bool
    reason: RefusalReason | None = None


class Cancel(Message):
    """Gateway to instance: stop these requests and free what they hold. Unknown ids are no error."""

    request_ids: list[str]


class TopLogprob(BaseModel):
    token_id: int
    logprob: float


class TokenLogprobs(BaseModel):
    """The chosen token's log probability under the unmodified distribution, and the likeliest tokens beside it."""

    logprob: float
    top: list[TopLogprob] = Field(default_factory=list)


class OutputToken(Message):
    """One generated token. `index` counts the request's generated tokens from 0, over all attempts."""

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None
    """With the first token of a request that the decode instance has prefilled itself: as in `Prefilled`."""


class Prefilled(Message):
    """Prefill instance to gateway (`prefilled`): first token, and lease on the KV unless the request has ended.

    `num_cached_tokens` leading tokens were not computed for this request, but found.
    """

    instance_id: str
    token: OutputToken
    lease: KVLease | None
    num_cached_tokens: int = 0


class Moved(Message):
    """Decode instance to gateway (`moved`): it changes its role, and the request's KV waits for another to fetch it.

    All its tokens so far have been sent before.
    """

    instance_id: str
    request_id: str
    lease: KVLease


class Free(Message):
    """Instance to a gateway that it has refused (`free`): it has room again."""

    instance_id: str
    group: str
    role: Role


class StepTokens(Message):
    """Decode instance to gateway (`tokens`): what one step generated for all of this gateway's requests."""

    instance_id: str
    tokens: list[OutputToken]


class Failed(Message):
    """Instance to gateway (`failed`): it gives the request up and holds nothing of it any more."""

    instance_id: str
    request_id: str
    error: ErrorBody
    counts: bool = True
    """Whether it speaks against trying again for ever; not where the instance merely ends, or is short of room."""
