"""A whole gateway in this process, over scripted instances, with a real bus and registry."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from services.gateway import groups as groups_module
from services.gateway import instance_client
from services.gateway.service import Gateway
from shared.bus import connection, subjects
from shared.bus.connection import Bus
from shared.messages.records import GroupMap, Member, Role, Traffic
from shared.messages.serving import AskReply, Message, SlotFreed, StepTokens
from shared.process import Lifetime
from shared.registry import registry
from shared.registry.registry import Lead, Registry
from shared.settings import GatewaySettings
from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.conftest import DEMO, ids_of
from tests.gateway.scripted import FULL, NO_SLOT, Scripted, Work, expected, member, token_of
from tests.harness import eventually, free_port
from tests.registry.test_view import record

PROMPT = [10] * 20


@dataclass
class Served:
    """A gateway that serves, and the other side of its bus and registry."""

    http: httpx.AsyncClient
    bus: Bus
    registry: Registry
    lead: Lead
    maps: dict[str, GroupMap] = field(default_factory=dict)

    async def add(
        self, group: str, name: str, role: Role, *answers: AskReply, kind: type[Scripted] = Scripted
    ) -> Scripted:
        """An instance that is in its group's map."""
        one = kind(self.bus, record(name, role=role, group=group, max_model_len=1000), list(answers))
        await one.subscribe()
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
        await self.bus.publish(subjects.CHANGED, Message())

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

    async def metric(self, name: str) -> float:
        lines = (await self.http.get("/metrics")).text.splitlines()
        return sum(float(line.removeprefix(f"{name} ")) for line in lines if line.startswith(f"{name} "))

    async def cache_metric(self, name: str, scenario: str) -> float:
        return await self.metric(f'pdserve_prefix_cache_{name}_tokens_total{{scenario="{scenario}"}}')

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
def only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that is full is asked again when it says that it has capacity, and not because time has passed."""
    monkeypatch.setattr(instance_client, "FULL_FIRST_S", 1e6)
    monkeypatch.setattr(instance_client, "FULL_MAX_S", 1e6)


async def test_what_was_cached_is_counted_for_the_scenario_that_was_served(one: Served) -> None:
    default = [await one.add("default", "p1", "prefill"), await one.add("default", "d1", "decode")]
    chat = [await one.add("chat", "p2", "prefill"), await one.add("chat", "d2", "decode")]
    default[0].num_cached_tokens, chat[0].num_cached_tokens = 16, 5

    async def both_serve() -> bool:
        await one.complete(scenario="chat")
        return bool(chat[1].requests) and await one.is_ready()

    await eventually(both_serve)
    before = {name: await one.cache_metric(name, "chat") for name in ("query", "hit")}
    other = {name: await one.cache_metric(name, "default") for name in ("query", "hit")}
    answer = (await one.complete(scenario="chat", n=2)).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 5
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [4, 4]
    assert await one.cache_metric("query", "chat") == before["query"] + 2 * len(PROMPT)
    assert await one.cache_metric("hit", "chat") == before["hit"] + 2 * 5
    for fields in ({}, {"scenario": "unknown"}, {"scenario": "default"}):
        assert (await one.complete(**fields)).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 16
    assert await one.cache_metric("query", "default") == other["query"] + 3 * len(PROMPT)
    assert await one.cache_metric("hit", "default") == other["hit"] + 3 * 16
    assert await one.cache_metric("query", "chat") == before["query"] + 2 * len(PROMPT)


async def test_a_batch_request_may_wait_and_another_has_the_objective_of_its_group(one: Served) -> None:
    prefill = await one.add("default", "p1", "prefill", *FULL)
    await one.add("default", "d1", "decode")
    await one.change_map("default", ttft_s=0.4)
    await eventually(one.is_ready)
    waiting = asyncio.create_task(one.complete(priority="batch"))
    late = await one.complete()
    assert late.status_code == 429
    assert "first token within 0.4 s" in late.json()["error"]["message"]
    assert not waiting.done()
    prefill.answers = []
    assert (await waiting).status_code == 200


async def test_it_tells_what_each_group_does(one: Served) -> None:
    await one.add("default", "p1", "prefill")
    decode = await one.add("default", "d1", "decode")
    await eventually(one.is_ready)
    await one.complete()
    decode.answers = list(FULL)
    waiting = asyncio.create_task(one.complete())

    async def is_told() -> bool:
        now = (await one.traffic()).get("default", Traffic())
        return (now.num_arrived, now.num_done, now.open, now.waiting_decode) == (2, 1, 1, 1)

    await eventually(is_told)
    decode.answers = []
    assert (await waiting).status_code == 200


async def test_a_slot_that_becomes_free_lets_that_instance_be_asked_again(one: Served, only_when_told: None) -> None:
    prefill = await one.add("default", "p1", "prefill")
    decode = await one.add("default", "d1", "decode")
    await eventually(one.is_ready)
    full: Scripted
    role: Role
    for full, role in ((prefill, "prefill"), (decode, "decode")):
        name, num_before = full.record.id, len(full.requests)
        full.answers = [NO_SLOT]
        waiting = asyncio.create_task(one.complete())
        await eventually(lambda full=full, n=num_before: len(full.requests) == n + 1)  # type: ignore[misc]
        for group, freed in (("nobody", name), ("default", "x")):
            await full.tell("slot_freed", SlotFreed(instance_id=freed, group=group, role=role))
        await full.bus.flush()
        assert await one.is_ready()
        assert len(full.requests) == num_before + 1
        await full.tell("slot_freed", SlotFreed(instance_id=name, group="default", role=role))
        assert (await waiting).status_code == 200
        assert len(full.requests) == num_before + 2


async def test_a_new_member_serves_those_who_wait(
    nats_url: str, redis_url: str, only_when_told: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its map is announced, and nothing else says that it is there."""
    monkeypatch.setattr(groups_module, "READ_EVERY_S", 1e6)
    async with serving(nats_url, redis_url, instance_wait_s=60.0) as one:
        full = await one.add("default", "p1", "prefill", *FULL)
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


class Speaks(Scripted):
    """Decodes a text, and never comes to an end."""

    text = "import os\nimport sys\nimport re\n"

    async def decode(self, work: Work, up_to: int | None = None) -> list[int]:
        for token_id in ids_of(Tokenizer(DEMO), self.text):
            token = token_of(work, work.token_ids)
            index = len(work.token_ids) - work.num_prompt_tokens
            work.token_ids.append(token_id)
            token = token.model_copy(update={"index": index, "token_id": token_id})
            await self.tell("tokens", StepTokens(instance_id=self.record.id, tokens=[token]))
        return work.token_ids


async def both(one: Served, kind: type[Scripted]) -> tuple[Scripted, Scripted]:
    """A prefill and a decode instance, ready; `kind` is the second one's."""
    prefill, decode = await one.add("default", "p1", "prefill"), await one.add("default", "d1", "decode", kind=kind)
    await eventually(one.is_ready)
    return prefill, decode


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_request_at_the_instance(one: Served, stream: bool) -> None:
    _, decode = await both(one, Speaks)
    answer = await one.complete(max_tokens=500, stop="sys", stream=stream)
    assert answer.status_code == 200
    assert "stop" in answer.text
    assert "import re" not in answer.text
    # The cancel was sent before the last part of the answer.
    [work] = decode.requests
    await eventually(lambda: decode.cancelled == [work.request_id])
    assert await one.metric("pdserve_retries_total") == 0


async def test_closing_the_stream_ends_the_request_at_the_instance(one: Served) -> None:
    _, decode = await both(one, Speaks)
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 500, "stream": True}
    async with one.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        await eventually(lambda: decode.requests)
        [work] = decode.requests
        assert decode.cancelled == []
    await eventually(lambda: decode.cancelled == [work.request_id])
    await eventually(lambda: is_metric(one, 'pdserve_requests_total{code="cancelled",endpoint="completions"}', 1))


async def is_metric(one: Served, name: str, value: float) -> bool:
    return await one.metric(name) == value


class FallsSilent(Scripted):
    """Sends two tokens of its first request and then no more, without a finish reason."""

    async def serve(self, work: Work) -> None:
        await self.decode(work, up_to=3 if len(self.requests) == 1 else None)


async def test_tokens_that_end_without_a_reason_go_on_in_another_attempt(nats_url: str, redis_url: str) -> None:
    async with serving(nats_url, redis_url, token_timeout_s=0.3) as one:
        await both(one, FallsSilent)
        answer = await one.complete(max_tokens=8)
        assert answer.json()["choices"][0]["token_ids"] == expected(PROMPT, 8)
        assert await one.metric("pdserve_retries_total") == 1
        assert await one.metric('pdserve_failed_attempts_total{reason="counted"}') == 1
        assert await one.metric("pdserve_instance_pauses_total") == 1
        assert await one.metric("pdserve_lost_instances_total") == 0


async def test_a_request_whose_tokens_never_end_ends_by_its_deadline(nats_url: str, redis_url: str) -> None:
    async with serving(nats_url, redis_url, request_timeout_s=0.5) as one:
        _, decode = await both(one, Speaks)
        answer = await one.complete(max_tokens=500)
        assert answer.status_code == 504
        await eventually(lambda: decode.cancelled == [decode.requests[0].request_id])


async def test_an_instance_that_dies_is_counted_and_its_request_goes_on(one: Served) -> None:
    _, dying = await both(one, FallsSilent)
    asking = asyncio.create_task(one.complete(max_tokens=8))
    await eventually(lambda: dying.requests)
    await one.add("default", "d2", "decode")
    await dying.vanish()
    assert (await asking).json()["choices"][0]["token_ids"] == expected(PROMPT, 8)
    assert await one.metric("pdserve_lost_instances_total") == 1
    assert await one.metric("pdserve_retries_total") == 1
