"""Every setting, read once at start from `PDSERVE_*` variables; no other file reads the environment.

A service takes one frozen class. A variable with our prefix that no class knows, or a value out of range, stops the
start with a sentence that says what to write (`SettingsInvalid`).
"""

import difflib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import SettingsInvalid
from shared.messages.records import EngineKind

PREFIX = "PDSERVE_"
DEMO_MODEL = str(Path(__file__).resolve().parents[1] / "models" / "demo")

Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
GroupName = Annotated[str, Field(min_length=1, max_length=48, pattern=r"^-?[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*-?$")]


class Settings(BaseSettings):
    """What every service needs: where the bus and the registry are, and how hearts beat."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    nats_url: str = "nats://127.0.0.1:4222"
    redis_url: str = "redis://127.0.0.1:6379"
    heartbeat_s: Seconds = 0.5
    heartbeat_late_s: Seconds = 2.0
    """A heartbeat that has not moved for so long is late: its instance gets no requests, and loses those it has."""
    record_ttl_s: Seconds = 5.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    connect_timeout_s: Seconds = 10.0
    """How long a service tries to reach NATS and Redis at start before it ends."""
    drain_timeout_s: Seconds = 10.0
    """How long a service that is asked to end may go on with the requests it has."""

    @model_validator(mode="after")
    def _hearts_beat_often_enough(self) -> Self:
        if not 3 * self.heartbeat_s <= self.heartbeat_late_s <= self.record_ttl_s:
            raise ValueError(
                f"PDSERVE_HEARTBEAT_S ({self.heartbeat_s:g}) must be at most a third of PDSERVE_HEARTBEAT_LATE_S "
                f"({self.heartbeat_late_s:g}), and that at most PDSERVE_RECORD_TTL_S ({self.record_ttl_s:g})"
            )
        return self


class ModelSettings(Settings):
    """Settings of the services that know the model."""

    model: str = DEMO_MODEL
    """A folder with the model's files, or the id of a model on the hub."""
    model_name: str | None = None
    """The name clients use; the last part of `model` unless set."""

    @property
    def served_model_name(self) -> str:
        return self.model_name or (Path(self.model).name if Path(self.model).exists() else self.model)


class GatewaySettings(ModelSettings):
    """Settings of `services.gateway`."""

    http_host: str = "127.0.0.1"
    http_port: Port = 8000
    api_keys: str = ""
    """Keys that clients may use, separated by commas; none means that everybody may."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    max_header_bytes: Annotated[int, Field(ge=1024)] = 64 * 2**10
    max_connections: Annotated[int, Field(ge=1)] = 4096
    """How many HTTP connections may be open; further ones are rejected with 429."""
    http_read_timeout_s: Seconds = 30.0
    """How long an HTTP request may take to arrive, head and body; also how long a new connection may be silent."""
    http_write_timeout_s: Seconds = 30.0
    """A client that leaves data unread for so long is disconnected."""
    http_idle_timeout_s: Seconds = 60.0
    """How long a connection stays open between two requests."""
    cors_origins: str = ""
    """Origins of web pages that may use the HTTP API, separated by commas; `*` allows all, none switches CORS off."""
    idempotency_ttl_s: Seconds = 300.0
    """How long a finished answer is kept for retries with the same Idempotency-Key."""
    request_timeout_s: Seconds = 600.0
    ttft_timeout_s: Seconds = 60.0
    """A request that no prefill instance has accepted by then ends with 429."""
    token_timeout_s: Seconds = 120.0
    """An instance that has a request and is silent for so long has failed it."""
    answer_timeout_s: Seconds = 2.0
    """How long an instance may take to accept or reject."""
    instance_wait_s: Seconds = 5.0
    """How long a request waits for an instance where there is none at all."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """How many attempts at a request may fail without progress in between before it fails."""
    local_prefill: Literal["auto", "off"] = "auto"
    """Whether a decode instance computes a short prompt itself where that is quicker, as measured."""
    max_waiting: Annotated[int, Field(ge=1)] = 1024
    """How many requests may wait in this gateway for a slot of one role of a group; one more is rejected with 429."""
    watch_groups: str = ""
    """The groups that this gateway serves, separated by commas, with all their replicas; none means all groups."""

    @property
    def local_address(self) -> str:
        """Returns the URL at which a client on this machine finds the HTTP API."""
        host = "127.0.0.1" if self.http_host in ("0.0.0.0", "::") else self.http_host
        return f"http://{host}:{self.http_port}"

    @property
    def watched_group_names(self) -> frozenset[str]:
        """Returns the names in `watch_groups`; empty for all groups."""
        return frozenset(name.strip() for name in self.watch_groups.split(",") if name.strip())

    @property
    def api_key_set(self) -> frozenset[str]:
        return frozenset(key.strip() for key in self.api_keys.split(",") if key.strip())

    @property
    def cors_origin_list(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


class InstanceSettings(ModelSettings):
    """Settings of `services.prefill` and `services.decode`."""

    role: Literal["prefill", "decode", "spare"] = "prefill"
    """The role that it prefers; the controller assigns one. A spare takes any role in any group."""
    group: GroupName = "default"
    """In which group, unless it is a spare."""
    on_demand: bool = False
    """Whether it was started for a controller that asked, which may end it again."""
    engine: EngineKind = "torch"
    """`mock` computes nothing: it waits as long as `mock_times` say, and its text is noise."""
    mock_times: str = "prefill=5ms+0.1ms/token,step=20ms+0.3ms/row,transfer=1ms+5us/token"
    """How long the mock engine takes: each a base, and more for each token or row; what is left out is as here."""
    engine_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the time in which the engine may compute: several instances on one small machine are then as fast
    as each on a slower one of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    """Where to compute and keep KV: `cpu`, `cuda` (the first GPU) or `cuda:N`."""
    quantization: Literal["none", "int8"] = "none"
    """Of the weights of linears, as they are loaded."""
    native_kernels: bool = True
    """Whether to use the kernels in C++ where there is a compiler to build them."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads of this instance; 0 takes all cores of the machine."""
    kv_host: str = "127.0.0.1"
    """The address on which other instances fetch KV from this one; with 0.0.0.0 they are told the machine's own."""
    kv_advertise_host: str | None = None
    """Where others reach that address, if it is not what `kv_host` says."""
    kv_port: Port = 0
    kv_pool_bytes: Annotated[int, Field(ge=2**20)] = 2**30
    block_size: Literal[8, 16, 32, 64, 128] = 16
    max_model_len: Annotated[int, Field(ge=0)] = 0
    """The longest request in tokens, prompt and answer; 0 takes the model's, or what the pool holds if that is less."""
    prefix_cache: bool = True
    """Whether requests that begin alike share KV, and KV that no request uses is kept while there is space."""
    prefill_slots: Annotated[int, Field(ge=1)] = 8
    decode_slots: Annotated[int, Field(ge=1)] = 64
    decode_reserve_tokens: Annotated[int, Field(ge=1)] = 256
    """For how many tokens a decode instance reserves blocks at a time."""
    max_step_tokens: Annotated[int, Field(ge=16)] = 512
    """The token budget of one engine step."""
    max_uncomputed_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Prompts are accepted while they fit into so many uncomputed tokens; 0 accepts what fits into the next step, so
    that all waiting is in the gateways."""
    move_after_s: Seconds = 1.0
    """For how long a decode instance that changes its role lets requests end by themselves before they move."""
    lease_s: Seconds = 30.0
    """How long a prefill instance keeps KV that nobody fetches."""
    fetch_timeout_s: Seconds = 30.0
    stall_timeout_s: Seconds = 5.0
    """How long a KV connection may transfer nothing before the fetch fails."""


class ControllerSettings(Settings):
    """Settings of `services.controller`."""

    groups: str = ""
    """The groups file; a single group that serves everything without."""
    control: Literal["auto", "advise", "off"] | None = None
    """Whether ratios follow the load, or are only advised, or are left alone; as the groups file says unless set."""
    admin_key: str = ""
    """What operators' commands have to show; none means that everybody on the bus may give them."""
    leader_lease_s: Seconds = 1.5
    """How long a leader is taken to be alive without renewing its lease."""
    canary_timeout_s: Seconds = 10.0
    """How long the canary request through a new member may take."""
    order_timeout_s: Seconds = 60.0
    """How long an instance may take to follow an order, the loading of another model aside."""
    load_timeout_s: Seconds = 600.0
    """How long an instance may take to load another model."""


class UpSettings(Settings):
    """Settings of `pdserve up` itself."""

    nats_open: bool = False
    """Whether the embedded NATS server lets everybody publish and subscribe everywhere, without accounts."""
    nats_clients: str = "client"
    """Names of the request API's clients, separated by commas: each gets a user of the embedded NATS server."""


AnySettings = TypeVar("AnySettings", bound=Settings)


def load(kind: type[AnySettings], **overrides: object) -> AnySettings:
    """Reads `kind` from the environment; `overrides` win.

    Raises:
        SettingsInvalid: an unknown `PDSERVE_*` variable, or a bad value.
    """
    reject_unknown(os.environ)
    try:
        return kind(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsInvalid("; ".join(_sentence(dict(item)) for item in error.errors())) from error


def reject_unknown(environment: Mapping[str, str]) -> None:
    """Raises `SettingsInvalid` where the environment has a variable of ours that no service knows."""
    known = {PREFIX + name.upper() for kind in _every_kind(Settings) for name in kind.model_fields}
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.85)
            meant = f"did you mean {' or '.join(near)}?" if near else "docs/operations.md has them all."
            raise SettingsInvalid(f"{name} is no setting of pdserve: {meant}")


def environment_of(settings: Mapping[str, object]) -> dict[str, str]:
    """This process's environment with settings (by field name) added, for a child process; None leaves one out."""
    added = {PREFIX + name.upper(): str(value) for name, value in settings.items() if value is not None}
    return {**os.environ, **added}


def adopt_environment(environment: Mapping[str, str]) -> None:
    """Takes over another process's environment: that of a fork server is as old as the server."""
    os.environ.clear()
    os.environ.update(environment)


def given(name: str) -> str | None:
    """Returns the environment's value of a setting, or None."""
    return os.environ.get(PREFIX + name.upper())


def tame_threads() -> None:
    """Makes idle OpenMP threads sleep: those of several processes on the same cores spin against each other otherwise.

    It has to come before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def tracing_endpoint_is_set() -> bool:
    """Returns whether the standard OpenTelemetry variables ask for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def hostname() -> str:
    """This machine's name as it may stand in an id."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:32]


def _every_kind(kind: type[Settings]) -> list[type[Settings]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _every_kind(child))]


def _sentence(item: Mapping[str, object]) -> str:
    location = item["loc"]
    assert isinstance(location, tuple)
    if not location:
        return str(item["msg"])
    name = PREFIX + str(location[0]).upper()
    said = "write true or false" if item["type"] == "bool_parsing" else item["msg"]
    return f"{name}={item['input']!r} cannot be used: {said}"
