"""Scripted instances for tests of the gateway: real messages on a real bus, and no engine behind them."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from services.gateway.generator import Generator
from services.gateway.groups import Group
from services.gateway.line import Line
from services.gateway.streams import Streams
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import ErrorBody, RequestError
from shared.messages.generate_api import Priority
from shared.messages.records import GroupMap, InstanceRecord, Member, Role
from shared.messages.serving import (
    AskReply,
    Cancel,
    DecodeRequest,
    Failed,
    KVLease,
    Message,
    Moved,
    OutputToken,
    Prefilled,
    PrefillRequest,
    StepTokens,
)
from shared.sampling import SamplingParams
from shared.settings import GatewaySettings
from tests.harness import eventually
from tests.registry.test_view import record

Request = PrefillRequest | DecodeRequest
_numbers = count()


def next_token(request: Request) -> int:
    """The model of these tests: each token is the sum of all before it, modulo a prime."""
    return sum(request.token_ids) % 997


@dataclass
class Scripted:
    """An instance: `answers` are given to its requests in turn (None: no answer at all), then it accepts all."""

    bus: Bus
    record: InstanceRecord
    answers: list[AskReply | None] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    num_cached_tokens: int = 0

    async def handle(self, incoming: Incoming) -> None:
        verb, _ = subjects.verb_and_key(incoming.subject)
        if verb == "cancel":
            self.cancelled += incoming.parse(Cancel).request_ids
            return
        request = incoming.parse(PrefillRequest if verb == "prefill" else DecodeRequest)
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else AskReply(accepted=True)
        if answer is None:
            return
        await incoming.respond(answer)
        if answer.accepted:
            await self.serve(request)

    async def all_cancelled(self) -> list[str]:
        """What it has been told to cancel, in all that has been sent so far."""
        marker = f"marker{next(_numbers)}"
        await self.bus.publish(subjects.instance(self.record.id, "cancel"), Cancel(request_ids=[marker]))
        await eventually(lambda: marker in self.cancelled)
        self.cancelled.remove(marker)
        return self.cancelled

    async def serve(self, request: Request) -> None:
        """Does at once what a good instance does."""
        if isinstance(request, PrefillRequest):
            await self.prefilled(request)
        else:
            await self.decode(request)

    async def prefilled(self, request: PrefillRequest) -> None:
        token = token_of(request, request.token_ids)
        await self.tell(
            "prefilled",
            Prefilled(
                instance_id=self.record.id,
                token=token,
                lease=self.lease(request, len(request.token_ids)) if token.finish_reason is None else None,
                num_cached_tokens=self.num_cached_tokens,
            ),
        )

    async def decode(self, request: DecodeRequest, up_to: int | None = None) -> list[int]:
        """Sends all tokens to the end, or only those before index `up_to`; gives the request's tokens until then."""
        token_ids = list(request.token_ids)
        last = request.num_prompt_tokens + request.sampling.max_tokens
        while len(token_ids) < last and (up_to is None or len(token_ids) - request.num_prompt_tokens < up_to):
            token = token_of(request, token_ids)
            token_ids.append(token.token_id)
            await self.tell("tokens", StepTokens(instance_id=self.record.id, tokens=[token]))
        return token_ids

    async def move(self, request: DecodeRequest, num_tokens: int, lasts_s: float = 60.0) -> None:
        """Gives the request back with the KV of so many tokens."""
        lease = self.lease(request, num_tokens, lasts_s)
        await self.tell("moved", Moved(instance_id=self.record.id, request_id=request.request_id, lease=lease))

    def lease(self, request: Request, num_tokens: int, lasts_s: float = 60.0) -> KVLease:
        return KVLease(
            lease_id=f"{self.record.id}-{request.request_id}",
            instance_id=self.record.id,
            host="h",
            port=1,
            num_tokens=num_tokens,
            num_bytes=1,
            expires_at=time.time() + lasts_s,
        )

    async def fail(self, request: Request, error: RequestError | None = None) -> None:
        body = error.body if error else ErrorBody(code="instance_failed", message="scripted")
        await self.tell("failed", Failed(instance_id=self.record.id, request_id=request.request_id, error=body))

    async def tell(self, verb: str, message: Message) -> None:
        await self.bus.publish(subjects.gateway("g", verb), message)


def token_of(request: Request, token_ids: list[int]) -> OutputToken:
    index = len(token_ids) - request.num_prompt_tokens
    return OutputToken(
        request_id=request.request_id,
        index=index,
        token_id=sum(token_ids) % 997,
        finish_reason="length" if index + 1 == request.sampling.max_tokens else None,
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


class Fleet:
    """A gateway's core on the bus, and the scripted instances that it knows: those alive are `instances`, and the map
    of the one group has all that have been added.
    """

    def __init__(self, bus: Bus, settings: GatewaySettings) -> None:
        self.bus = bus
        self.settings = settings
        self.instances: dict[str, Scripted] = {}
        self.streams = Streams(bus, "g")
        self.group = self.make_group("default")
        self.group_of: Callable[[str | None, str | None], Group] = lambda scenario, fingerprint: self.group
        """Of scenario and fingerprint."""
        self.generator = Generator(settings, bus, self.streams, lambda *wanted: self.group_of(*wanted))

    @property
    def prefill_line(self) -> Line:
        return self.group.prefill_line

    def make_group(self, name: str) -> Group:
        group_map = GroupMap(name=name, scenario=name, version=1, term=1)
        return Group(group_map, self.bus, self.alive, self.streams.num_open, self.settings)

    def alive(self) -> dict[str, InstanceRecord]:
        return {name: one.record for name, one in self.instances.items()}

    async def add(
        self,
        name: str,
        role: Role,
        *answers: AskReply | None,
        kind: type[Scripted] = Scripted,
        group: Group | None = None,
        **changes: object,
    ) -> Scripted:
        one = kind(self.bus, record(name, role=role, **changes), list(answers))
        await self.bus.subscribe(subjects.instance(name, ">"), one.handle)
        self.instances[name] = one
        group = group or self.group
        group.map = group.map.model_copy(update={"members": (*group.map.members, member(one.record))})
        return one

    def set_objective(self, ttft_s: float | None) -> None:
        self.group.map = self.group.map.model_copy(update={"ttft_s": ttft_s})

    async def generate(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        timeout_s: float = 30.0,
        *,
        scenario: str | None = None,
        priority: Priority = "interactive",
    ) -> list[int]:
        tokens = self.generator.generate(
            prompt,
            SamplingParams(max_tokens=max_tokens),
            request_id=f"r{next(_numbers)}",
            deadline=time.time() + timeout_s,
            scenario=scenario,
            priority=priority,
        )
        return [token.token_id async for token in tokens]


@asynccontextmanager
async def fleet(nats_url: str, **settings: object) -> AsyncIterator[Fleet]:
    chosen = {"model_name": "m", "answer_timeout_s": 0.3, "instance_wait_s": 0.5, **settings}
    async with connection.connect(nats_url, name="g", timeout_s=5.0) as bus:
        made = Fleet(bus, GatewaySettings(**chosen))  # type: ignore[arg-type]

        async def hear(incoming: Incoming) -> None:
            verb, _ = subjects.verb_and_key(incoming.subject)
            await made.streams.on_message(verb, incoming)

        await bus.subscribe(subjects.gateway("g", ">"), hear)
        yield made
