"""What instances and gateways write about themselves. A record lives as long as its heartbeat renews it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from shared.kv.layout import KVLayout

Role = Literal["prefill", "decode"]
InstanceState = Literal["ready", "draining"]


class Record(BaseModel):
    """`heartbeat` grows with every renewal: readers compare it with what they saw before, on their own clock."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    pid: int
    host: str
    version: str
    started_at: float
    heartbeat: int = 0


class InstanceRecord(Record):
    """One instance. `epoch` counts its roles: a request meant for an earlier one is refused."""

    role: Role
    group: str
    epoch: int
    state: InstanceState
    model: str
    fingerprint: str
    """Of weights, dtype and KV layout: instances with equal fingerprints can hand requests to each other."""
    max_model_len: int
    kv_host: str
    kv_port: int
    kv_layout: KVLayout
    slots_total: int
    slots_used: int
    blocks_total: int
    blocks_free: int
    """Those that can be taken, cached ones among them."""
    blocks_cached: int = 0
    cache_query_tokens: int = 0
    """Tokens of all sequences that blocks were taken for, since the start."""
    cache_hit_tokens: int = 0
    """Those of them whose blocks were there."""


class GatewayRecord(Record):
    """One gateway, where it serves HTTP, and how many requests it has open and waiting for a slot."""

    address: str
    group: str
    open_requests: int
    waiting_requests: int
