"""Messages between gateways and instances, version 1.

    gateway                                         instance
      Ask (facts, perhaps the work itself)    ->              verb `prefill` or `decode`
                                              <-  AskReply    accepted, or rejected with the reason; at once
      Start (token ids, sampling parameters)  ->              only if the Ask did not carry it
                                              <-  Prefilled, StepTokens, Moved or Failed
      Cancel, Ping                            ->
                                              <-  Pong, SlotFreed

All durations are relative, so that no two clocks are compared. `control.py` has the messages of the controller,
`generate_api.py` those of clients; `docs/protocol.md` describes how they follow each other.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import ErrorBody
from shared.messages.records import Role
from shared.sampling import FinishReason, SamplingParams

RejectionReason = Literal[
    "no_slot",
    "busy",
    "no_blocks",
    "too_long",
    "draining",
    "wrong_role",
    "wrong_epoch",
    "wrong_model",
    "duplicate",
    "expired",
    "invalid",
]
"""Why an instance rejects an Ask. `busy`: it has as much uncomputed prompt work as fits into its next step."""

MAX_SECONDS = 7 * 86_400.0
MAX_PREFIX_KEYS = 32
MAX_PING_IDS = 1000

Seconds = Annotated[float, Field(ge=0.0, le=MAX_SECONDS, allow_inf_nan=False)]
"""A duration: finite, not negative, a week at most."""
Identifier = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:-]+$")]
"""An id of a request, gateway or instance, which may become a part of a subject."""
Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Message(BaseModel):
    """A message between services. Unknown fields are ignored, so that a newer peer may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    v: Literal[1] = 1


class KVLease(Message):
    """Where a request's KV waits to be fetched, in `num_bytes` bytes, for `expires_in_s` from when this was sent."""

    lease_id: Annotated[str, Field(min_length=1, max_length=200)]
    instance_id: Identifier
    host: Annotated[str, Field(min_length=1, max_length=255)]
    port: Annotated[int, Field(ge=1, le=65535)]
    num_tokens: Count
    num_bytes: Annotated[int, Field(ge=0, lt=2**48)]
    expires_in_s: Seconds


class Start(Message):
    """Gateway to instance (`start`): the work of an accepted Ask.

    `token_ids` are the prompt and what has been generated so far.
    """

    request_id: Identifier
    token_ids: list[TokenId]
    sampling: SamplingParams


class Ask(Message):
    """Gateway to instance (`prefill` or `decode`): can you take this request now? Answered at once by `AskReply`.

    It carries facts only, so that a rejection costs the same for a prompt of any length. Where acceptance is almost
    certain, or the prompt is short, `start` carries the work as well and saves a round trip.

    Attributes:
        num_tokens: tokens that `Start.token_ids` has: the prompt and what has been generated so far.
        age_s: seconds since the gateway read the request's first byte. The oldest request is preempted last.
        expires_in_s: seconds until the request's deadline.
        prefix_keys: keys of the first blocks of 64 tokens, for an estimate of how many tokens are cached.
        lease: for decode, the KV to fetch; without one, the decode instance computes the prompt itself.
        is_canary: a controller's few tokens, which are taken though all slots are in use.
    """

    request_id: Identifier
    gateway_id: Identifier
    epoch: Count
    fingerprint: str
    num_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    num_prompt_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    age_s: Seconds = 0.0
    expires_in_s: Seconds
    prefix_keys: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**64)], ...], Field(max_length=MAX_PREFIX_KEYS)] = ()
    lease: KVLease | None = None
    is_canary: bool = False
    start: Start | None = None

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        num_outputs = self.num_tokens - self.num_prompt_tokens
        if not 0 <= num_outputs < self.max_tokens:
            raise ValueError(f"{self.num_tokens} tokens do not fit {self.num_prompt_tokens} of prompt and max_tokens")
        if self.lease is not None and self.lease.num_tokens != self.num_tokens - 1:
            raise ValueError(f"the lease covers {self.lease.num_tokens} tokens instead of {self.num_tokens - 1}")
        if self.start is not None:
            check_start(self, self.start)
        return self


def check_start(ask: Ask, start: Start) -> None:
    """Checks that the work is what was asked for.

    Raises:
        ValueError: it belongs to another request, or has other lengths.
    """
    if start.request_id != ask.request_id:
        raise ValueError(f"the work of request {start.request_id} was sent with the question of {ask.request_id}")
    if len(start.token_ids) != ask.num_tokens or start.sampling.max_tokens != ask.max_tokens:
        raise ValueError(f"{len(start.token_ids)} tokens were sent, but the question announced {ask.num_tokens}")


class Capacity(Message):
    """How much more an instance would accept now.

    Attributes:
        slots_free: requests, as far as slots go.
        tokens_free: uncomputed prompt tokens. 0 says that a prompt would be rejected as `busy`.
        blocks_free: KV blocks.
        starts_in_s: seconds until a prompt that is accepted now would begin to be computed.
    """

    slots_free: Count = 0
    tokens_free: Count = 0
    blocks_free: Count = 0
    starts_in_s: Seconds = 0.0


class AskReply(Message):
    """Instance to gateway: accepted, or rejected with the reason. `capacity` is what is left after this reply."""

    accepted: bool
    reason: RejectionReason | None = None
    capacity: Capacity = Capacity()


class SlotFreed(Message):
    """Instance to a gateway that it has rejected (`slot_freed`): it would accept a request again."""

    instance_id: Identifier
    group: str
    role: Role
    capacity: Capacity = Capacity()


class Cancel(Message):
    """Gateway to instance (`cancel`): stop these requests and free what they use. Unknown ids are no error."""

    request_ids: list[Identifier]


class Ping(Message):
    """Gateway to instance, or instance to gateway (`ping`): are you there, and do you still know these requests?"""

    sender_id: Identifier
    request_ids: Annotated[list[Identifier], Field(max_length=MAX_PING_IDS)] = Field(default_factory=list)


class Pong(Message):
    """The answer to a Ping.

    Attributes:
        unknown: those of the Ping's requests that the receiver does not know (any more).
        step_s: for how long an instance's engine has been in its current step; 0 between steps. It grows without bound
            when only the engine hangs, since the event loop goes on answering. Gateways leave it at 0.
    """

    unknown: list[Identifier] = Field(default_factory=list)
    step_s: Seconds = 0.0


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
    index: Count
    token_id: TokenId
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None
    """With the first token of a request whose prompt the decode instance computed itself: as in `Prefilled`."""


class Prefilled(Message):
    """Prefill instance to gateway (`prefilled`): first token, and lease on the KV unless the request has ended.

    `num_cached_tokens` leading tokens were found in the prefix cache and not computed for this request.
    """

    instance_id: str
    token: OutputToken
    lease: KVLease | None
    num_cached_tokens: int = 0


class StepTokens(Message):
    """Decode instance to gateway (`tokens`): what one step generated for all of this gateway's requests."""

    instance_id: str
    tokens: list[OutputToken]


class Moved(Message):
    """Decode instance to gateway (`moved`): its role changes, and the request's KV waits for another to fetch it.

    All its tokens so far have been sent before.
    """

    instance_id: str
    request_id: str
    lease: KVLease


class Failed(Message):
    """Instance to gateway (`failed`): it has released the request, and another attempt may follow elsewhere.

    Attributes:
        counts: whether the failure counts against `max_attempts`. It does not where the instance merely ends, or is
            short of blocks.
        in_failed_step: whether the request was in an engine step that raised. It may or may not be the cause.
        kv_source_id: the instance from which KV could not be fetched, if that was the failure.
    """

    instance_id: str
    request_id: str
    error: ErrorBody
    counts: bool = True
    in_failed_step: bool = False
    kv_source_id: str | None = None
