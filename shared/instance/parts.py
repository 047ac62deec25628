"""What an instance has whichever role it plays, and what it holds of a request."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from opentelemetry.trace import Span

from shared.engine.engine import ServedModel
from shared.engine.prefix_cache import PrefixCache
from shared.engine.runner import EngineRunner
from shared.engine.sequence import Sequence
from shared.engine.staging import Staging
from shared.instance.outbox import Outbox
from shared.instance.reservations import Reservation
from shared.kv.holder import KVHolder
from shared.messages.records import Work
from shared.settings import InstanceSettings


@dataclass(frozen=True, slots=True)
class InstanceParts:
    """What an instance has, whichever role it plays."""

    settings: InstanceSettings
    instance_id: str
    epoch: Callable[[], int]
    group: Callable[[], str]
    accepting: Callable[[], bool]
    loaded: ServedModel
    max_model_len: int
    staging: Staging
    cache: PrefixCache
    runner: EngineRunner
    holder: KVHolder
    outbox: Outbox
    tasks: asyncio.TaskGroup
    told: Callable[[], Awaitable[None]]
    """Returns once all tokens that the engine has given are told to their gateways."""
    work: Callable[[], Work]
    """What the engine has done so far."""
    in_step_s: Callable[[], float]
    """For how long its step under way has been."""
    room_came_free: Callable[[], None]
    """Called when a request was let go: its blocks are for every role of this instance."""


@dataclass(slots=True, eq=False)
class Held:
    """A request that this instance has accepted, and all that it holds for it."""

    request_id: str
    gateway_id: str
    sequence: Sequence
    reservation: Reservation
    deadline: float
    span: Span
    accepted_at: float = field(default_factory=time.monotonic)
    expected_s: float = 0.0
    """After how long its first token was expected when it was accepted."""
    in_engine: bool = False
    computes_prompt: bool = False
    """Its prompt is computed here, by a decode instance, and its first token has not come yet."""
    lease_id: str | None = None
    """The only key to its KV, while that waits to be fetched."""
    transfer: asyncio.Task[None] | None = None

    @property
    def ending(self) -> bool:
        return self.reservation.is_ending
