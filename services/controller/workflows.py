"""What is done with one instance, step by step: order, wait until it has followed, canary, map. One at a time each."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field

from services.controller.canary import Canary, CanaryFailed
from services.controller.cluster import Cluster
from services.controller.decisions import Decision
from services.controller.maps import Maps
from services.controller.policy.membership import Place, place_of
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import PDServeError, PeerUnavailable, RequestError
from shared.messages.control import Assign, Assigned
from shared.messages.records import InstanceRecord, Role
from shared.settings import ControllerSettings

ANSWER_TIMEOUT_S = 2.0
REST_S = 5.0
REST_AT_MOST_S = 300.0
"""How long an instance whose workflow has failed is left alone."""

log = logging.getLogger(__name__)


class WorkflowFailed(PDServeError):
    """The instance is not what it was to be; the message says why."""


@dataclass(slots=True)
class Workflows:
    """All that are under way: at most one for each instance."""

    settings: ControllerSettings
    cluster: Cluster
    maps: Maps
    canary: Canary
    bus: Bus
    tasks: asyncio.TaskGroup
    coming: dict[str, Place | None] = field(default_factory=dict)
    """Where the instances that are on their way go, by id; None is to be a spare."""
    kept_out: set[str] = field(default_factory=set)
    """Spares whose canary has failed."""
    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)
    """How often in a row workflows of an instance have failed, and until when (monotonic) it is left alone."""
    _running: set[asyncio.Task[None]] = field(default_factory=set)
    _admitting: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """By group: of two that join together, the second has its canary with the first."""

    def start(
        self, instance_id: str, place: Place | None, work: Coroutine[None, None, None], decision: Decision
    ) -> asyncio.Task[None]:
        """Runs a workflow to its end, whatever that is, and writes it under its decision."""
        if instance_id in self.coming:
            work.close()
            decision.end(f"failed: {instance_id} is on its way elsewhere already")
            return self.tasks.create_task(asyncio.sleep(0))
        self.coming[instance_id] = place

        async def run() -> None:
            try:
                await work
                decision.end("done")
            except PDServeError as error:
                self._fail(instance_id, decision, error, str(error))
            except asyncio.CancelledError:
                decision.end("failed: this controller ends; see `pdserve status`, and ask again")
                raise
            except Exception as error:
                log.exception("a workflow met a fault of this program")
                self._fail(instance_id, decision, error, repr(error))
            else:
                self._failures.pop(instance_id, None)
            finally:
                del self.coming[instance_id]

        task = self.tasks.create_task(run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _fail(self, instance_id: str, decision: Decision, error: Exception, why: str) -> None:
        """What failed is left alone for a while, longer and longer if it fails again."""
        number = self._failures.get(instance_id, (0, 0.0))[0] + 1
        for_s = min(REST_S * 2 ** (number - 1), REST_AT_MOST_S)
        self._failures[instance_id] = (number, time.monotonic() + for_s)
        decision.error = error
        decision.end(f"failed: {why}")

    def resting(self) -> set[str]:
        """Instances whose last workflow has failed a short while ago."""
        now = time.monotonic()
        return {instance_id for instance_id, (_, until) in self._failures.items() if until > now}

    def abandon(self) -> None:
        """Ends all: whoever leads next goes on from what records say."""
        for task in self._running:
            task.cancel()

    async def admit(self, instance_id: str) -> None:
        """Canary, and then the map.

        Raises:
            CanaryFailed: it is not announced.
        """
        record = self._record(instance_id)
        assert record.group is not None, "who plays a role does so in a group"
        async with self._admitting[record.group]:
            await self._canary(record)
            await self.maps.add(record.group, self._record(instance_id))
        self.kept_out.discard(instance_id)

    async def assign(
        self, instance_id: str, place: Place, *, model: str | None = None, patience_s: float | None = None
    ) -> None:
        """Another place, with the group's model if it has one, or the one that is given. If that fails it gets back
        what it had.

        Raises:
            WorkflowFailed, CanaryFailed: it failed; the message says what became of the instance.
        """
        before = self._record(instance_id)
        was = place_of(before)
        group = self.cluster.maps.get(place.group)
        model = model or (group.model_path if group else None)
        try:
            await self._move_to(instance_id, place, model, patience_s)
        except (WorkflowFailed, CanaryFailed) as error:
            if was is None:
                self.kept_out.add(instance_id)
                raise
            await self._roll_back(instance_id, was, before.model_path if model else None, error)

    async def release(self, instance_id: str, *, drained: bool = False, patience_s: float | None = None) -> None:
        """Makes a spare of it; a `drained` one stays so until an operator flips it.

        Raises:
            WorkflowFailed: it does not follow.
        """
        await self.maps.remove([instance_id])
        await self._order(instance_id, None, None, patience_s, drained=drained)

    async def _move_to(
        self, instance_id: str, place: Place, model: str | None = None, patience_s: float | None = None
    ) -> None:
        await self.maps.remove([instance_id])
        await self._order(instance_id, place, model, patience_s)
        await self.admit(instance_id)

    async def _roll_back(self, instance_id: str, was: Place, model: str | None, why: PDServeError) -> None:
        log.warning("%s goes back to %s of %s: %s", instance_id, was.role, was.group, why)
        try:
            await self._move_to(instance_id, was, model)
        except (WorkflowFailed, CanaryFailed) as error:
            self.kept_out.add(instance_id)
            raise WorkflowFailed(f"{why}; and it could not be rolled back: {error}") from error
        raise WorkflowFailed(f"{why}; it is {was.role} of {was.group} again")

    async def _order(
        self,
        instance_id: str,
        place: Place | None,
        model: str | None,
        patience_s: float | None,
        *,
        drained: bool = False,
    ) -> None:
        """Gives the order, and waits until the record says that it was followed."""
        record = self._record(instance_id)
        order = Assign(
            term=self.maps.term(),
            epoch=record.epoch + 1,
            role=place.role if place else None,
            group=place.group if place else None,
            model=model if model != record.model_path else None,
            peers=self._peers(place),
            drained=drained,
            patience_s=patience_s,
        )
        try:
            answer = await self.bus.request(
                subjects.instance(instance_id, "assign"), order, Assigned, timeout_s=ANSWER_TIMEOUT_S
            )
        except (PeerUnavailable, RequestError) as error:
            raise WorkflowFailed(f"{instance_id} does not answer: {error}") from error
        if not answer.accepted:
            raise WorkflowFailed(f"{instance_id} does not take the order: {answer.reason}")
        settings = self.settings
        timeout_s = settings.order_timeout_s + (patience_s or 0.0) + (settings.load_timeout_s if model else 0.0)
        if not await self.cluster.until(lambda: self._has_followed(instance_id, order.epoch), timeout_s):
            raise WorkflowFailed(f"{instance_id} has not followed the order within {timeout_s:g} s")
        after = self._record(instance_id)
        if after.problem is not None:
            raise WorkflowFailed(after.problem)

    def _has_followed(self, instance_id: str, epoch: int) -> bool:
        """Whether it is done with the order, or gone."""
        record = self.cluster.alive.get(instance_id)
        return record is None or (record.epoch >= epoch and record.state in ("ready", "spare", "drained"))

    def _record(self, instance_id: str) -> InstanceRecord:
        record = self.cluster.alive.get(instance_id)
        if record is None:
            raise WorkflowFailed(f"{instance_id} is gone")
        return record

    def _peers(self, place: Place | None) -> list[tuple[str, int]]:
        """Whose KV it will fetch."""
        if place is None or place.role != "decode" or place.group not in self.cluster.maps:
            return []
        return [(one.kv_host, one.kv_port) for one in self.cluster.maps[place.group].of("prefill")]

    async def _canary(self, record: InstanceRecord) -> None:
        """A pair with each of up to two peers; whoever has none yet is tried with the first that comes."""
        if record.role == "decode":
            pairs = [(peer, record) for peer in self._partners(record, "prefill")]
        else:
            pairs = [(record, peer) for peer in self._partners(record, "decode")]
        error: CanaryFailed | None = None
        for prefill, decode in pairs[:2]:
            try:
                await self.canary.through(prefill, decode)
                return
            except CanaryFailed as failed:
                error = failed
        if error is not None:
            raise error
        if record.role == "prefill":
            await self.canary.through(record, None)

    def _partners(self, record: InstanceRecord, role: Role) -> list[InstanceRecord]:
        """Members of the other role with the same weights, the least busy first."""
        group = self.cluster.maps.get(record.group or "")
        alive = self.cluster.alive
        found = [alive[one.instance_id] for one in (group.of(role) if group else []) if one.instance_id in alive]
        able = [one for one in found if one.state == "ready" and one.fingerprint == record.fingerprint]
        return sorted(able, key=lambda one: one.slots_used)
