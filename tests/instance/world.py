"""Instances without bus, sockets and threads: real roles, assignments, engines and pools in one event loop.

What is between them is simulated, one deterministic step at a time. The gateways of this world check every token as it
comes.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.context import Context
from pydantic import BaseModel

from services.decode.role import DecodeRole
from services.prefill.role import PrefillRole
from shared.engine.engine import Engine
from shared.engine.pool import KVPool
from shared.engine.prefix_cache import PrefixCache
from shared.engine.sequence import NewToken
from shared.engine.sequence import Sequence as EngineSequence
from shared.engine.staging import staging_of
from shared.errors import DeadlineExceeded
from shared.instance.accepting import AcceptingRole
from shared.instance.assignment import Assignment
from shared.instance.body import Body
from shared.instance.outbox import Failure, Outbox
from shared.instance.parts import Held, InstanceParts, Reserved
from shared.instance.role import START_TIMEOUT_S
from shared.kv import wire
from shared.kv.holder import Lease
from shared.messages.control import Assign, Assigned
from shared.messages.records import Role as RoleName
from shared.messages.serving import (
    Ask,
    AskReply,
    Cancel,
    Failed,
    KVLease,
    Moved,
    OutputToken,
    Prefilled,
    SlotFreed,
    Start,
    StepTokens,
)
from shared.prefix_keys import prefix_keys
from shared.sampling import SamplingParams
from shared.settings import InstanceSettings
from tests.engine.models import Served

GATEWAYS = ("g", "h")
GROUP = "one"
FOREVER = 1e12
PATIENT_S = 1000.0
AGE_S = 86_400.0
"""How old the first request is when it asks; later ones are each a second younger."""


@dataclass(eq=False)
class Request:
    """A request of a simulated gateway, and how far it has come."""

    name: str
    gateway_id: str
    prompt: list[int]
    expected: list[int]
    number: int
    is_canary: bool = False
    is_local: bool = False
    """A decode instance is to compute its prompt, too, where one has room."""
    tokens: list[int] = field(default_factory=list)
    attempt: int = 0
    where: str = "waits for prefill"
    lease: KVLease | None = None
    source: "Instance | None" = None
    """Who has the KV, until it is known that another fetched it."""
    holders: "set[Instance]" = field(default_factory=set)
    """Who may hold something of it: they are heard, and told to cancel."""
    cached: list[int] = field(default_factory=list)
    """How many tokens were cached, for each prefill."""
    num_moves: int = 0

    @property
    def request_id(self) -> str:
        return f"{self.name}.{self.attempt}"

    @property
    def is_over(self) -> bool:
        return self.where in ("done", "cancelled")

    @property
    def waits_for(self) -> list[RoleName]:
        """The roles of which an instance may take it, the best first."""
        if self.where == "waits for prefill":
            return ["decode", "prefill"] if self.is_local and not self.tokens else ["prefill"]
        return ["decode"] if self.where == "waits for decode" else []


class Message:
    """An incoming message that holds what it says as an object."""

    reply_to = ""
    trace_context = Context()

    def __init__(self, content: object = None) -> None:
        self.content = content

    def parse(self, kind: type) -> Any:
        assert isinstance(self.content, kind)
        return self.content


class Runner:
    """An engine that steps when it is told to, and once more while it is asked to let go of requests."""

    def __init__(self, engine: Engine, step: Callable[[], None]) -> None:
        self.engine = engine
        self._step = step

    def add(self, sequence: EngineSequence) -> None:
        self.engine.add(sequence)

    async def remove(self, request_ids: Iterable[str]) -> None:
        await asyncio.sleep(0)
        self._step()
        for request_id in request_ids:
            self.engine.remove(request_id)


class Holder:
    """The leases of all instances, without a server."""

    host, port = "h", 1

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}

    def hold(self, lease: Lease) -> None:
        self.leases[lease.lease_id] = lease

    def release(self, lease_id: str, *, fetched: bool = False) -> None:
        lease = self.leases.pop(lease_id, None)
        if lease is None:
            return
        lease.ended = True
        if not lease.on_wire:
            lease.let_go(fetched)


class Fetcher:
    """Copies KV from the holder when it is told to. Until then the destination holds what nobody may read.

    Holders hear only later that it was fetched.
    """

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.waiting: list[asyncio.Future[None]] = []
        self.fetched: list[Lease] = []
        self.num_bytes = 0

    async def fetch(
        self, lease: KVLease, views: Sequence[memoryview], timeout_s: float, *, skip_blocks: int = 0
    ) -> None:
        for view in views:
            view[:] = b"\xff" * len(view)  # NaN
        going: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(going)
        try:
            await going
        finally:
            self.waiting.remove(going)
        source = self.holder.leases.get(lease.lease_id)
        if source is None or source.on_wire:
            raise wire.TransferFailed("no such lease, or another fetches it")
        parcel = source.export(skip_blocks)
        await parcel.settle()
        data = b"".join(parcel.views)
        assert len(data) == sum(map(len, views))
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]
            self.num_bytes += len(view)
        source.on_wire = True
        self.fetched.append(source)

    def go(self, *, breaks: bool = False) -> None:
        """The oldest transfer comes to its end, or breaks."""
        going = next((one for one in self.waiting if not one.done()), None)
        if going is not None and breaks:
            going.set_exception(wire.TransferFailed("it broke"))
        elif going is not None:
            going.set_result(None)

    def acknowledge(self) -> None:
        """Holders hear of what was fetched."""
        fetched, self.fetched = self.fetched, []
        for lease in fetched:
            lease.on_wire = False
            if lease.ended:
                lease.let_go(True)
            else:
                self.holder.release(lease.lease_id, fetched=True)

    def close(self) -> None:
        pass


class Decode(DecodeRole):
    """The real one, which is watched for whom it gives up."""

    def end(self, held: Held, failure: Failure | None = None) -> None:
        if failure is not None and "the KV pool is full" in failure.error.message:
            assert not failure.counts
            ages = [one.reservation.arrived_at for one in self._held.values()]
            assert held.reservation.arrived_at == max(ages), "an older one was given up"
        super().end(held, failure)


KINDS: dict[RoleName, type[AcceptingRole]] = {"prefill": PrefillRole, "decode": Decode}


class Instance:
    """What is a process elsewhere: a pool, an engine, and the roles that it plays one after another."""

    def __init__(self, world: "World", name: str, num_blocks: int, tasks: asyncio.TaskGroup) -> None:
        loaded = world.served.loaded
        pool = KVPool(loaded.layout, num_blocks)
        pool.data.fill_(float("nan"))
        self.name = name
        self.engine = Engine(loaded, pool, world.settings.max_step_tokens)
        self.engine.on_step = lambda plan: self.assignment.notify_gateways()
        self.cache = PrefixCache(num_blocks, loaded.layout.block_size, enabled=world.settings.prefix_cache)
        self.body = Body(
            settings=world.settings,
            model_path="",
            loaded=loaded,
            max_model_len=loaded.max_position_embeddings,
            engine=self.engine,
            pool=pool,
            staging=staging_of(pool),
            cache=self.cache,
            runner=Runner(self.engine, self.step),  # type: ignore[arg-type]
            holder=world.holder,  # type: ignore[arg-type]
        )
        self.assignment = Assignment(world.settings, tasks, self._make_role, self._change_body, self._announce)
        self.outbox = Outbox(world, name)  # type: ignore[arg-type]
        self._world = world
        self._tasks = tasks
        self.telling = tasks.create_task(self.body.tell_tokens(self._tell))

    @property
    def role(self) -> AcceptingRole:
        assert isinstance(self.assignment.role, AcceptingRole)
        return self.assignment.role

    @property
    def reserved(self) -> list[Reserved]:
        """The accepted requests of all its roles that wait for their work."""
        return [reserved for role in self.assignment.roles for reserved in role._reserved.values()]

    @property
    def held(self) -> list[Held]:
        """What all its roles hold."""
        return [held for role in self.assignment.roles for held in role._held.values()]

    def plays(self, role: RoleName) -> bool:
        """Whether gateways may ask it for that."""
        return self.assignment.state == "ready" and self.role.verb == role

    def order(self, role: RoleName | None, patience_s: float | None = 0.0) -> Assigned:
        post = self.assignment
        state = post.state
        assign = Assign(term=1, epoch=post.epoch + 1, role=role, group=GROUP if role else None, patience_s=patience_s)
        answer = post.order(assign)
        assert answer.reason == {"changing": "busy", "draining": "draining"}.get(state)
        return answer

    def step(self) -> None:
        if self.engine.has_work:
            [verb] = {role.verb for role in self.assignment.roles if role.is_computing}
            prompts = {held.request_id for held in self.held if held.computes_prompt}
            for sequence in self.engine._sequences.values() if verb == "decode" else ():
                assert sequence.num_uncomputed_tokens == 1 or sequence.request_id in prompts, "a prefill again"
            self.body._steps.put_nowait(self.engine.step())

    def hear(self, verb: str, content: object = None) -> None:
        for role in self.assignment.roles:
            role.handle(verb, Message(content))  # type: ignore[arg-type]

    def bus_came_back(self) -> None:
        self._tasks.create_task(self.outbox.bus_came_back())
        for role in self.assignment.roles:
            role.bus_came_back()

    def sweep(self, now: float) -> None:
        for role in self.assignment.roles:
            role.sweep(now)

    def check(self) -> None:
        """The pool's accounting is exact."""
        allocations = [one.reservation.allocation.blocks for one in (*self.held, *self.reserved)]
        used = {block for blocks in allocations for block in blocks}
        assert self.cache.num_free == self.cache.num_blocks - len(used)
        assert not used & self.cache._cached.keys()
        assert sum(self.cache._references.values()) == sum(map(len, allocations))
        if self.assignment.role is not None:
            ids = [*self.role._held, *self.role._reserved]
            assert sum(not self._world.is_canary(one) for one in ids) <= self.role.slots_total
            rejections = self.role.rejections
            is_kept_free = rejections.oldest(time.monotonic()) is not None
            is_in_use = bool(self.held or self.reserved)
            is_ending = self.assignment.is_ending  # then no slot is free for anybody
            assert is_in_use or is_kept_free or is_ending or len(rejections) < len(GATEWAYS), "nobody was told"

    async def _make_role(self, name: RoleName) -> AcceptingRole:
        await asyncio.sleep(0)
        body = self.body
        role = KINDS[name](
            InstanceParts(
                settings=body.settings,
                instance_id=self.name,
                epoch=lambda: self.assignment.epoch,
                group=lambda: self.assignment.group or "",
                accepting=lambda: self.assignment.state == "ready",
                loaded=body.loaded,
                max_model_len=body.max_model_len,
                staging=body.staging,
                cache=body.cache,
                runner=body.runner,
                holder=body.holder,
                outbox=self.outbox,
                tasks=self._tasks,
                told=body.told,
                work=self.engine.work.snapshot,
                in_step_s=self.engine.in_step_s,
                latency=body.latency,
                notify_gateways=self.assignment.notify_gateways,
                room_came_free=self.assignment.room_came_free,
            )
        )
        if isinstance(role, DecodeRole):
            role._fetcher = self._world.fetcher  # type: ignore[assignment]
        return role

    async def _change_body(self, model_path: str) -> None:
        raise AssertionError("there is one model in this world")

    async def _announce(self) -> None:
        await asyncio.sleep(0)

    async def _tell(self, tokens: list[NewToken]) -> None:
        for role in self.assignment.roles:
            await role.on_tokens(tokens)


class World:
    """Three instances, of which the last has no role at first, and the gateways: it is the bus of all."""

    def __init__(
        self, served: Served, tasks: asyncio.TaskGroup, *, prefill_blocks: int, decode_blocks: int, **settings: object
    ) -> None:
        self.served = served
        self.settings = InstanceSettings.model_validate(
            {"decode_reserve_tokens": 8, "prefill_slots": 3, "decode_slots": 6, "max_step_tokens": 20, **settings}
        )
        self.requests: list[Request] = []
        self.preempted: list[str] = []
        self.failed: list[Failed] = []
        self.refusals: Counter[tuple[str, str, str]] = Counter()
        """For want of room: by instance, role and gateway."""
        self.hints: list[tuple[str, str, str]] = []
        """Who was told that there is room again, likewise."""
        self.holder = Holder()
        self.fetcher = Fetcher(self.holder)
        self._tasks = tasks
        self.prefill = Instance(self, "prefill", prefill_blocks, tasks)
        self.decode = Instance(self, "decode", decode_blocks, tasks)
        self.third = Instance(self, "third", decode_blocks, tasks)
        self.instances = (self.prefill, self.decode, self.third)
        self.draining: asyncio.Task[None] | None = None
        self.began_at = time.monotonic()
        self.start_apart_every = 0
        """Of so many requests, one gets its work after it was accepted; 0: every question carries the work."""
        self.starts: list[tuple[Instance, Request, Start]] = []
        """The work of accepted requests that is on its way."""
        self._staff()

    # What instances tell gateways.

    async def publish(self, subject: str, event: BaseModel, *, no_responders_to: str = "") -> None:
        await asyncio.sleep(0)
        gateway_id = subject.split(".")[3]
        if isinstance(event, Prefilled):
            self._prefilled(event)
        elif isinstance(event, StepTokens):
            for token in event.tokens:
                self._generated(event.instance_id, token)
        elif isinstance(event, Moved):
            self._moved(event)
        elif isinstance(event, Failed):
            self._failed(event)
        elif isinstance(event, SlotFreed):
            self.hints.append((event.instance_id, event.role, gateway_id))
            assert self.hints.count(self.hints[-1]) <= self.refusals[self.hints[-1]], "told without a refusal"
            assert event.group == GROUP
        else:
            raise AssertionError(event)

    def _prefilled(self, event: Prefilled) -> None:
        request, instance = self._heard(event.instance_id, event.token.request_id)
        if request is None:
            return
        assert request.where == "is prefilled"
        request.cached.append(event.num_cached_tokens)
        request.lease = event.lease
        request.source = instance
        request.where = "waits for decode"
        self._take_token(request, event.token)

    def _generated(self, instance_id: str, token: OutputToken) -> None:
        request, instance = self._heard(instance_id, token.request_id)
        if request is not None:
            self._was_fetched(request, instance)
            if token.num_cached_tokens is not None:
                request.cached.append(token.num_cached_tokens)
            self._take_token(request, token)

    def _moved(self, event: Moved) -> None:
        request, instance = self._heard(event.instance_id, event.request_id)
        if request is None:
            return
        self._was_fetched(request, instance)
        assert request.where == "decodes"
        assert event.lease.num_tokens == len(request.prompt) + len(request.tokens) - 1, "all tokens came before"
        request.lease = event.lease
        request.source = instance
        request.where = "waits for decode"
        request.num_moves += 1

    def _failed(self, event: Failed) -> None:
        self.failed.append(event)
        instance = self._named(event.instance_id)
        request = self._open(event.request_id)
        if request is None or instance not in request.holders:
            return
        if "the KV pool is full" in event.error.message:
            self.preempted.append(request.name)
        if event.error.code == DeadlineExceeded.code:
            self._end(request, "cancelled")
        else:
            self._retake(request)

    def _heard(self, instance_id: str, request_id: str) -> tuple[Request | None, Instance]:
        """Whose event it is; None, and it is cancelled, if the gateway is done with that attempt."""
        instance = self._named(instance_id)
        request = self._open(request_id)
        if request is None or instance not in request.holders:
            instance.hear("cancel", content=Cancel(request_ids=[request_id]))
            return None, instance
        return request, instance

    def _was_fetched(self, request: Request, instance: Instance) -> None:
        """Decode has begun: the cancel is for a slot whose acknowledgement got lost."""
        source, request.source = request.source, None
        if source is not None and source is not instance:
            request.holders.discard(source)
            source.hear("cancel", content=Cancel(request_ids=[request.request_id]))

    def _take_token(self, request: Request, token: OutputToken) -> None:
        assert token.index == len(request.tokens), "tokens come one after another"
        assert token.token_id == request.expected[token.index], "a wrong token"
        request.tokens.append(token.token_id)
        assert (token.finish_reason is not None) == (len(request.tokens) == len(request.expected))
        if token.finish_reason is not None:
            self._end(request, "done")

    def _open(self, request_id: str) -> Request | None:
        return next((one for one in self.requests if one.request_id == request_id and not one.is_over), None)

    def _named(self, instance_id: str) -> Instance:
        return next(one for one in self.instances if one.name == instance_id)

    # What gateways do.

    def arrive(
        self, prompt: list[int], expected: list[int], *, is_canary: bool = False, is_local: bool = False
    ) -> Request:
        number = len(self.requests)
        gateway_id = "controller" if is_canary else GATEWAYS[number % len(GATEWAYS)]
        request = Request(f"r{number}", gateway_id, prompt, expected, number, is_canary, is_local)
        self.requests.append(request)
        return request

    def is_canary(self, request_id: str) -> bool:
        return self.requests[int(request_id[1:].split(".")[0])].is_canary

    def cancel(self, request: Request) -> None:
        self._end(request, "cancelled")

    def gateway_is_gone(self, gateway_id: str) -> None:
        """Instances find out by their pings; what it had is over."""
        for request in self.requests:
            if request.gateway_id == gateway_id and not request.is_over:
                request.where = "cancelled"
        for instance in self.instances:
            instance.assignment.release_gateway(gateway_id)

    async def ask(self) -> None:
        """Asks for whom nobody works: those that have begun first, as gateways' queues do."""
        for request in sorted(self.requests, key=lambda one: (not one.tokens, one.number)):
            for role in request.waits_for:
                if await self._ask(request, role):
                    break

    async def _ask(self, request: Request, role: RoleName) -> bool:
        """Whether an instance has accepted."""
        playing = [one for one in self.instances if one.assignment.role and one.role.verb == role]
        for instance in sorted(playing, key=lambda one: one.role.slots_used):
            request.holders.add(instance)
            ask = self.question(request, role, instance)
            starts_later = self.start_apart_every > 0 and request.number % self.start_apart_every == 0
            message = Message(ask.model_copy(update={"start": None}) if starts_later else ask)
            answer: AskReply = await instance.role.take(message)  # type: ignore[arg-type]
            assert answer.capacity.slots_free >= 0
            if answer.accepted:
                assert instance.plays(role)
                request.where = "is prefilled" if role == "prefill" else "decodes"
                if starts_later:
                    assert ask.start is not None
                    self.starts.append((instance, request, ask.start))
                return True
            if instance is not request.source:
                request.holders.discard(instance)
            if instance.plays(role):
                assert answer.reason in ("no_slot", "no_blocks", "busy"), answer
                assert not (request.is_canary and answer.reason != "no_blocks")
                self.refusals[instance.name, role, request.gateway_id] += not request.is_canary
            else:
                assert answer.reason == "draining"
        return False

    def start(self) -> None:
        """Accepted requests get their work, unless their gateway is done with them."""
        starts, self.starts = self.starts, []
        for instance, request, start in starts:
            if start.request_id == request.request_id and not request.is_over:
                assert instance in request.holders
                if not any(role.start(start) for role in instance.assignment.roles):
                    self._retake(request)

    def question(self, request: Request, role: RoleName, instance: Instance) -> Ask:
        """The question with the work that a gateway would ask an instance."""
        token_ids = request.prompt + request.tokens
        sampling = SamplingParams(max_tokens=len(request.expected), temperature=0.0)
        return Ask(
            request_id=request.request_id,
            gateway_id=request.gateway_id,
            epoch=instance.assignment.epoch,
            fingerprint=self.served.loaded.fingerprint,
            num_tokens=len(token_ids),
            num_prompt_tokens=len(request.prompt),
            max_tokens=len(request.expected),
            age_s=AGE_S - request.number + time.monotonic() - self.began_at,
            expires_in_s=AGE_S,
            prefix_keys=prefix_keys(request.prompt),
            lease=request.lease if role == "decode" else None,
            is_canary=request.is_canary,
            start=Start(request_id=request.request_id, token_ids=token_ids, sampling=sampling),
        )

    def _retake(self, request: Request) -> None:
        self._end(request, "waits for prefill")
        request.attempt += 1

    def _end(self, request: Request, where: str) -> None:
        """Whoever may hold something of this attempt is told to let it go."""
        holders, request.holders = request.holders, set()
        request.where, request.lease, request.source = where, None, None
        for instance in holders:
            instance.hear("cancel", content=Cancel(request_ids=[request.request_id]))

    # What time does.

    def starts_are_lost(self) -> None:
        """No accepted request gets its work in time: they are released, and their gateways ask elsewhere."""
        starts, self.starts = self.starts, []
        for instance, request, start in starts:
            for role in instance.assignment.roles:
                for reserved in role._reserved.values():
                    reserved.accepted_at -= 2 * START_TIMEOUT_S
                role.sweep(time.monotonic())
            if start.request_id == request.request_id and not request.is_over:
                assert not any(role.start(start) for role in instance.assignment.roles)
                self._retake(request)

    async def step_prefill(self) -> None:
        self.prefill.step()

    async def step_decode(self) -> None:
        self.decode.step()

    async def step_third(self) -> None:
        self.third.step()

    async def transfer(self) -> None:
        """Holders hear of the transfers before, and the oldest that is under way comes to its end."""
        self.fetcher.acknowledge()
        self.fetcher.go()
        await self.settle()

    async def a_transfer_breaks(self) -> None:
        self.fetcher.go(breaks=True)
        await self.settle()

    async def expire(self) -> None:
        """Instances remember no request that found no blocks any more, and the oldest lease ends.

        If nobody is fetching it, the gateway takes its request again.
        """
        for instance in self.instances:
            if instance.assignment.role is not None:
                instance.role.rejections.expire(FOREVER)
        if self.holder.leases:
            lease_id = next(iter(self.holder.leases))
            self.holder.release(lease_id)
            for request in self.requests:
                if request.where == "waits for decode" and request.lease and request.lease.lease_id == lease_id:
                    self._retake(request)

    def drain_third(self) -> None:
        """The process of the third instance ends."""
        if self.draining is None:
            self.draining = self._tasks.create_task(self._drain_third())

    async def _drain_third(self) -> None:
        await self.third.assignment.drain()
        assert not self.third.held or self.settings.stall_timeout_s < PATIENT_S

    async def settle(self) -> None:
        """Lets all tasks run until none can."""
        await asyncio.sleep(0)
        while self.is_busy:  # noqa: ASYNC110 - what is waited for is that nothing happens any more
            await asyncio.sleep(0)
        self.check()

    @property
    def is_busy(self) -> bool:
        """Whether a task can run."""
        return bool(asyncio.get_running_loop()._ready)  # type: ignore[attr-defined]

    def check(self) -> None:
        for instance in self.instances:
            instance.check()
        computing = Counter(
            held.request_id
            for instance in self.instances
            for held in instance.held
            if held.lease_id is None and not held.ending
        )
        assert all(count == 1 for count in computing.values()), "two work for one request"

    @property
    def is_over(self) -> bool:
        """Whether every request is over, nothing is held, and nobody is on the way to another role."""
        return (
            all(one.is_over for one in self.requests)
            and not any(one.held or one.reserved or one.assignment.left for one in self.instances)
            and not any(one.assignment.state == "changing" for one in self.instances)
            and (self.draining is None or self.draining.done())
        )

    async def finish(self, max_rounds: int = 3000) -> None:
        """Goes on until all is over; where nothing goes on, leases end."""
        before: list[object] = []
        for _ in range(max_rounds):
            if self.is_over:
                return
            self._staff()
            await self.ask()
            self.start()
            for instance in self.instances:
                instance.step()
            await self.transfer()
            now = [(one.where, one.attempt, len(one.tokens)) for one in self.requests]
            if now == before and not any(one.engine.has_work for one in self.instances):
                await self.expire()
                await self.settle()
            before = list(now)
        raise AssertionError(f"they do not come to an end: {[(one.name, one.where) for one in self.requests]}")

    def _staff(self) -> None:
        """Sees to it that there is somebody for each role."""
        for instance, role in ((self.prefill, "prefill"), (self.decode, "decode")):
            if instance.assignment.state != "changing" and not instance.plays(role):  # type: ignore[arg-type]
                instance.order(role, PATIENT_S)  # type: ignore[arg-type]


@asynccontextmanager
async def world(served: Served, **wishes: Any) -> AsyncIterator[World]:
    """A world in which, at the end, every request has its tokens, and every block is free or cached."""
    async with asyncio.TaskGroup() as tasks:
        made = World(served, tasks, **wishes)
        await made.settle()
        yield made
        await made.finish()
        for instance in made.instances:
            instance.telling.cancel()
    for instance in made.instances:
        assert instance.cache.num_free == instance.cache.num_blocks
        assert not instance.cache._references
        assert not instance.engine.has_work
        assert not instance.assignment.left
    assert not made.holder.leases
    assert not made.fetcher.waiting
    assert all(one.tokens == one.expected for one in made.requests if one.where == "done")
