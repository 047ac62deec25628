"""What instances and gateways write about themselves, and the maps of groups that the leading controller writes.

A record lives as long as its heartbeat renews it. A map stays.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
InstanceState = Literal["spare", "drained", "changing", "ready", "draining"]
"""Without a role; without one until an operator gives it one; on the way to another role or model; taking requests; on
the way to its end.
"""
EngineKind = Literal["torch", "mock"]


class Record(BaseModel):
    """`heartbeat` grows with every renewal: readers compare it with what they saw before, on their own clock."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    pid: int
    host: str
    version: str
    started_at: float
    heartbeat: int = 0


class Work(BaseModel):
    """What an engine has done since it was made, with its model. Differences of two of them describe the time between.

    Sums over decode steps (those without prefill) let a reader fit seconds = base + per_row * rows.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """Of those tokens, each with itself and all before it: what attention computes."""
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
    """What an instance has accepted and refused since its role began."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_accepted: int = 0
    num_refused: int = 0
    """For want of a slot, of blocks or of time."""
    num_ended: int = 0
    held_s: float = 0.0
    """The sum, over those that ended, of the seconds for which their slots were held: T_p and T_d of P/D-Serve."""


class InstanceRecord(Record):
    """One instance. `epoch` counts its assignments, 0 before the first: a request for an earlier one is refused."""

    role: Role | None
    group: str | None
    wish_role: Role | None = None
    wish_group: str | None = None
    """What it would like to be: its settings."""
    epoch: int
    term: int = 0
    """Of the leader whose order it followed last."""
    state: InstanceState
    engine: EngineKind = "torch"
    model: str
    """The name clients use."""
    model_path: str = ""
    """The folder or hub id of its weights."""
    fingerprint: str
    """Of weights, dtype and KV layout: instances with equal fingerprints can hand requests to each other."""
    max_model_len: int
    kv_host: str
    kv_port: int
    slots_total: int
    slots_used: int
    slots_leased: int = 0
    """Those of them whose KV waits to be fetched."""
    blocks_total: int
    blocks_free: int
    """Those that can be taken, cached ones among them."""
    blocks_cached: int = 0
    cache_query_tokens: int = 0
    """Tokens of all sequences that blocks were taken for, since the start."""
    cache_hit_tokens: int = 0
    """Those of them whose blocks were there."""
    work: Work = Work()
    admissions: Admissions = Admissions()
    on_demand: bool = False
    """Whether it was started because a controller asked for it, and may be ended again."""
    problem: str | None = None
    """Why the last order could not be followed."""


class Traffic(BaseModel):
    """One group's requests in one gateway: how many are there now, and sums since the gateway started."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    open: int = 0
    """All that have arrived and not ended, waiting ones among them."""
    waiting_prefill: int = 0
    waiting_decode: int = 0
    num_arrived: int = 0
    num_done: int = 0
    num_shed: int = 0
    """Ended early with 429 or 503."""
    num_first_tokens: int = 0
    num_in_time: int = 0
    """First tokens within the TTFT objective."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Of those that are done."""
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    """Of those that are done."""


class LabelTraffic(BaseModel):
    """Requests that named no scenario and were given this label, summed since the gateway started, all done."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_done: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    shared_prefix_tokens: int = 0
    """Leading tokens that their prompts have in common."""


class GatewayRecord(Record):
    """One gateway, where it serves HTTP, and its requests by group."""

    address: str
    open_requests: int
    waiting_requests: int
    traffic: dict[str, Traffic] = Field(default_factory=dict)
    labels: dict[str, LabelTraffic] = Field(default_factory=dict)
    """By label; an empty one is for requests that got none."""


class Member(BaseModel):
    """An instance as its group's map has it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    instance_id: str
    role: Role
    epoch: int
    fingerprint: str
    kv_host: str
    kv_port: int


class GroupMap(BaseModel):
    """Who serves a scenario: the instances that gateways may ask. `version` grows with every change.

    Objectives are in seconds; None is none.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: Literal[1] = 1
    name: str
    scenario: str
    version: int
    term: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    finds_scenarios: bool = False
    """Whether gateways label requests that name no scenario: said by the map of the default group."""
    model_path: str | None = None
    """The weights that members are to have, if an upgrade has said so; None is whatever they come with."""
    next_model_path: str | None = None
    """Those that an upgrade under way gives them."""
    members: tuple[Member, ...] = ()

    def of(self, role: Role) -> list[Member]:
        return [one for one in self.members if one.role == role]

    def member(self, instance_id: str) -> Member | None:
        return next((one for one in self.members if one.instance_id == instance_id), None)
