"""Every message on the bus, version 1. Requests to instances come first, then what instances tell a gateway.

The public request API has its own messages beside these, at the end. `docs/protocol.md` says how they follow each
other.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import ErrorBody
from shared.registry.records import GatewayRecord, InstanceRecord, Role
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


OrderRefusal = Literal["old_term", "old_epoch", "busy", "draining"]


class Assign(Message):
    """The leading controller's order to an instance (`assign`): be this role in this group, under this epoch.

    Without a role it becomes a spare. Answered at once by `Assigned`; how it goes on shows in the instance's record.
    `peers` are KV addresses that it connects to before it is ready.
    """

    term: int
    epoch: int
    role: Role | None
    group: str | None
    model: str | None = None
    """A folder or hub id to load first; None keeps the model that it has."""
    peers: list[tuple[str, int]] = Field(default_factory=list)
    patience_s: float | None = None
    """How long requests may take to end before they move; None is as the instance's settings say."""


class Assigned(Message):
    """An instance's answer to an order: it follows, or the reason why not."""

    accepted: bool
    reason: OrderRefusal | None = None


class Provision(Message):
    """The leading controller to whoever can start instances (`provision`): start so many spares, end these processes.

    Answered by `Provisioned`.
    """

    start: int = 0
    end: list[tuple[str, int]] = Field(default_factory=list)
    """Hosts and process ids of instances that were started on demand."""


class Provisioned(Message):
    """How many spares are being started, and how many more could be."""

    started: int
    room: int


class AdminRequest(Message):
    """An operator's wish to the leading controller (`admin.<verb>`): `flip` (instance, role, group), `drain`
    (instance), `control` (control), `upgrade` (model), `pause`, `resume`, `abort`.
    """

    key: str = ""
    instance: str | None = None
    role: Role | None = None
    group: str | None = None
    model: str | None = None
    control: Literal["auto", "advise", "off"] | None = None


class AdminAnswer(Message):
    """What became of the wish, in a sentence."""

    ok: bool
    message: str


class GroupStatus(Message):
    """A group as the controller sees it; instances by id. `late` ones are in its map, and their hearts do not beat."""

    name: str
    scenario: str
    model: str | None
    prefill: list[str]
    decode: list[str]
    late: list[str]
    map_version: int = 0
    waiting: int = 0
    open: int = 0
    load: dict[str, float | None] = Field(default_factory=dict)
    """What the controller has measured over its last window, by the names of `GroupLoad`."""


class DecisionStatus(BaseModel):
    """One decision of the controller, when (Unix seconds), and why. `outcome` is empty while it is under way."""

    at: float
    group: str
    what: str
    why: str
    outcome: str = ""


class InstanceStatus(InstanceRecord):
    """An instance's record and how long ago (seconds) its heartbeat last moved; `late` if that is too long."""

    heartbeat_age_s: float
    late: bool


class Status(Message):
    """The controller's answer on STATUS."""

    version: str
    controller: str
    """Who answers, with its process id; `leader` is who leads."""
    pid: int = 0
    leader: str | None = None
    control: str = "auto"
    groups: list[GroupStatus]
    instances: list[InstanceStatus]
    gateways: list[GatewayRecord]
    decisions: list[DecisionStatus] = Field(default_factory=list)
    upgrade: str | None = None
    """How far an upgrade is."""


class ApiMessage(BaseModel):
    """A message of the public request API: unknown fields are refused, so that a misspelt one is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ChatMessage(ApiMessage):
    role: str
    content: str


Scenario = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Priority = Literal["interactive", "batch"]
"""An interactive request passes every batch one that waits."""
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
    """A piece of the answer, in the client's inbox; `index` counts chunks from 0, so a gap is noticed."""

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
    """The terminal message of a request that was not; `error.code` is one of `shared/errors.py`."""

    v: Literal[1] = 1
    type: Literal["error"] = "error"
    id: str
    index: int
    error: ErrorBody


class CancelGenerate(ApiMessage):
    """A client's wish on CANCEL to end its request; the stream then ends with the error `cancelled`."""

    v: Literal[1] = 1
    id: str
