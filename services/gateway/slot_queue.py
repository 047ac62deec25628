"""The queue of requests that wait for a slot of one role in one group: all waiting happens here, none in instances.

    a request arrives, an instance has capacity again, the group changes, or a moment has passed
      -> requests ask, in order of service (`routing.py`), the best instances that may accept
      -> accepted: the request leaves the queue; rejected: the instance is asked again when it says so, or soon

As many requests ask at a time as instances are known to have capacity for, so a free system admits them concurrently,
and a full one hears few questions however many requests wait. P/D-Serve (arXiv 2408.08147, 3.4) calls this on-demand
forwarding. An instance that is slow to answer delays nobody: after a few times its usual answer time, the next
instance is asked as well, and the first to accept gets the request.
"""

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from services.gateway import routing
from services.gateway.events import EventRouter
from services.gateway.groups import Group, Groups
from services.gateway.instance_client import INLINE_TOKENS, InstanceClient, question
from services.gateway.instance_watch import Instances
from services.gateway.local_prefill import is_at_decode_only
from services.gateway.request import Request
from services.gateway.routing import Waiting
from shared.errors import (
    RETRY_AFTER_S,
    InstanceFailed,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    NoInstance,
    NoResponders,
    Overloaded,
    PDServeError,
    PeerUnavailable,
    RequestError,
)
from shared.messages.records import InstanceRecord, Role
from shared.messages.serving import AskReply, Capacity, KVLease, Start
from shared.prefix_affinity import shares
from shared.settings import GatewaySettings
from shared.telemetry.gateway_metrics import GatewayMetrics

TICK_S = 0.02
"""How often a queue with waiting requests looks for what has become possible by time alone."""
REJECTED_S = 0.2
"""After how long a request asks an instance again that had too few blocks for it, unless that has freed some."""
SMALL_GROUP = 8
"""Instances of a role that are all compared for each request."""
SAMPLE = 4
"""Instances that are compared in a larger group: the best of four is almost as good as the best of all."""
MAX_EXAMINED = 16
"""Waiting requests for which a candidate is looked for at a time."""
STALE_ESTIMATE_S = 5.0
"""Estimates that no prefill has confirmed for so long shed nothing: an instance may be fast again."""
INSTANCE_IS_FULL = frozenset({"no_slot", "draining", "wrong_role", "wrong_epoch"})
"""Reasons that hold for every request; the others concern the rejected request alone. `busy` may be either."""

log = logging.getLogger(__name__)


class TooLate(PDServeError):
    """The first token cannot be computed before its deadline any more."""


class NoCandidate(PDServeError):
    """No instance of this group can serve the request any more, but others can."""


@dataclass(slots=True, frozen=True)
class Accepted:
    """The instance that accepted, after how many rejections, and the work, unless it travelled with the question."""

    instance: InstanceRecord
    num_rejections: int
    start: Start | None


@dataclass(slots=True, frozen=True)
class Asking:
    """A question under way, and when it was sent."""

    task: asyncio.Task[None]
    sent_at: float


@dataclass(slots=True, eq=False, kw_only=True)
class Entry(Waiting):
    """A waiting request.

    Attributes:
        lease: the KV to fetch, for decode.
        until: when it stops waiting (monotonic).
        matched: the share of its prompt that instances have cached, by instance id.
        asks: the questions under way, by instance id.
        rejected_at: when an instance was asked that rejected it for a reason that concerns this request alone.
        unsuited: instances whose whole pool is too small for it, or that cannot read it.
        alone_since: since when no ready instance can serve it at all.
    """

    request: Request
    lease: KVLease | None
    until: float
    matched: dict[str, float]
    result: asyncio.Future[Accepted]
    asks: dict[str, Asking] = field(default_factory=dict)
    rejected_at: dict[str, float] = field(default_factory=dict)
    unsuited: set[str] = field(default_factory=set)
    num_rejections: int = 0
    alone_since: float | None = None

    def fail(self, error: PDServeError) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class SlotQueue:
    """The queue for one role's slots in one group."""

    def __init__(
        self,
        role: Role,
        group: Group,
        groups: Groups,
        instances: Instances,
        router: EventRouter,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
    ) -> None:
        self._role: Role = role
        self._group = group
        self._groups = groups
        self._instances = instances
        self._router = router
        self._settings = settings
        self._metrics = metrics
        self._waiting: dict[Entry, None] = {}
        self._tie = random.Random()
        self._soon: asyncio.Handle | None = None
        self._tick: asyncio.TimerHandle | None = None
        self.prefilled_at = time.monotonic()
        """When a prefill last confirmed that estimates are current."""
        group.on_change.append(self.notify)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def notify(self) -> None:
        """Looks for candidates again as soon as the event loop gets to it."""
        if self._waiting and self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._dispatch)

    def slot_freed(self, instance_id: str, capacity: Capacity) -> None:
        """Notes that an instance would accept requests again."""
        self._instances.client(instance_id).freed(capacity)
        self.notify()

    async def acquire(
        self, request: Request, *, until: float, lease: KVLease | None = None, first_token_by: float | None = None
    ) -> Accepted:
        """Waits until an instance accepts the request, and so participates in it.

        Args:
            until: when to stop waiting (monotonic).
            lease: the KV to fetch, for decode; a decode queue without one asks for local prefill.
            first_token_by: when the first token is due (monotonic).

        Raises:
            TimeoutError: no instance accepted in time.
            TooLate: the first token would be too late even if an instance accepted now.
            NoCandidate: no instance here can serve it any more, but others can.
            RequestError: too many requests wait, or for a while no instance has been there that can serve it.
        """
        if len(self._waiting) >= self._settings.max_waiting and not request.has_started:
            message = f"{len(self._waiting)} requests wait for a {self._role} slot: try again later"
            raise Overloaded(message, retry_after_s=RETRY_AFTER_S)
        entry = Entry(
            arrived_at=request.arrived_at,
            first_token_by=first_token_by,
            priority=routing.priority_of(has_started=request.has_started, is_batch=request.is_batch),
            request=request,
            lease=lease,
            until=until,
            matched=shares(self._group.affinity.matched(request.prefix_keys), len(request.token_ids)),
            result=asyncio.get_running_loop().create_future(),
        )
        self._estimate(entry)
        self._waiting[entry] = None
        self.notify()
        try:
            accepted = await self._result(entry)
            if accepted.start is not None:
                await self._instances.client(accepted.instance.id).start(accepted.start)
            return accepted
        except MessageTooLarge as error:
            raise InvalidRequest(f"The request does not fit into a NATS message: {error}") from error
        finally:
            del self._waiting[entry]
            entry.result.cancel()
            for asking in entry.asks.values():
                asking.task.cancel()
            self.notify()
            # They may still accept. The cancel arrives behind the question, so that nothing stays reserved.
            await self._router.leave_and_cancel(request, *(one for one in entry.asks if one in request.asked))

    async def _result(self, entry: Entry) -> Accepted:
        while True:
            now = time.monotonic()
            is_stale = now - self.prefilled_at > STALE_ESTIMATE_S
            hopeless_at = now + STALE_ESTIMATE_S if is_stale else routing.hopeless_at(entry)
            if now >= hopeless_at:
                raise TooLate(f"the first token would take {entry.expected_s:.3g} s from now")
            try:
                async with asyncio.timeout(min(entry.until, hopeless_at) - now):
                    return await asyncio.shield(entry.result)
            except TimeoutError:
                if entry.result.done():
                    return entry.result.result()
                if time.monotonic() >= entry.until:
                    raise
                self._estimate(entry)

    def _estimate(self, entry: Entry) -> None:
        """Estimates how long the instance takes that would compute the prompt soonest."""
        if self._role == "prefill":
            heartbeats = (self._groups.heartbeat(one.id) for one in self._group.ready("prefill")[:SAMPLE])
            speeds = [one for one in heartbeats if one is not None]
            entry.expected_s = routing.shortest_prefill_s(speeds, len(entry.request.token_ids), entry.matched)

    def _dispatch(self, *, is_tick: bool = False) -> None:
        """Sends the questions that can be sent now."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._waiting and self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._ticked)
        now = time.monotonic()
        ready = self._group.ready(self._role)
        if not is_tick and 0 < len(ready) <= SMALL_GROUP:
            clients = (self._instances.client(one.id) for one in ready)
            if not any(one.may_be_asked(self._role, now) for one in clients):
                return  # all are full: the order of service is not worth working out
        num_examined = 0
        for entry in self._in_order(now):
            if entry.result.done() or (entry.asks and not self._is_slow(entry, now)):
                continue
            record = self._choose(entry, now, search_all=num_examined == 0)
            if record is not None:
                if entry.asks:
                    self._metrics.count_hedged_ask()
                asking = asyncio.create_task(self._ask(entry, record))
                self._instances.client(record.id).count_question(asking, len(entry.request.token_ids))
                entry.asks[record.id] = Asking(asking, now)
            elif not self._is_alone(entry, now):
                num_examined += 1
                if num_examined == MAX_EXAMINED:
                    break

    def _ticked(self) -> None:
        self._tick = None
        if self._waiting:
            self._dispatch(is_tick=True)

    def _in_order(self, now: float) -> Iterable[Entry]:
        if len(self._waiting) == 1 or self._role == "decode":
            return sorted(self._waiting, key=lambda one: one.due)
        clients = (self._instances.client(one.id) for one in islice(self._group.ready("prefill"), MAX_EXAMINED))
        return routing.service_order(self._waiting, [max(0.0, one.starts_at() - now) for one in clients], now)

    def _is_slow(self, entry: Entry, now: float) -> bool:
        """Returns whether all instances that have been asked take unusually long to answer."""
        return all(now - one.sent_at > self._instances.client(name).hedge_after_s for name, one in entry.asks.items())

    def _choose(self, entry: Entry, now: float, *, search_all: bool) -> InstanceRecord | None:
        """Returns the best instance that may accept the request now: of a few, if there are many."""
        ready = self._group.ready(self._role)
        sample: Iterable[InstanceRecord] = ready
        if len(ready) > SMALL_GROUP:
            cached = (self._group.find(instance_id) for instance_id in islice(entry.matched, SAMPLE))
            sample = [*self._tie.sample(ready, SAMPLE), *(one for one in cached if one is not None)]
        found = [one for one in sample if self._may_ask(entry, one, now)]
        if not found and search_all and len(ready) > SMALL_GROUP:
            found = [one for one in ready if self._may_ask(entry, one, now)]
        others = [one for one in found if one.id not in entry.request.failures.instances] or found
        num_open = {one.id: self._router.num_open(one.id) for one in others}
        return next(iter(routing.candidates(others, num_open, self._tie, entry.matched)), None)

    def _may_ask(self, entry: Entry, record: InstanceRecord, now: float) -> bool:
        client = self._instances.client(record.id)
        if record.id in entry.asks or not client.may_be_asked(self._role, now) or not self._suits(entry, record):
            return False
        if now - entry.rejected_at.get(record.id, -REJECTED_S) < REJECTED_S and (
            client.freed_at < entry.rejected_at[record.id]
        ):
            return False
        if entry.lease is not None:
            return self._instances.link_allows(entry.lease.instance_id, record.id, now)
        if self._role == "decode":
            return True
        return self._instances.can_send_to_any(record.id, (one.id for one in self._group.ready("decode")), now)

    def _suits(self, entry: Entry, record: InstanceRecord) -> bool:
        request = entry.request
        is_large_enough = record.id not in entry.unsuited
        return is_large_enough and self._group.suits(self._role, request.fingerprint, request.max_total_tokens, record)

    def _is_alone(self, entry: Entry, now: float) -> bool:
        """Returns whether no ready instance can serve the request; ends its wait when that has lasted too long."""
        request, ready = entry.request, self._group.ready(self._role)
        if any(self._suits(entry, one) for one in ready):
            entry.alone_since = None
            return False
        is_lost_to_decode = self._role == "prefill" and is_at_decode_only(request, self._group)
        if is_lost_to_decode or self._groups.is_served_elsewhere(request.scenario, request.fingerprint, self._group):
            entry.fail(NoCandidate(f"no {self._role} instance is left that can serve this request"))
            return True
        # A stream that has started waits as long as it may for an instance with its weights, unless they were replaced.
        may_come_back = request.has_started and not ready
        if entry.alone_since is None or may_come_back:
            entry.alone_since = now
        if now - entry.alone_since > self._settings.instance_wait_s:
            entry.fail(_nobody(self._role, request))
        return True

    async def _ask(self, entry: Entry, record: InstanceRecord) -> None:
        """Asks one instance. Its errors end this question only."""
        request, client = entry.request, self._instances.client(record.id)
        num_tokens = len(request.token_ids)
        inline = num_tokens <= INLINE_TOKENS or client.accepts_surely(self._role, time.monotonic(), num_tokens)
        self._router.join(request, record.id)
        try:
            ask = question(request, record, self._router.gateway_id, entry.lease, _work(request) if inline else None)
            reply = await client.ask(self._role, ask, self._settings.answer_timeout_s)
            if reply.accepted:
                if not entry.result.done():
                    request.asked.discard(record.id)
                    entry.result.set_result(Accepted(record, entry.num_rejections, None if inline else _work(request)))
                    return
                reply = reply.model_copy(update={"reason": "duplicate"})
                await client.cancel(request.attempt_id)
            if record.id in request.asked:  # and not its source of KV, too
                self._router.leave(request, record.id)
            self._rejected(entry, client, reply)
        except PeerUnavailable as error:
            if isinstance(error, NoResponders):
                self._instances.lose(record.id, "is gone: NATS reports no responders")
            log.warning("%s", error)
            self._metrics.count_pause()
            if record.id in request.asked:
                await self._router.leave_and_cancel(request, record.id)
        except MessageTooLarge as error:
            entry.fail(error)
        except RequestError as error:
            self._cannot_serve(entry, client, error.message)
        except Exception:
            log.exception("internal error while asking %s for request %s", record.id, request.id)
            entry.fail(InternalError("The gateway failed at this request; its log says why."))
        finally:
            client.question_ended(entry.asks.pop(record.id).task)
            self.notify()

    def _rejected(self, entry: Entry, client: InstanceClient, reply: AskReply) -> None:
        entry.num_rejections += 1
        sent_at = entry.asks[client.instance_id].sent_at
        is_busy = reply.reason == "busy" and self._role == "prefill" and reply.capacity.tokens_free == 0
        if is_busy or reply.reason in INSTANCE_IS_FULL:
            if client.freed_at < sent_at:  # else it has had capacity again since
                client.full()
        elif reply.reason == "too_long":
            entry.unsuited.add(client.instance_id)
        elif reply.reason == "invalid":
            self._cannot_serve(entry, client, "it cannot read the question")
        else:
            entry.rejected_at[client.instance_id] = sent_at

    def _cannot_serve(self, entry: Entry, client: InstanceClient, why: str) -> None:
        """Leaves an instance that answers badly out for this request, and avoids it for others."""
        log.error("%s: %s; do gateway and instances run the same version?", client.instance_id, why)
        entry.unsuited.add(client.instance_id)
        now = time.monotonic()
        client.breaker.failed(now, now)


def _work(request: Request) -> Start:
    """Returns the work of a request, which costs as much as the request is long."""
    return Start(request_id=request.attempt_id, token_ids=request.token_ids, sampling=request.sampling)


def _nobody(role: Role, request: Request) -> PDServeError:
    if request.has_started:
        return InstanceFailed("The model version this request started on is no longer served. Send the request again.")
    return NoInstance(f"No {role} instance can serve this request now: try again.", retry_after_s=RETRY_AFTER_S)
