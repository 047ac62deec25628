"""Instances without engines for tests of workflows: they answer orders and canaries on a real bus, and write records
to a real registry.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from services.controller.canary import Canary
from services.controller.cluster import Cluster
from services.controller.decisions import Decision, Decisions
from services.controller.maps import Maps
from services.controller.policy.membership import Place
from services.controller.workflows import Workflows
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import ErrorBody
from shared.groups import GroupSpec
from shared.messages.control import Assign, Assigned
from shared.messages.records import InstanceRecord, Member, Role
from shared.messages.serving import (
    Ask,
    AskReply,
    Cancel,
    Failed,
    KVLease,
    Message,
    OutputToken,
    Prefilled,
    StepTokens,
)
from shared.registry import registry
from shared.registry.registry import Lead, Registry
from shared.settings import ControllerSettings
from tests.controller.world import serving, spare
from tests.harness import eventually

READ_EVERY_S = 0.01
LATE_S = 0.6


@dataclass
class Fake:
    """An instance that does what it is told, unless a test wants otherwise.

    Attributes:
        answers: given to its orders in turn (None: no answer at all); then it accepts all.
        fails_as: it fails canary requests in this role.
        refuses_as: it refuses them.
        is_silent: it takes them, and says nothing more.
        dies_serving: its heart stops with the first.
        dies_changing: its heart stops once it has taken an order.
        num_full: so often it has no room for a canary.
        stays_changing: it never gets to the end of one.
        problems: why it cannot follow its orders, in turn (None: it can); then it can.
        before_order: called with each order before it is answered.
    """

    bus: Bus
    records: Registry
    record: InstanceRecord
    answers: list[BaseModel | None] = field(default_factory=list)
    fails_as: Role | None = None
    refuses_as: Role | None = None
    num_full: int = 0
    is_silent: bool = False
    dies_serving: bool = False
    dies_changing: bool = False
    stays_changing: bool = False
    problems: list[str | None] = field(default_factory=list)
    before_order: Callable[[Assign], None] = lambda order: None
    first_token: int = 7
    is_alive: bool = True
    orders: list[Assign] = field(default_factory=list)
    canaries: list[Ask] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def beat(self) -> None:
        if self.is_alive:
            self.record = self.record.model_copy(update={"heartbeat": self.record.heartbeat + 1})
            await self.records.write_instance(self.record)

    async def handle(self, incoming: Incoming) -> None:
        verb, _ = subjects.verb_and_key(incoming.subject)
        if not self.is_alive:
            return
        if verb == "assign":
            await self._follow(incoming, incoming.parse(Assign))
        elif verb == "cancel":
            self.cancelled += incoming.parse(Cancel).request_ids
        else:
            await self._serve(incoming, incoming.parse(Ask), "prefill" if verb == "prefill" else "decode")

    async def _follow(self, incoming: Incoming, order: Assign) -> None:
        self.orders.append(order)
        self.before_order(order)
        answer = self.answers.pop(0) if self.answers else Assigned(accepted=True)
        if answer is not None:
            await incoming.respond(answer)
        if not isinstance(answer, Assigned) or not answer.accepted:
            return
        self._become(role=None, group=None, state="changing", epoch=order.epoch, term=order.term, problem=None)
        if self.dies_changing:
            self.is_alive = False
        if not self.stays_changing and self.is_alive:
            self.arrive()

    def arrive(self) -> None:
        """Becomes what its last order says, as far as it can."""
        order = self.orders[-1]
        problem = self.problems.pop(0) if self.problems else None
        if problem is not None or order.role is None:
            self._become(state="spare", problem=problem)
            return
        model = order.model or self.record.model_path
        self._become(state="ready", role=order.role, group=order.group, model_path=model, fingerprint=model or "f")

    def _become(self, **changes: object) -> None:
        """It shows with the next heartbeat."""
        self.record = self.record.model_copy(update=changes)

    async def _serve(self, incoming: Incoming, request: Ask, role: Role) -> None:
        self.canaries.append(request)
        if self.dies_serving:
            self.is_alive = False
            return
        is_right = (request.epoch, role) == (self.record.epoch, self.record.role) and self.record.state == "ready"
        if not is_right or role == self.refuses_as:
            await incoming.respond(AskReply(accepted=False, reason="no_slot" if is_right else "wrong_epoch"))
            return
        if self.num_full > 0:
            self.num_full -= 1
            await incoming.respond(AskReply(accepted=False, reason="no_blocks"))
            return
        await incoming.respond(AskReply(accepted=True))
        if role == self.fails_as:
            error = ErrorBody(code="instance_failed", message="as the test wants it")
            await self._tell(
                request, "failed", Failed(instance_id=self.record.id, request_id=request.request_id, error=error)
            )
        elif role == "prefill" and not self.is_silent:
            await self._prefill(request)
        elif not self.is_silent:
            assert request.start is not None
            for index in range(1, request.max_tokens):
                token = OutputToken(
                    request_id=request.request_id,
                    index=index,
                    token_id=request.start.token_ids[-1] + index,
                    finish_reason="length" if index + 1 == request.max_tokens else None,
                )
                await self._tell(request, "tokens", StepTokens(instance_id=self.record.id, tokens=[token]))

    async def _prefill(self, request: Ask) -> None:
        is_over = request.max_tokens == 1
        lease = KVLease(
            lease_id="lease",
            instance_id=self.record.id,
            host="h",
            port=1,
            num_tokens=request.num_tokens,
            num_bytes=1,
            expires_in_s=60.0,
        )
        token = OutputToken(
            request_id=request.request_id,
            index=0,
            token_id=self.first_token,
            finish_reason="length" if is_over else None,
        )
        prefilled = Prefilled(instance_id=self.record.id, token=token, lease=None if is_over else lease)
        await self._tell(request, "prefilled", prefilled)

    async def _tell(self, request: Ask, verb: str, message: Message) -> None:
        await self.bus.publish(subjects.gateway(request.gateway_id, verb), message)


@dataclass
class Fleet:
    """A leading controller's hands, and the instances that they hold."""

    bus: Bus
    records: Registry
    cluster: Cluster
    maps: Maps
    workflows: Workflows
    lead: Lead | None = None
    decisions: Decisions = field(default_factory=Decisions)
    instances: dict[str, Fake] = field(default_factory=dict)

    async def add(self, record: InstanceRecord, **wishes: Any) -> Fake:
        """One more instance; the controller knows it when this returns."""
        one = Fake(self.bus, self.records, record, **wishes)
        await self.bus.subscribe(subjects.instance(record.id, ">"), one.handle)
        self.instances[record.id] = one
        await eventually(lambda: record.id in self.cluster.alive)
        return one

    async def add_spare(self, name: str, **wishes: Any) -> Fake:
        return await self.add(spare(name), **wishes)

    async def add_member(self, name: str, role: Role, *, slots_used: int = 0, **wishes: Any) -> Fake:
        """One of the group chat, announced already."""
        record = serving(name, role, slots_used=slots_used, kv_host=f"kv-{name}")
        one = await self.add(record, **wishes)
        await self.maps.add("chat", record)
        return one

    def begin(
        self, instance_id: str, place: Place, work: Coroutine[None, None, None]
    ) -> tuple[asyncio.Task[None], Decision]:
        decision = self.decisions.take(place.group, f"{instance_id} to {place.role}", "a test wishes it")
        return self.workflows.start(instance_id, place, work, decision), decision

    async def run(self, instance_id: str, place: Place, work: Coroutine[None, None, None]) -> str:
        """A workflow to its end; its outcome."""
        task, decision = self.begin(instance_id, place, work)
        await asyncio.wait([task], timeout=60.0)
        assert task.done(), "the workflow does not end"
        assert instance_id not in self.workflows.coming
        return decision.outcome

    async def assign(self, instance_id: str, place: Place, **wishes: Any) -> str:
        return await self.run(instance_id, place, self.workflows.assign(instance_id, place, **wishes))

    def member(self, instance_id: str, group: str = "chat") -> Member | None:
        return self.cluster.maps[group].member(instance_id)

    async def follow(self) -> None:
        """Hearts beat and the controller reads, for ever and in step: nobody is late for want of a processor."""
        while True:
            for one in list(self.instances.values()):
                await one.beat()
            await self.cluster.read(self.records)
            await asyncio.sleep(READ_EVERY_S)


@asynccontextmanager
async def fleet(nats_url: str, redis_url: str, **settings: object) -> AsyncIterator[Fleet]:
    """A leading controller with the group chat, where nobody is yet."""
    chosen = ControllerSettings.model_validate(settings)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connection.connect(nats_url, name="c", timeout_s=5.0))
        records = await stack.enter_async_context(registry.connect(redis_url, ttl_s=60.0, timeout_s=5.0))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        cluster, canary = Cluster(LATE_S), Canary(bus, "c", chosen.canary_timeout_s)
        maps = Maps(cluster, records, bus, lambda: made.lead)
        made = Fleet(bus, records, cluster, maps, Workflows(chosen, cluster, maps, canary, bus, tasks))
        made.lead = await records.lead("c", 600.0)
        await bus.subscribe(subjects.gateway("c", ">"), canary.on_message)
        await maps.declare(GroupSpec(name="chat"))
        following = tasks.create_task(made.follow())
        try:
            yield made
        finally:
            made.workflows.abandon()
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
