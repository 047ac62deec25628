"""A whole gateway in this process, over scripted instances, with a real bus and registry."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from services.gateway import groups as groups_module
from services.gateway import line as line_module
from services.gateway.service import Gateway
from shared.bus import connection, subjects
from shared.bus.connection import Bus
from shared.messages.records import GroupMap, Member, Role, Traffic
from shared.messages.serving import AskReply, PrefillRequest, SlotFreed
from shared.process import Lifetime
from shared.registry import registry
from shared.registry.registry import Lead, Registry
from shared.settings import GatewaySettings
from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.conftest import DEMO
from tests.gateway.scripted import Scripted, member
from tests.harness import eventually, free_port
from tests.registry.test_view import record

NO_SLOT = AskReply(accepted=False, reason="no_slot")
PROMPT = [10] * 20


@dataclass
class Served:
    """A gateway that serves, and the other side of its bus and registry."""

    http: httpx.AsyncClient
    bus: Bus
    registry: Registry
    lead: Lead
    maps: dict[str, GroupMap] = field(default_factory=dict)

    async def add(self, group: str, name: str, role: Role, *answers: AskReply) -> Scripted:
        """An instance that is in its group's map."""
        one = Scripted(self.bus, record(name, role=role, group=group, max_model_len=1000), list(answers))
        await self.bus.subscribe(subjects.instance(name, ">"), one.handle)
        await self.registry.write_instance(one.record)
        await self.change_map(group, member(one.record))
        return one

    async def change_map(self, group: str, *more: Member, **changes: object) -> None:
        """Writes a group's map with more members, and announces it."""
        before = self.maps.get(group) or GroupMap(name=group, scenario=group, version=0, term=1)
        members = (*before.members, *more)
        changes |= {"members": members, "version": before.version + 1}
        self.maps[group] = before.model_copy(update=changes)
        assert await self.registry.write_map(self.lead, self.maps[group])
        await self.bus.publish(subjects.map_of(group), self.maps[group])

    async def complete(self, **fields: object) -> httpx.Response:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 4, "return_token_ids": True, **fields}
        return await self.http.post("/v1/completions", json=body)

    async def is_ready(self) -> bool:
        return (await self.http.get("/health/ready")).status_code == 200

    async def reason(self) -> str:
        return str((await self.http.get("/health/ready")).json().get("reason"))

    async def becomes_unready(self, reason: str) -> None:
        async def is_so() -> bool:
            return await self.reason() == reason

        await eventually(is_so)

    async def metric(self, name: str, scenario: str) -> float:
        start = f'pdserve_prefix_cache_{name}_tokens_total{{scenario="{scenario}"}} '
        lines = (await self.http.get("/metrics")).text.splitlines()
        return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))

    async def traffic(self) -> dict[str, Traffic]:
        """By group."""
        [gateway] = await self.registry.gateways()
        return gateway.traffic


@asynccontextmanager
async def serving(nats_url: str, redis_url: str, **settings: object) -> AsyncIterator[Served]:
    chosen = GatewaySettings(
        model=str(DEMO),
        model_name="m",
        http_port=free_port(),
        heartbeat_s=0.1,
        heartbeat_late_s=60.0,
        record_ttl_s=60.0,
        **settings,  # type: ignore[arg-type]
    )
    lifetime = Lifetime()
    async with (
        registry.connect(redis_url, ttl_s=60.0, timeout_s=5.0) as records,
        connection.connect(nats_url, name="g", timeout_s=5.0) as gateways,
        connection.connect(nats_url, name="instances", timeout_s=5.0) as bus,
        httpx.AsyncClient(base_url=chosen.local_address, trust_env=False, timeout=60.0) as http,
    ):
        lead = await records.lead("c", 600.0)
        assert lead is not None
        gateway = Gateway(chosen, "g", Tokenizer(DEMO), gateways, records)
        running = asyncio.create_task(gateway.run(lifetime))

        async def listens() -> bool:
            assert not running.done(), running
            try:
                return (await http.get("/health/live")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(listens)
        yield Served(http, bus, records, lead)
        lifetime.end()
        await running


@pytest.fixture
async def one(nats_url: str, redis_url: str) -> AsyncIterator[Served]:
    async with serving(nats_url, redis_url) as served:
        yield served


@pytest.fixture
def only_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines ask again when they are told to, and never by themselves."""
    monkeypatch.setattr(line_module, "ASK_AGAIN_S", 1e6)
    monkeypatch.setattr(line_module, "ASK_AGAIN_AT_MOST_S", 1e6)


async def test_what_was_cached_is_counted_for_the_scenario_that_was_served(one: Served) -> None:
    default = [await one.add("default", "p1", "prefill"), await one.add("default", "d1", "decode")]
    chat = [await one.add("chat", "p2", "prefill"), await one.add("chat", "d2", "decode")]
    default[0].num_cached_tokens, chat[0].num_cached_tokens = 16, 5

    async def both_serve() -> bool:
        await one.complete(scenario="chat")
        return bool(chat[1].requests) and await one.is_ready()

    await eventually(both_serve)
    before = {name: await one.metric(name, "chat") for name in ("query", "hit")}
    other = {name: await one.metric(name, "default") for name in ("query", "hit")}
    answer = (await one.complete(scenario="chat", n=2)).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 5
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [4, 4]
    assert await one.metric("query", "chat") == before["query"] + 2 * len(PROMPT)
    assert await one.metric("hit", "chat") == before["hit"] + 2 * 5
    for fields in ({}, {"scenario": "unknown"}, {"scenario": "default"}):
        assert (await one.complete(**fields)).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 16
    assert await one.metric("query", "default") == other["query"] + 3 * len(PROMPT)
    assert await one.metric("hit", "default") == other["hit"] + 3 * 16
    assert await one.metric("query", "chat") == before["query"] + 2 * len(PROMPT)


async def test_a_batch_request_may_wait_and_another_has_the_objective_of_its_group(one: Served) -> None:
    prefill = await one.add("default", "p1", "prefill")
    await one.add("default", "d1", "decode")
    await one.change_map("default", ttft_s=50.0)
    await eventually(one.is_ready)

    async def has_an_objective() -> bool:
        await one.complete()
        last = prefill.requests[-1]
        return isinstance(last, PrefillRequest) and last.first_token_by is not None

    await eventually(has_an_objective)
    await one.complete(priority="batch")
    last = prefill.requests[-1]
    assert isinstance(last, PrefillRequest)
    assert last.first_token_by is None


async def test_it_tells_what_each_group_does(one: Served) -> None:
    await one.add("default", "p1", "prefill")
    decode = await one.add("default", "d1", "decode")
    await eventually(one.is_ready)
    await one.complete()
    decode.answers = [NO_SLOT] * 10_000
    waiting = asyncio.create_task(one.complete())

    async def is_told() -> bool:
        now = (await one.traffic()).get("default", Traffic())
        return (now.num_arrived, now.num_done, now.open, now.waiting_decode) == (2, 1, 1, 1)

    await eventually(is_told)
    decode.answers = []
    assert (await waiting).status_code == 200


async def test_a_slot_that_becomes_free_is_told_to_the_line_that_it_is_for(one: Served, only_hints: None) -> None:
    async def knows_both() -> bool:
        return (await one.traffic()).keys() == {"chat", "default"}

    await one.change_map("chat")
    prefill = await one.add("default", "p1", "prefill")
    decode = await one.add("default", "d1", "decode")
    await eventually(one.is_ready)
    await eventually(knows_both)
    for refusing, role, wrong in ((prefill, "prefill", "decode"), (decode, "decode", "prefill")):
        num_before = len(refusing.requests)
        refusing.answers = [NO_SLOT]
        waiting = asyncio.create_task(one.complete())
        await eventually(lambda refusing=refusing, n=num_before: len(refusing.requests) == n + 1)
        for group, freed in (("chat", role), ("nobody", role), ("default", wrong)):
            await refusing.tell("slot_freed", SlotFreed(instance_id="x", group=group, role=freed))
        await refusing.bus.flush()
        assert await one.is_ready()
        assert len(refusing.requests) == num_before + 1
        await refusing.tell("slot_freed", SlotFreed(instance_id="x", group="default", role=role))
        assert (await waiting).status_code == 200
        assert len(refusing.requests) == num_before + 2


async def test_a_new_member_serves_those_who_wait(
    nats_url: str, redis_url: str, only_hints: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its map is announced, and nothing else says that it is there."""
    monkeypatch.setattr(groups_module, "READ_EVERY_S", 1e6)
    async with serving(nats_url, redis_url, instance_wait_s=60.0) as one:
        full = await one.add("default", "p1", "prefill", *[NO_SLOT] * 100)
        await one.add("default", "d1", "decode")
        await eventually(one.is_ready)
        waiting = asyncio.create_task(one.complete())
        await eventually(lambda: full.requests)
        await one.add("default", "p2", "prefill")
        assert (await waiting).status_code == 200


async def test_it_is_not_ready_while_no_group_has_both_roles(one: Served) -> None:
    assert await one.reason() == "no prefill and no decode instance of m is ready"
    await one.add("default", "p1", "prefill")
    await one.becomes_unready("no decode instance of m is ready")
    await one.add("chat", "d1", "decode")
    await one.becomes_unready(
        "no decode instance has the weights, dtype and KV layout of a prefill instance of its group"
    )
    await one.add("chat", "p2", "prefill")
    await eventually(one.is_ready)
