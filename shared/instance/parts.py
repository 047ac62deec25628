"""What an instance has whichever role it plays, and what it holds of a request."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.trace import Span

from shared.engine.engine import ServedModel
from shared.engine.prefix_cache import PrefixCache
from shared.engine.runner import EngineRunner
from shared.engine.sequence import Sequence
from shared.engine.staging import Staging
from shared.engine.work import PromptWork
from shared.instance.latency_estimate import LatencyEstimate
from shared.instance.outbox import Outbox
from shared.instance.reservations import Reservation
from shared.kv.holder import KVHolder
from shared.messages.records import Work
from shared.messages.serving import Ask
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
    latency: LatencyEstimate
    notify_gateways: Callable[[], None]
    """Tells gateways that were rejected, by the current role, when they would be accepted."""
    room_came_free: Callable[[], None]
    """Called when a request was let go: its blocks are for every role of this instance."""


@dataclass(slots=True, eq=False)
class Reserved:
    """An accepted request whose work (`Start`) has not come yet: a slot and blocks are reserved for it.

    Args:
        arrived_at, deadline, accepted_at: monotonic seconds.
        num_uncomputed_tokens: how many tokens of its prompt are probably to be computed here.
    """

    ask: Ask
    reservation: Reservation
    arrived_at: float
    deadline: float
    num_uncomputed_tokens: int
    trace_context: Context
    accepted_at: float = field(default_factory=time.monotonic)

    @property
    def request_id(self) -> str:
        return self.ask.request_id


@dataclass(slots=True, eq=False)
class Held:
    """A request that this instance has accepted and started, and all that it holds for it.

    Attributes:
        num_tokens: the tokens that it came with.
        deadline, accepted_at: monotonic seconds.
        changed_at: when it last came forward (monotonic seconds).
    """

    request_id: str
    gateway_id: str
    num_tokens: int
    sequence: Sequence
    reservation: Reservation
    deadline: float
    span: Span
    accepted_at: float = field(default_factory=time.monotonic)
    changed_at: float = field(default_factory=time.monotonic)
    in_engine: bool = False
    computes_prompt: bool = False
    """Its prompt is computed here, and its first token has not come yet."""
    lease_id: str | None = None
    """The only key to its KV, while that waits to be fetched."""
    transfer: asyncio.Task[None] | None = None

    @property
    def ending(self) -> bool:
        return self.reservation.is_ending

    def num_uncomputed_tokens(self, block_size: int) -> int:
        """Returns how many tokens of its prompt are left once the engine step under way is over.

        Shared blocks that another request is still to fill are that one's work, until this one computes them itself.
        """
        if not self.computes_prompt:
            return 0
        sequence = self.sequence
        num_ahead = sequence.num_planned_tokens or sequence.num_shared_blocks * block_size
        return max(0, self.num_tokens - max(num_ahead, sequence.num_computed_tokens))

    def work_in_step(self) -> PromptWork:
        """Returns what the engine step under way computes of its prompt."""
        sequence = self.sequence
        if not self.computes_prompt or sequence.num_planned_tokens <= sequence.num_computed_tokens:
            return PromptWork()
        return PromptWork.of(sequence.num_planned_tokens, sequence.num_computed_tokens)
