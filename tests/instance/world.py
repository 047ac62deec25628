"""A prefill and a decode instance without bus, sockets and threads: real roles, engines and pools in one event loop.

What is between them is simulated, one deterministic step at a time. The gateway of this world checks every token as it
comes.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from opentelemetry.context import Context

from services.decode.role import DecodeRole
from services.prefill.role import PrefillRole
from shared.bus.messages import Cancel, DecodeRequest, KVLease, OutputToken, Prefilled, PrefillRequest
from shared.engine.engine import Engine
from shared.engine.pool import KVPool
from shared.engine.prefix_cache import PrefixCache
from shared.engine.sequence import Sequence as EngineSequence
from shared.engine.staging import staging_of
from shared.errors import RequestError
from shared.instance.role import InstanceParts, Role
from shared.kv import wire
from shared.kv.holder import Lease
from shared.sampling import SamplingParams
from shared.settings import InstanceSettings
from tests.engine.models import Served

GATEWAY = "g"
FOREVER = 1e12


@dataclass(eq=False)
class Request:
    """A request of the simulated gateway, and how far it has come."""

    name: str
    prompt: list[int]
    expected: list[int]
    arrived_at: float
    tokens: list[int] = field(default_factory=list)
    attempt: int = 0
    where: str = "waits for prefill"
    lease: KVLease | None = None
    cached: list[int] = field(default_factory=list)
    """How many tokens were cached, for each prefill."""

    @property
    def request_id(self) -> str:
        return f"{self.name}.{self.attempt}"

    @property
    def is_over(self) -> bool:
        return self.where in ("done", "cancelled")

    def retake(self) -> None:
        self.attempt += 1
        self.lease = None
        self.where = "waits for prefill"


class Message:
    """An incoming message that holds what it says as an object."""

    reply_to = ""
    deadline = FOREVER
    trace_context = Context()

    def __init__(self, content: object) -> None:
        self.content = content

    def parse(self, kind: type) -> Any:
        assert isinstance(self.content, kind)
        return self.content


class Runner:
    """An engine that steps when it is told to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def add(self, sequence: EngineSequence) -> None:
        self.engine.add(sequence)

    async def remove(self, request_ids: Iterable[str]) -> None:
        await asyncio.sleep(0)
        for request_id in request_ids:
            self.engine.remove(request_id)


class Holder:
    """Leases, without a server."""

    host, port = "h", 1

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}

    def hold(self, lease: Lease) -> None:
        self.leases[lease.lease_id] = lease

    def release(self, lease_id: str, *, fetched: bool = False) -> None:
        lease = self.leases.pop(lease_id, None)
        if lease is not None:
            lease.let_go(fetched)


class Fetcher:
    """Copies KV from the holder when it is told to. Until then the destination holds what nobody may read."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.waiting: list[asyncio.Event] = []
        self.num_bytes = 0

    async def fetch(
        self, lease: KVLease, views: Sequence[memoryview], timeout_s: float, *, skip_blocks: int = 0
    ) -> None:
        for view in views:
            view[:] = b"\xff" * len(view)  # NaN
        going = asyncio.Event()
        self.waiting.append(going)
        try:
            await going.wait()
        finally:
            self.waiting.remove(going)
        source = self.holder.leases.get(lease.lease_id)
        if source is None:
            raise wire.TransferFailed("no such lease")
        parcel = source.export(skip_blocks)
        await parcel.settle()
        data = b"".join(parcel.views)
        assert len(data) == sum(map(len, views))
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]
            self.num_bytes += len(view)
        self.holder.release(lease.lease_id, fetched=True)

    def close(self) -> None:
        pass


class World:
    """Both instances, and the gateway: it is the outbox of both."""

    instance_id = "i"

    def __init__(
        self, served: Served, tasks: asyncio.TaskGroup, *, prefill_blocks: int, decode_blocks: int, **settings: object
    ) -> None:
        self.served = served
        self.settings = InstanceSettings.model_validate(
            {"decode_reserve_tokens": 8, "prefill_slots": 3, "decode_slots": 6, **settings}
        )
        self.requests: list[Request] = []
        self.preempted: list[str] = []
        self.holder = Holder()
        self.prefill_engine, self.prefill = self._play(PrefillRole, prefill_blocks, tasks)
        self.decode_engine, self.decode = self._play(DecodeRole, decode_blocks, tasks)
        self.fetcher = Fetcher(self.holder)
        self.decode._fetcher = self.fetcher  # type: ignore[attr-defined]

    def _play(self, kind: type[Role], num_blocks: int, tasks: asyncio.TaskGroup) -> tuple[Engine, Role]:
        layout = self.served.loaded.layout
        pool = KVPool(layout, num_blocks)
        pool.data.fill_(float("nan"))
        engine = Engine(self.served.loaded, pool, max_step_tokens=20)
        parts = SimpleNamespace(
            settings=self.settings,
            instance_id=self.instance_id,
            epoch=lambda: 1,
            draining=lambda: False,
            loaded=self.served.loaded,
            staging=staging_of(pool),
            cache=PrefixCache(num_blocks, layout.block_size, enabled=self.settings.prefix_cache),
            runner=Runner(engine),
            holder=self.holder,
            outbox=self,
            tasks=tasks,
        )
        assert vars(parts).keys() == InstanceParts.__dataclass_fields__.keys()
        return engine, kind(parts)  # type: ignore[arg-type]

    # What instances tell the gateway.

    async def prefilled(self, gateway_id: str, event: Prefilled) -> None:
        await asyncio.sleep(0)
        request = self._open(event.token.request_id)
        if request is not None:
            request.cached.append(event.num_cached_tokens)
            request.lease = event.lease
            request.where = "waits for decode"
            self._take_token(request, event.token)

    async def tokens(self, gateway_id: str, tokens: Iterable[OutputToken]) -> None:
        await asyncio.sleep(0)
        for token in tokens:
            request = self._open(token.request_id)
            if request is not None:
                self._take_token(request, token)

    async def failed(self, gateway_id: str, request_id: str, error: RequestError, *, counts: bool) -> None:
        request = self._open(request_id)
        if request is not None and "the KV pool is full" in error.message:
            assert not counts
            self.preempted.append(request.name)
            held = [one for one in self.requests if one.where == "decodes"]
            assert request.arrived_at == max(one.arrived_at for one in held), "an older one was given up"
        await asyncio.sleep(0)
        if request is not None and request.request_id == request_id and not request.is_over:
            request.retake()

    def _open(self, request_id: str) -> Request | None:
        return next((one for one in self.requests if one.request_id == request_id and not one.is_over), None)

    def _take_token(self, request: Request, token: OutputToken) -> None:
        assert token.index == len(request.tokens), "tokens come one after another"
        assert token.token_id == request.expected[token.index], "a wrong token"
        request.tokens.append(token.token_id)
        assert (token.finish_reason is not None) == (len(request.tokens) == len(request.expected))
        if token.finish_reason is not None:
            request.where = "done"

    # What the gateway does.

    def arrive(self, prompt: list[int], expected: list[int]) -> Request:
        number = len(self.requests)
        request = Request(f"r{number}", prompt, expected, float(number))
        self.requests.append(request)
        return request

    async def cancel(self, request: Request) -> None:
        request.where = "cancelled"
        for role in (self.prefill, self.decode):
            await role.handle("cancel", "", Message(Cancel(request_ids=[request.request_id])))  # type: ignore[arg-type]

    async def ask(self) -> None:
        """Asks for whom nobody works: those that have begun first, as the gateway's lines do."""
        for request in sorted(self.requests, key=lambda one: (not one.tokens, one.arrived_at)):
            if request.where in ("waits for prefill", "waits for decode"):
                await self._ask(request)

    async def _ask(self, request: Request) -> None:
        common = {
            "request_id": request.request_id,
            "gateway_id": GATEWAY,
            "epoch": 1,
            "fingerprint": self.served.loaded.fingerprint,
            "token_ids": request.prompt + request.tokens,
            "num_prompt_tokens": len(request.prompt),
            "sampling": SamplingParams(max_tokens=len(request.expected), temperature=0.0),
            "arrived_at": request.arrived_at,
        }
        if request.where == "waits for prefill":
            answer = await self.prefill.take(Message(PrefillRequest.model_validate(common)))  # type: ignore[arg-type]
            next_place = "is prefilled"
        else:
            asked = DecodeRequest.model_validate({**common, "lease": request.lease})
            answer = await self.decode.take(Message(asked))  # type: ignore[arg-type]
            next_place = "decodes"
        assert answer.reason in (None, "no_slot", "no_blocks", "duplicate"), answer
        if answer.accepted:
            request.where = next_place

    # What time does.

    async def step_prefill(self) -> None:
        if self.prefill_engine.has_work:
            await self.prefill.on_tokens(self.prefill_engine.step())

    async def step_decode(self) -> None:
        if self.decode_engine.has_work:
            assert all(one.num_uncomputed_tokens == 1 for one in self.decode_engine._sequences.values()), "no prefill"
            await self.decode.on_tokens(self.decode_engine.step())

    async def transfer(self) -> None:
        """The oldest transfer that is under way comes to its end."""
        if self.fetcher.waiting:
            self.fetcher.waiting[0].set()
        await self.settle()

    async def expire(self) -> None:
        """The oldest lease ends; if nobody is fetching it, the gateway takes its request again."""
        waiting = [one for one in self.requests if one.where == "waits for decode"]
        if waiting:
            assert waiting[0].lease is not None
            self.holder.release(waiting[0].lease.lease_id)
            waiting[0].retake()

    async def settle(self) -> None:
        """Lets all tasks run that can."""
        for _ in range(12):
            await asyncio.sleep(0)
        self.check()

    def check(self) -> None:
        """The pools' accounting is exact."""
        for role in (self.prefill, self.decode):
            cache = role.parts.cache
            used = {block for held in role._held.values() for block in held.reservation.allocation.blocks}
            assert cache.num_free == cache.num_blocks - len(used)
            assert not used & cache._cached.keys()
            assert sum(cache._references.values()) == sum(
                len(held.reservation.allocation.blocks) for held in role._held.values()
            )

    async def finish(self, max_rounds: int = 3000) -> None:
        """Goes on until every request is over and nothing is held."""
        for _ in range(max_rounds):
            if all(one.is_over for one in self.requests) and not self.prefill.slots_used + self.decode.slots_used:
                return
            await self.ask()
            await self.step_prefill()
            await self.step_decode()
            await self.transfer()
        raise AssertionError(f"they do not come to an end: {[(one.name, one.where) for one in self.requests]}")


@asynccontextmanager
async def world(served: Served, **wishes: Any) -> AsyncIterator[World]:
    """A world in which, at the end, every request has its tokens, and every block is free or cached."""
    async with asyncio.TaskGroup() as tasks:
        made = World(served, tasks, **wishes)
        yield made
        await made.finish()
    for role, engine in ((made.prefill, made.prefill_engine), (made.decode, made.decode_engine)):
        assert role.parts.cache.num_free == role.parts.cache.num_blocks
        assert not role.parts.cache._references
        assert not engine.has_work
    assert not made.holder.leases
    assert all(one.tokens == one.expected for one in made.requests if one.where == "done")
