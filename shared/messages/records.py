"""Records in Redis: instances and gateways describe themselves, the leading controller describes groups (maps).

A record expires unless its heartbeat renews it. A map is permanent.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
InstanceState = Literal["spare", "drained", "changing", "ready", "draining"]
"""`spare`: without a role. `drained`: without a role until an operator assigns one. `changing`: between two roles or
models. `ready`: accepts requests. `draining`: about to end.
"""
EngineKind = Literal["torch", "mock"]


class Record(BaseModel):
    """`heartbeat` grows with every renewal. Readers compare it with the last value they read, on their own clock."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    id: str
    pid: int
    host: str
    version: str
    started_at: float
    heartbeat: int = 0


class Work(BaseModel):
    """Sums over all steps of an engine. The difference of two snapshots describes the time between them.

    Sums over decode steps (those without prefill) let a reader fit seconds = base + per_row * rows.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """Pairs of one of those tokens with itself or a token before it: the work of attention."""
    prefill_s: float = 0.0
    """Seconds in steps with prefill."""
    num_prefilled: int = 0
    """Prompts computed to their end."""
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_rows: int = 0
    """Generated tokens: the sum of rows over decode steps."""
    decode_rows_squared: int = 0
    decode_rows_s: float = 0.0
    """The sum of rows times seconds."""
    rows_beside_prefill: int = 0
    """Generated tokens of steps with prefill."""


class Admissions(BaseModel):
    """Requests that an instance has accepted and rejected since its role began."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    num_accepted: int = 0
    num_rejected: int = 0
    """For lack of a slot, of blocks, or because its next step was full."""
    num_ended: int = 0
    occupied_s: float = 0.0
    """The sum, over requests that ended, of the seconds for which they occupied a slot: T_p and T_d of P/D-Serve."""


class InstanceRecord(Record):
    """One instance. `epoch` counts its assignments from 0; it rejects requests for another epoch.

    `state_version` grows with every change that matters to gateways (role, group, epoch, state, model, address), so
    that a gateway reads a whole record only when it has changed.
    """

    role: Role | None
    group: str | None
    preferred_role: Role | None = None
    preferred_group: str | None = None
    """The role and group that its settings ask for."""
    epoch: int
    term: int = 0
    """The term of the leader whose order it followed last."""
    state: InstanceState
    state_version: int = 0
    engine: EngineKind = "torch"
    model: str
    """The name clients use."""
    model_path: str = ""
    """The folder or hub id of its weights."""
    fingerprint: str
    """Hash of weights, dtype and KV layout. KV can move between instances with equal fingerprints."""
    max_model_len: int
    kv_host: str
    kv_port: int
    slots_total: int
    slots_used: int
    slots_leased: int = 0
    """Slots of requests whose KV waits to be fetched."""
    blocks_total: int
    blocks_free: int
    """Blocks that can be allocated, including cached ones."""
    blocks_cached: int = 0
    cache_query_tokens: int = 0
    """Tokens of all sequences for which blocks were allocated, since the start."""
    cache_hit_tokens: int = 0
    """Those of them whose blocks were in the prefix cache."""
    prefill_token_s: float = 0.0
    """Measured seconds of prefill for each uncomputed token; 0 until something was measured."""
    prefill_pair_s: float = 0.0
    """Measured seconds of prefill for each pair of tokens that attend to each other, in addition."""
    max_step_tokens: int = 512
    """The token budget of one engine step."""
    work: Work = Work()
    admissions: Admissions = Admissions()
    on_demand: bool = False
    """Whether a controller asked for it to be started, and may end it again."""
    problem: str | None = None
    """Why the last order could not be followed."""


class Traffic(BaseModel):
    """One group's requests in one gateway: the current number, and sums since the gateway started."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    open: int = 0
    """Requests that have arrived and not ended, including waiting ones."""
    waiting_prefill: int = 0
    waiting_decode: int = 0
    num_arrived: int = 0
    num_done: int = 0
    num_shed: int = 0
    """Requests that ended early with 429 or 503."""
    num_first_tokens: int = 0
    num_in_time: int = 0
    """First tokens within the TTFT objective."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Summed over finished requests."""
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    """Summed over finished requests."""


class LabelTraffic(BaseModel):
    """Finished requests that named no scenario and were given this label, summed since the gateway started."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    num_done: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    shared_prefix_tokens: int = 0
    """Leading tokens that their prompts share."""


class GatewayRecord(Record):
    """One gateway, the address of its HTTP API, and its requests by group."""

    address: str
    open_requests: int
    waiting_requests: int
    traffic: dict[str, Traffic] = Field(default_factory=dict)
    labels: dict[str, LabelTraffic] = Field(default_factory=dict)
    """By label; the empty label counts requests without one."""
    failures: dict[str, int] = Field(default_factory=dict)
    """Failed attempts in the last minute, by instance id."""
    link_failures: dict[str, int] = Field(default_factory=dict)
    """Failed KV transfers in the last minute, by `<source instance>><target instance>`."""


class Member(BaseModel):
    """An instance's entry in its group's map."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    instance_id: str
    role: Role
    epoch: int
    fingerprint: str
    kv_host: str
    kv_port: int


class GroupMap(BaseModel):
    """The instances of a group, which gateways may ask for its scenario. `version` grows with every change.

    Objectives are in seconds; None means no objective.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    v: Literal[1] = 1
    name: str
    scenario: str
    version: int
    term: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    finds_scenarios: bool = False
    """Whether gateways label requests that name no scenario; only the default group's map sets it."""
    model_path: str | None = None
    """The weights that members must have after an upgrade; None accepts the weights they start with."""
    next_model_path: str | None = None
    """The weights that an upgrade under way gives them."""
    members: tuple[Member, ...] = ()

    def of(self, role: Role) -> list[Member]:
        return [one for one in self.members if one.role == role]

    def member(self, instance_id: str) -> Member | None:
        return next((one for one in self.members if one.instance_id == instance_id), None)
