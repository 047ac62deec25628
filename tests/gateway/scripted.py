"""Scripted instances for tests of the gateway: real messages on a real bus, and no engine behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from services.gateway.dispatcher import Dispatcher, Queues
from services.gateway.events import EventRouter
from services.gateway.groups import Group
from services.gateway.instance_watch import Instances
from services.gateway.request import Request, TokenOutput
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import ErrorBody, RequestError
from shared.messages.records import GroupMap, InstanceRecord, Member, Role, Traffic
from shared.messages.serving import (
    Ask,
    AskReply,
    Cancel,
    Capacity,
    Failed,
    KVLease,
    Message,
    Moved,
    OutputToken,
    Ping,
    Pong,
    Prefilled,
    Start,
    StepTokens,
)
from shared.registry.heartbeats import Heartbeat
from shared.sampling import SamplingParams
from shared.scenario_labels import ScenarioLabels
from shared.settings import GatewaySettings
from shared.telemetry.gateway_metrics import GatewayMetrics
from tests.harness import eventually
from tests.registry.test_view import record

AMPLE = Capacity(slots_free=1000, tokens_free=100_000, blocks_free=1000)
ACCEPTED = AskReply(accepted=True, capacity=AMPLE)
NO_SLOT = AskReply(accepted=False, reason="no_slot")
FULL = [NO_SLOT] * 10_000
_numbers = count()


@dataclass
class Work:
    """A question, and the work that came with it or later."""

    role: Role
    ask: Ask
    start: Start | None

    @property
    def request_id(self) -> str:
        return self.ask.request_id

    @property
    def token_ids(self) -> list[int]:
        assert self.start is not None, "the work has not arrived"
        return self.start.token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return self.ask.num_prompt_tokens

    @property
    def max_tokens(self) -> int:
        return self.ask.max_tokens

    @property
    def lease(self) -> KVLease:
        assert self.ask.lease is not None, "the question is about local prefill"
        return self.ask.lease


@dataclass
class Scripted:
    """An instance: `answers` are given to its questions in order (None: no answer at all), then it accepts all."""

    bus: Bus
    record: InstanceRecord
    answers: list[AskReply | None] = field(default_factory=list)
    requests: list[Work] = field(default_factory=list)
    """Everything it was asked, rejected or not."""
    cancelled: list[str] = field(default_factory=list)
    pings: list[Ping] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    """Attempts that it says it does not know."""
    num_cached_tokens: int = 0
    refresh: Callable[[], None] = lambda: None
    unsubscribe: Callable[[], Awaitable[None]] | None = None

    async def subscribe(self) -> None:
        self.unsubscribe = await self.bus.subscribe(subjects.instance(self.record.id, ">"), self.handle)

    async def vanish(self) -> None:
        """Ends as a process does: NATS reports no responders from now on."""
        assert self.unsubscribe is not None
        await self.unsubscribe()

    def change(self, **changes: object) -> None:
        """Changes its record, which the gateway sees at once."""
        self.record = self.record.model_copy(update=changes)
        self.refresh()

    async def handle(self, incoming: Incoming) -> None:
        verb, _ = subjects.verb_and_key(incoming.subject)
        if verb == "cancel":
            self.cancelled += incoming.parse(Cancel).request_ids
        elif verb == "ping":
            ping = incoming.parse(Ping)
            self.pings.append(ping)
            await incoming.respond(Pong(unknown=[one for one in ping.request_ids if one in self.unknown]))
        elif verb == "start":
            start = incoming.parse(Start)
            work = next(
                one for one in reversed(self.requests) if one.request_id == start.request_id and one.start is None
            )
            work.start = start
            await self.serve(work)
        elif verb in ("prefill", "decode"):
            ask = incoming.parse(Ask)
            await self.answer(incoming, Work("prefill" if verb == "prefill" else "decode", ask, ask.start))

    async def answer(self, incoming: Incoming, work: Work) -> None:
        self.requests.append(work)
        reply = self.answers.pop(0) if self.answers else ACCEPTED
        if reply is None:
            return
        await incoming.respond(reply)
        if reply.accepted and work.start is not None:
            await self.serve(work)

    async def all_cancelled(self) -> list[str]:
        """What it has been told to cancel, in all that has been sent so far."""
        marker = f"marker{next(_numbers)}"
        await self.bus.publish(subjects.instance(self.record.id, "cancel"), Cancel(request_ids=[marker]))
        await eventually(lambda: marker in self.cancelled)
        self.cancelled.remove(marker)
        return self.cancelled

    async def serve(self, work: Work) -> None:
        """Does at once what a good instance does."""
        if work.role == "prefill":
            await self.prefilled(work)
        else:
            await self.decode(work)

    async def prefilled(self, work: Work) -> None:
        token = token_of(work, work.token_ids)
        await self.tell(
            "prefilled",
            Prefilled(
                instance_id=self.record.id,
                token=token,
                lease=self.lease(work, len(work.token_ids)) if token.finish_reason is None else None,
                num_cached_tokens=self.num_cached_tokens,
            ),
        )

    async def decode(self, work: Work, up_to: int | None = None) -> list[int]:
        """Sends all tokens to the end, or only those before index `up_to`; gives the request's tokens until then."""
        token_ids = list(work.token_ids)
        last = work.num_prompt_tokens + work.max_tokens
        while len(token_ids) < last and (up_to is None or len(token_ids) - work.num_prompt_tokens < up_to):
            token = token_of(work, token_ids)
            token_ids.append(token.token_id)
            await self.tell("tokens", StepTokens(instance_id=self.record.id, tokens=[token]))
        return token_ids

    async def move(self, work: Work, num_tokens: int, lasts_s: float = 60.0) -> None:
        """Gives the request back with the KV of so many tokens."""
        lease = self.lease(work, num_tokens, lasts_s)
        await self.tell("moved", Moved(instance_id=self.record.id, request_id=work.request_id, lease=lease))

    def lease(self, work: Work, num_tokens: int, lasts_s: float = 60.0) -> KVLease:
        return KVLease(
            lease_id=f"{self.record.id}-{work.request_id}",
            instance_id=self.record.id,
            host="h",
            port=1,
            num_tokens=num_tokens,
            num_bytes=1,
            expires_in_s=lasts_s,
        )

    async def fail(self, work: Work, error: RequestError | None = None, **changes: object) -> None:
        body = error.body if error else ErrorBody(code="instance_failed", message="scripted")
        values = {"instance_id": self.record.id, "request_id": work.request_id, "error": body, **changes}
        await self.tell("failed", Failed.model_validate(values))

    async def tell(self, verb: str, message: Message) -> None:
        await self.bus.publish(subjects.gateway("g", verb), message)


def token_of(work: Work, token_ids: list[int]) -> OutputToken:
    """The model of these tests: each token is the sum of all before it, modulo a prime."""
    index = len(token_ids) - work.num_prompt_tokens
    return OutputToken(
        request_id=work.request_id,
        index=index,
        token_id=sum(token_ids) % 997,
        finish_reason="length" if index + 1 == work.max_tokens else None,
    )


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(sum(token_ids) % 997)
    return token_ids[len(prompt) :]


def member(one: InstanceRecord, **changes: object) -> Member:
    """An instance as a map has it that knows its record."""
    values = {"instance_id": one.id, **one.model_dump(include=set(Member.model_fields))}
    return Member.model_validate(values | changes)


@dataclass
class FleetGroups:
    """Stands in for `Groups`, which reads Redis: the test says which group serves a request."""

    groups: list[Group]
    of: Callable[..., Group]
    heartbeats: Mapping[str, Heartbeat] = field(default_factory=dict)
    finds_scenarios: bool = False
    scenario_labels: ScenarioLabels = field(default_factory=ScenarioLabels)

    def all(self) -> list[Group]:
        return self.groups

    def heartbeat(self, instance_id: str) -> Heartbeat | None:
        return self.heartbeats.get(instance_id)

    def is_served_elsewhere(self, scenario: str | None, fingerprint: str | None, group: Group) -> bool:
        if group.serves(fingerprint):
            return False
        other = self.of(scenario, fingerprint)
        return other is not group and other.serves(fingerprint)


class Fleet:
    """A gateway's core on the bus, and the scripted instances that it knows. Those in `instances` are alive, and the
    map of the one group has all that have been added.
    """

    def __init__(self, bus: Bus, settings: GatewaySettings) -> None:
        self.bus = bus
        self.settings = settings
        self.instances: dict[str, Scripted] = {}
        self.lost: list[str] = []
        self.router = EventRouter(bus, "g")
        self.groups = FleetGroups([], lambda scenario=None, fingerprint=None: self.group)
        self.group = self.make_group("default")
        self.watch = Instances(bus, self.router, self.lost.append, lambda found: self.lost.remove(found))
        self.metrics = GatewayMetrics()
        groups: object = self.groups
        self.dispatcher = Dispatcher(settings, self.router, self.watch, groups, self.metrics)  # type: ignore[arg-type]

    def queues(self, group: Group | None = None) -> Queues:
        return self.dispatcher.queues(group or self.group)

    def make_group(self, name: str) -> Group:
        group = Group(GroupMap(name=name, scenario=name, version=1, term=1))
        self.groups.groups.append(group)
        return group

    def refresh(self) -> None:
        """Lets all groups see the instances that are alive now."""
        alive = {name: one.record for name, one in self.instances.items()}
        for group in self.groups.groups:
            group.update(group.map, alive)

    def remove(self, *names: str) -> None:
        """Instances that are not alive any more; all of them without names."""
        for name in names or list(self.instances):
            del self.instances[name]
        self.refresh()

    async def add(
        self,
        name: str,
        role: Role,
        *answers: AskReply | None,
        kind: type[Scripted] = Scripted,
        group: Group | None = None,
        **changes: object,
    ) -> Scripted:
        one = kind(self.bus, record(name, role=role, **changes), list(answers))  # type: ignore[arg-type]
        await one.subscribe()
        one.refresh = self.refresh
        self.instances[name] = one
        group = group or self.group
        members = (*group.map.members, member(one.record))
        group.update(group.map.model_copy(update={"members": members}), {})
        self.refresh()
        return one

    def set_objective(self, ttft_s: float | None) -> None:
        self.group.map = self.group.map.model_copy(update={"ttft_s": ttft_s})

    def traffic(self, group: Group | None = None) -> Traffic:
        group = group or self.group
        queues = self.queues(group)
        return group.counts.snapshot(queues.prefill.num_waiting, queues.decode.num_waiting)

    def request(self, prompt: list[int], max_tokens: int = 8, timeout_s: float = 30.0, **changes: object) -> Request:
        """A request as an API makes it."""
        now = time.monotonic()
        values: dict[str, object] = {"id": f"r{next(_numbers)}", "deadline": now + timeout_s, "output": TokenOutput()}
        return Request(
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens),
            arrived_at=now,
            **(values | changes),  # type: ignore[arg-type]
        )

    async def generate(
        self, prompt: list[int], max_tokens: int = 8, timeout_s: float = 30.0, **changes: object
    ) -> list[int]:
        """The tokens of a request, to its end."""
        return [token.token_id for token in await self.tokens(self.request(prompt, max_tokens, timeout_s, **changes))]

    async def tokens(self, request: Request, up_to: int | None = None) -> list[OutputToken]:
        """A request's tokens to its end, or so many of them, after which it is cancelled."""
        found: list[OutputToken] = []
        async with self.dispatcher.serving([request]):
            while not (found and found[-1].finish_reason) and (up_to is None or len(found) < up_to):
                found += [token for _, token in await request.output.read()]
        return found


@asynccontextmanager
async def fleet(nats_url: str, *, watching: bool = False, **settings: object) -> AsyncIterator[Fleet]:
    """`watching`: instances with open requests are pinged, as in a gateway."""
    chosen = {"model_name": "m", "answer_timeout_s": 0.3, "instance_wait_s": 0.5, **settings}
    async with connection.connect(nats_url, name="g", timeout_s=5.0) as bus:
        made = Fleet(bus, GatewaySettings(**chosen))  # type: ignore[arg-type]

        async def hear(incoming: Incoming) -> None:
            verb, _ = subjects.verb_and_key(incoming.subject)
            await made.router.on_message(verb, incoming)

        await bus.subscribe(subjects.gateway("g", ">"), hear)
        watch = asyncio.create_task(made.watch.watch()) if watching else None
        try:
            yield made
        finally:
            if watch is not None:
                watch.cancel()
