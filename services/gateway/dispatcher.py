"""The dispatcher takes each request through its phases, from its arrival to its last token, over every failure.

    lease = await prefill(request)            an instance computes the prompt and sends the first token
    while lease is not None:
        lease = await decode(request, lease)  an instance fetches the KV and sends tokens; a lease: it moved the request

An attempt that an instance fails is followed by another that prefills the prompt and all tokens so far, so that the
client sees one unbroken stream. Sampling depends on seed and position alone, so it is also the same stream. Tokens do
not pass through here: the event router pushes them into the request's output.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.gateway.events import EventRouter
from services.gateway.groups import Group, Groups
from services.gateway.instance_watch import Instances
from services.gateway.local_prefill import (
    LOCAL_PREFILL_WAIT_S,
    MAX_LOCAL_PREFILL_TOKENS,
    GroupLatencies,
    is_at_decode_only,
)
from services.gateway.request import DecodeStarted, Finished, Request
from services.gateway.retries import AttemptFailed
from services.gateway.slot_queue import SAMPLE, NoCandidate, SlotQueue, TooLate
from shared.errors import (
    RETRY_AFTER_S,
    DeadlineExceeded,
    InstanceFailed,
    InternalError,
    NoInstance,
    Overloaded,
    RequestError,
)
from shared.messages.records import InstanceRecord, Role
from shared.messages.serving import KVLease, Moved, Prefilled
from shared.prefix_keys import prefix_keys
from shared.settings import GatewaySettings
from shared.telemetry import tracing
from shared.telemetry.gateway_metrics import GatewayMetrics

TTFT_SLACK = 0.05
"""The share of the TTFT objective that is left for the way of the first token."""
COMPLETE_WITHIN_S = 1.0
"""How long a request whose last token has arrived may take to be counted, before its task is cancelled."""

log = logging.getLogger(__name__)


class Queues:
    """What this gateway keeps for one group besides the group itself."""

    def __init__(
        self,
        group: Group,
        groups: Groups,
        instances: Instances,
        router: EventRouter,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
    ) -> None:
        self.prefill = SlotQueue("prefill", group, groups, instances, router, settings, metrics)
        self.decode = SlotQueue("decode", group, groups, instances, router, settings, metrics)
        self.latencies = GroupLatencies()

    @property
    def num_waiting(self) -> int:
        return self.prefill.num_waiting + self.decode.num_waiting

    def of(self, role: Role) -> SlotQueue:
        return self.prefill if role == "prefill" else self.decode


class Dispatcher:
    """Serves requests through the instances of their groups."""

    def __init__(
        self,
        settings: GatewaySettings,
        router: EventRouter,
        instances: Instances,
        groups: Groups,
        metrics: GatewayMetrics,
    ) -> None:
        self._settings = settings
        self._router = router
        self._instances = instances
        self._groups = groups
        self._metrics = metrics
        self._queues: dict[Group, Queues] = {}
        self._tasks: dict[Request, asyncio.Task[None]] = {}

    def queues(self, group: Group) -> Queues:
        """Returns the waiting queues of a group."""
        found = self._queues.get(group)
        if found is None:
            found = Queues(group, self._groups, self._instances, self._router, self._settings, self._metrics)
            self._queues[group] = found
        return found

    def tidy(self) -> None:
        """Drops the queues of groups that are gone."""
        groups = set(self._groups.all())
        self._queues = {group: one for group, one in self._queues.items() if group in groups or one.num_waiting}

    @asynccontextmanager
    async def serving(self, requests: Sequence[Request]) -> AsyncIterator[None]:
        """Serves requests while the block lasts; leaving it cancels those that have not finished."""
        tasks = [asyncio.create_task(self._run(request)) for request in requests]
        self._tasks.update(zip(requests, tasks, strict=True))
        try:
            yield
        finally:
            for request, task in zip(requests, tasks, strict=True):
                del self._tasks[request]
                if not request.is_complete:
                    task.cancel()
            _, running = await asyncio.wait(tasks, timeout=COMPLETE_WITHIN_S)
            for task in running:
                task.cancel()

    def finish(self, request: Request) -> None:
        """Stops generating for a request that has all it needs, as after a stop string."""
        request.is_finished = True
        self._tasks[request].cancel()

    async def _run(self, request: Request) -> None:
        """Serves one request. Its errors end its output and nothing else."""
        try:
            await self._serve(request)
        except RequestError as error:
            request.output.fail(error)
        except Exception:
            log.exception("internal error while handling request %s", request.id)
            request.output.fail(InternalError("The gateway failed at this request; its log says why."))

    async def _serve(self, request: Request) -> None:
        request.prefix_keys = prefix_keys(request.prompt_token_ids)
        labels = self._groups.scenario_labels if request.scenario is None and self._groups.finds_scenarios else None
        if labels is not None:
            num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
            request.scenario = labels.label(request.prefix_keys, num_prompt, max_tokens)
        group = self._groups.of(request.scenario)
        counts = group.counts
        counts.num_arrived += 1
        counts.open += 1
        try:
            await self._attempts(request, group)
            request.is_finished = True
        except (Overloaded, NoInstance):
            counts.num_shed += 1
            raise
        finally:
            counts.open -= 1
            if request.is_finished:
                counts.done(request.arrived_at, len(request.prompt_token_ids), request.num_output_tokens)
                if labels is not None:
                    labels.done(request.scenario, len(request.prompt_token_ids), request.num_output_tokens)

    async def _attempts(self, request: Request, group: Group) -> None:
        """Makes one attempt after another, until one comes to the last token."""
        while True:
            request.start_attempt()
            request.served_by = group.map.scenario
            self._router.open(request)
            try:
                await self._attempt(request, group)
                return
            except AttemptFailed as failure:
                if request.is_complete:
                    return  # the last token arrived while the failure was on its way
                failed = failure
            finally:
                await self._router.close(request)
                self.queues(group).prefill.notify()
                self.queues(group).decode.notify()
            await self._after_failure(request, failed)
            self._metrics.count_retry()
            if not request.has_started:
                request.fingerprint = None
            group = self._groups.of(request.scenario, request.fingerprint)

    async def _after_failure(self, request: Request, failure: AttemptFailed) -> None:
        """Counts a failed attempt, and pauses if failures follow each other without progress."""
        log.warning("attempt %d at request %s failed: %s", request.attempt, request.id, failure)
        self._metrics.count_failed_attempt("counted" if failure.counts else "not_counted")
        if failure.instance_id is not None and failure.counts and not failure.in_failed_step:
            self._instances.failed(failure.instance_id, failure.kv_source_id, request.attempt_started_at)
            self._metrics.count_pause()
        num_failures = request.failures.count(failure, len(request.token_ids))
        if num_failures >= self._settings.max_attempts:
            raise InstanceFailed(f"{num_failures} attempts at this request failed without progress, at last: {failure}")
        await asyncio.sleep(request.failures.pause_s)

    async def _attempt(self, request: Request, group: Group) -> None:
        """Takes a request from prefill to its last token, in one group."""
        try:
            decode = await self._local_prefill(request, group)
            if decode is None:
                lease = await self._prefill(request, group)
            else:
                lease = await self._receive_tokens(request, group, decode, None)
            while lease is not None:
                lease = await self._decode(request, group, lease)
        except NoCandidate as error:
            raise AttemptFailed(f"group {group.name}: {error}", counts=False) from error

    async def _prefill(self, request: Request, group: Group) -> KVLease | None:
        """Waits for a prefill instance and for its first token; returns the lease on the KV unless it is all done."""
        is_first = not request.has_started
        prefill = await self._acquire_prefill(request, group)
        accepted_at = time.monotonic()
        event = await request.next_event(self._settings.token_timeout_s)
        if not isinstance(event, Prefilled):
            raise AttemptFailed(f"expected the end of prefill but received {event}", instance_id=prefill.id)
        queues = self.queues(group)
        queues.prefill.prefilled_at = time.monotonic()
        num_computed = len(request.token_ids) - 1 - event.num_cached_tokens
        queues.latencies.observe_prefill(time.monotonic() - accepted_at, num_computed)
        self._instances.client(prefill.id).breaker.succeeded()
        if is_first:
            self._first_token(request, group, event.num_cached_tokens)
        if event.lease is None:
            self._router.leave(request, prefill.id)
        return event.lease

    async def _acquire_prefill(self, request: Request, group: Group) -> InstanceRecord:
        ttft_s = group.map.ttft_s
        first_token_by = None
        until = request.deadline
        if not request.has_started:
            until = min(until, request.arrived_at + self._settings.ttft_timeout_s)
            if ttft_s is not None and not request.is_batch:
                first_token_by = request.arrived_at + (1 - TTFT_SLACK) * ttft_s
                until = min(request.deadline, first_token_by)
        started_at = time.monotonic()
        try:
            instance = await self._acquire(request, group, "prefill", until, first_token_by=first_token_by)
        except (TimeoutError, TooLate) as error:
            if until == request.deadline:
                raise DeadlineExceeded("no prefill instance had a free slot before the request's deadline") from error
            within_s = ttft_s if first_token_by is not None else until - request.arrived_at
            raise Overloaded(
                f"no prefill instance can give the first token within {within_s:g} s: try again later",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        self.queues(group).latencies.wait_s.observe(time.monotonic() - started_at)
        request.fingerprint = instance.fingerprint
        return instance

    async def _decode(self, request: Request, group: Group, lease: KVLease) -> KVLease | None:
        """Waits for a decode instance and its tokens; returns a lease if it moves the request to another one."""
        until = min(request.deadline, time.monotonic() + lease.expires_in_s)
        request.expect_decode(lease.instance_id)
        acquiring = asyncio.ensure_future(self._acquire(request, group, "decode", until, lease=lease))
        try:
            # The instance that keeps the KV may fail meanwhile: then nobody needs to wait for decode any more.
            decode = await request.unless_failed(acquiring)
        except TimeoutError as error:
            if until == request.deadline:
                raise DeadlineExceeded("no decode instance had a free slot before the request's deadline") from error
            message = "no decode instance had a free slot before the lease on the KV expired"
            raise AttemptFailed(message, counts=False) from error
        request.handed_off_by = lease.instance_id
        self._instances.transfer_started(lease.instance_id, decode.id)
        return await self._receive_tokens(request, group, decode, lease)

    async def _receive_tokens(
        self, request: Request, group: Group, decode: InstanceRecord, lease: KVLease | None
    ) -> KVLease | None:
        """Waits while a decode instance's tokens reach the output, until the last one or until it moves the request."""
        accepted_at = time.monotonic()
        event = await request.next_event(self._settings.token_timeout_s)
        if lease is None:
            self._instances.client(decode.id).breaker.succeeded()
        else:
            await self._fetched(request, group, lease, decode.id)
        if isinstance(event, DecodeStarted):
            started_at = time.monotonic()
            if event.num_tokens_before == 0:
                self._first_token(request, group, event.num_cached_tokens)
            num_before = event.num_tokens_before
            event = await request.next_event(self._settings.token_timeout_s)
            if lease is not None and isinstance(event, Finished):
                num_gaps = request.num_output_tokens - num_before - 1
                gap_s = (time.monotonic() - started_at) / max(1, num_gaps)
                self.queues(group).latencies.observe_decode(started_at - accepted_at, gap_s)
        if isinstance(event, Finished):
            return None
        if not isinstance(event, Moved):
            raise AttemptFailed(f"expected tokens but received {event}", instance_id=decode.id)
        if event.lease.num_tokens != len(request.token_ids) - 1:
            num_tokens = len(request.token_ids)
            raise AttemptFailed(f"a request of {num_tokens} tokens moves with KV for {event.lease.num_tokens}")
        return event.lease

    async def _fetched(self, request: Request, group: Group, lease: KVLease, target_id: str) -> None:
        """Decode has started, so the KV was fetched: its source is done, even if its acknowledgement got lost."""
        self._instances.transferred(lease.instance_id, target_id)
        if lease.instance_id != target_id and lease.instance_id in request.participants:
            await self._router.leave_and_cancel(request, lease.instance_id)
            self.queues(group).prefill.notify()

    async def _local_prefill(self, request: Request, group: Group) -> InstanceRecord | None:
        """Returns the decode instance that computes the prompt itself; None if the request goes to prefill."""
        is_needed = is_at_decode_only(request, group)
        if not is_needed and not self._is_quicker_at_decode(request, group):
            return None
        request.expect_decode()
        until = request.deadline
        if not is_needed:
            until = min(until, time.monotonic() + LOCAL_PREFILL_WAIT_S)
        try:
            instance = await self._acquire(request, group, "decode", until)
        except (TimeoutError, Overloaded) as error:
            if is_needed:
                raise DeadlineExceeded("no decode instance had a free slot before the request's deadline") from error
            return None
        request.fingerprint = instance.fingerprint
        return instance

    def _is_quicker_at_decode(self, request: Request, group: Group) -> bool:
        decoders = group.ready("decode")
        if self._settings.local_prefill == "off" or request.has_started or not decoders:
            return False
        if len(request.prompt_token_ids) > MAX_LOCAL_PREFILL_TOKENS:
            return False
        num_rows = 1 + min(self._router.num_open(one.id) for one in decoders[:SAMPLE])
        return self.queues(group).latencies.is_quicker_at_decode(len(request.prompt_token_ids), num_rows)

    async def _acquire(
        self,
        request: Request,
        group: Group,
        role: Role,
        until: float,
        *,
        lease: KVLease | None = None,
        first_token_by: float | None = None,
    ) -> InstanceRecord:
        """Waits in a queue under a span of its own."""
        # Not made current: what instances do for the request belongs to the request, not to this wait.
        attributes = {tracing.REQUEST_ID: request.attempt_id, tracing.GROUP: group.name}
        span = tracing.tracer.start_span(f"wait_{role}", attributes=attributes)
        try:
            queue = self.queues(group).of(role)
            accepted = await queue.acquire(request, until=until, lease=lease, first_token_by=first_token_by)
            span.set_attribute(tracing.INSTANCE_ID, accepted.instance.id)
            span.set_attribute(tracing.REJECTIONS, accepted.num_rejections)
        finally:
            span.end()
        group.affinity.remember(accepted.instance.id, request.prefix_keys)
        return accepted.instance

    def _first_token(self, request: Request, group: Group, num_cached_tokens: int) -> None:
        group.counts.first_token(request.arrived_at, group.map.ttft_s)
        self._metrics.count_cached(group.map.scenario, len(request.prompt_token_ids), num_cached_tokens)
