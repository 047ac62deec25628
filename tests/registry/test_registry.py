"""Records, maps and the leader's lease in a real Valkey, and what happens while it is away."""

import asyncio
import json
import random
import time
from types import SimpleNamespace

import pytest
import redis

from pdserve.servers import Servers
from shared.errors import RegistryUnavailable
from shared.messages.records import GatewayRecord, GroupMap, Member, Traffic
from shared.registry import keys, registry
from shared.registry.heartbeats import Heartbeat
from shared.registry.registry import Lead, Registry
from tests.harness import eventually
from tests.registry.test_view import record

GATEWAY = GatewayRecord(
    id="g1",
    pid=1,
    host="h",
    version="0",
    started_at=0,
    address="a",
    open_requests=3,
    waiting_requests=1,
    traffic={"default": Traffic(open=3, waiting_prefill=1, num_arrived=7, ttft_s=0.5)},
)
MEMBER = Member(instance_id="p1", role="prefill", epoch=3, fingerprint="f", kv_host="h", kv_port=1)
CHAT = GroupMap(name="chat", scenario="talk", version=4, term=1, ttft_s=2.0, tpot_s=0.1, members=(MEMBER,))
DEFAULT = GroupMap(name="default", scenario="default", version=1, term=1)


async def test_what_is_written_is_read(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("b"))
        await records.write_instance(record("a", group="chat"))
        await records.write_instance(record("b", heartbeat=2))
        await records.write_instance(record("c", role=None, group=None, epoch=0, state="spare"))
        await records.write_gateway(GATEWAY)
        assert [one.id for one in await records.instances()] == ["a", "b", "c"]
        assert await records.members(["b", "a", "nobody"]) == [record("b", heartbeat=2), record("a", group="chat")]
        assert await records.members(["nobody"]) == []
        assert await records.members([]) == []
        assert await records.gateways() == [GATEWAY]
        await records.remove_instance(record("b"))
        await records.remove_gateway(GATEWAY)
        assert [one.id for one in await records.instances()] == ["a", "c"]
        assert await records.members(["b"]) == []
        assert await records.gateways() == []


async def test_what_is_not_renewed_runs_out(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=0.2, timeout_s=5.0) as records:
        await records.write_instance(record("a"))

        async def gone() -> bool:
            return await records.instances() == [] and await records.members(["a"]) == []

        await eventually(gone)


async def test_a_record_that_cannot_be_read_is_passed_over(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("a"))
        await records.write_instance(record("b"))
        with redis.Redis.from_url(redis_url) as client:
            client.set(keys.instance("a"), '{"id": "a"}', px=5000)
        assert [one.id for one in await records.instances()] == ["b"]
        assert [one.id for one in await records.members(["a", "b"])] == ["b"]


async def test_a_heartbeat_is_written_and_removed_with_its_record(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        loaded = record("a", heartbeat=7, state_version=3, slots_total=8, slots_used=2, prefill_token_s=0.001)
        await records.write_instance(loaded)
        await records.write_instance(record("b"))
        found = await records.heartbeats(["b", "nobody", "a"])
        assert found == [Heartbeat.of(record("b")), Heartbeat.of(loaded)]
        assert found[1].identity == (0.0, 3)
        assert (found[1].slots_used, found[1].prefill_token_s) == (2, 0.001)
        assert await records.heartbeats([]) == []
        await records.remove_instance(loaded)
        assert await records.heartbeats(["a"]) == []
        with redis.Redis.from_url(redis_url) as client:
            for key in (keys.heartbeat("b"), keys.instance("b")):
                assert 0 < client.pttl(key) <= 5000


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"7",
        b"\xff\xfe\xfd",
        b'{"id": "a"}',
        {"id": "b"},
        {"heartbeat": -1},
        {"heartbeat": 2**80},
        {"prefill_token_s": -1.0},
        {"state": "dancing"},
    ],
)
async def test_a_heartbeat_that_cannot_be_true_is_skipped(
    redis_url: str, caplog: pytest.LogCaptureFixture, broken: bytes | dict[str, object]
) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        for name in ("a", "b"):
            await records.write_instance(record(name))
        with redis.Redis.from_url(redis_url) as client:
            valid = json.loads(client.get(keys.heartbeat("a")))
            client.set(keys.heartbeat("a"), json.dumps(valid | broken) if isinstance(broken, dict) else broken, px=5000)
        for _ in range(3):
            assert [one.id for one in await records.heartbeats(["a", "b"])] == ["b"]
        assert caplog.text.count("skipping pdserve:v1:heartbeat:a in Redis") == 1
        await records.write_instance(record("a"))
        assert [one.id for one in await records.heartbeats(["a", "b"])] == ["a", "b"]


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "1e999"])
async def test_figures_that_are_not_finite_are_skipped(redis_url: str, figure: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("a"))
        with redis.Redis.from_url(redis_url, decode_responses=True) as client:
            for key in (keys.heartbeat("a"), keys.instance("a")):
                text = str(client.get(key)).replace('"prefill_token_s":0.0', f'"prefill_token_s":{figure}')
                assert figure in text
                client.set(key, text, px=5000)
        assert await records.heartbeats(["a"]) == []
        assert await records.members(["a"]) == []


async def test_a_record_under_the_key_of_another_is_skipped(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("a"))
        await records.write_instance(record("b"))
        with redis.Redis.from_url(redis_url) as client:
            client.set(keys.instance("a"), record("b", epoch=99).model_dump_json(), px=5000)
        assert await records.instances() == await records.members(["a", "b"]) == [record("b")]


@pytest.mark.parametrize("name", ["a b", "a.>", "a*", "a\r\nPUB", "x" * 300])
async def test_an_id_that_cannot_stand_in_a_subject_is_skipped(redis_url: str, name: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record(name))
        assert await records.members([name]) == []
        assert await records.heartbeats([name]) == []
        assert await records.instances() == []


async def test_it_is_there_again_after_a_restart(servers: Servers) -> None:
    async with registry.connect(servers.start_redis(), ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("a"))
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        with pytest.raises(RegistryUnavailable):
            await records.instances()
        servers.start_redis()
        await records.write_instance(record("a", heartbeat=2))
        assert [one.heartbeat for one in await records.instances()] == [2]


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "unix:///nowhere/redis.sock"])
async def test_one_that_is_not_there_is_named(url: str) -> None:
    with pytest.raises(RegistryUnavailable, match="set PDSERVE_REDIS_URL"):
        async with registry.connect(url, ttl_s=5.0, timeout_s=0.3):
            pass


async def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(RegistryUnavailable, match="no Redis URL"):
        async with registry.connect("localhost:6379", ttl_s=5.0, timeout_s=0.3):
            pass


async def test_a_writer_can_be_cancelled_at_any_moment(redis_url: str) -> None:
    """Or a process that ends would wait for its heart for ever."""
    dice = random.Random(0)

    async def write_for_ever(records: Registry) -> None:
        while True:
            await records.write_gateway(GATEWAY)

    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        for _ in range(300):
            writing = asyncio.create_task(write_for_ever(records))
            await asyncio.sleep(dice.uniform(0.0, 0.003))
            writing.cancel()
            await asyncio.wait([writing], timeout=5.0)
            assert writing.cancelled()


async def led_by(records: Registry, controller_id: str, for_s: float = 60.0) -> Lead:
    lead = await records.lead(controller_id, for_s)
    assert lead is not None
    return lead


async def test_one_leads_and_stays_the_leader(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        assert await records.leader() is None
        lead = await led_by(records, "one")
        assert await records.lead("two", 60.0) is None
        assert await led_by(records, "one") == lead
        assert await records.leader() == "one"


async def test_of_many_that_want_to_one_leads(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        wishes = [records.lead(f"controller-{number}", 60.0) for number in range(20)]
        [lead] = [lead for lead in await asyncio.gather(*wishes) if lead is not None]
        assert await records.leader() == lead.controller_id


async def test_a_name_that_begins_as_the_leaders_does_not_lead(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await led_by(records, "controller-12")
        assert await records.lead("controller-1", 60.0) is None
        assert await records.lead("controller-123", 60.0) is None


async def test_a_lease_that_is_not_renewed_runs_out_and_another_takes_over(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        first = await led_by(records, "one", for_s=0.2)
        leads: list[Lead] = []

        async def takes_over() -> bool:
            lead = await records.lead("two", 60.0)
            leads.extend([lead] if lead is not None else [])
            return bool(leads)

        await eventually(takes_over)
        assert leads[0].term > first.term
        assert await records.leader() == "two"
        assert await records.lead("one", 60.0) is None


async def test_a_lease_that_is_renewed_does_not_run_out(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await led_by(records, "one", for_s=0.2)
        await led_by(records, "one", for_s=60.0)
        with redis.Redis.from_url(redis_url) as client:
            assert client.pttl(keys.LEADER) > 1000


async def test_whoever_resigns_lets_another_lead_at_once(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        first = await led_by(records, "one")
        await records.resign(first)
        assert await records.leader() is None
        second = await led_by(records, "two")
        assert second.term > first.term
        await records.resign(first)
        await records.resign(Lead("two", first.term))
        assert await records.leader() == "two"


async def test_terms_grow_where_the_clock_goes_back(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        terms = []
        for number, now in enumerate([2_000_000.0, 1_000_000.0, 1_000_000.0, 3_000_000.0]):
            monkeypatch.setattr(registry, "time", SimpleNamespace(time=lambda now=now: now, monotonic=time.monotonic))
            lead = await led_by(records, f"controller-{number}")
            terms.append(lead.term)
            await records.resign(lead)
        assert terms == [2_000_000_000, 2_000_000_001, 2_000_000_002, 3_000_000_000]


async def test_terms_grow_where_everything_is_lost(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        first = await led_by(records, "one")
        assert await records.write_map(first, CHAT)
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        assert not await records.write_map(first, CHAT)
        await eventually(lambda: int(time.time() * 1000) > first.term)  # terms are milliseconds
        again = await led_by(records, "one")
        assert again.term > first.term
        assert not await records.write_map(first, CHAT)
        assert await records.maps() == []
        assert await records.write_map(again, CHAT)


async def test_maps_are_written_by_the_leader_and_stay(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=0.2, timeout_s=5.0) as records:
        assert await records.maps() == []
        lead = await led_by(records, "one")
        await records.write_instance(record("a"))
        assert await records.write_map(lead, DEFAULT)
        assert await records.write_map(lead, CHAT)
        assert await records.maps() == [CHAT, DEFAULT]
        newer = CHAT.model_copy(update={"version": 5, "members": ()})
        assert await records.write_map(lead, newer)

        async def is_gone() -> bool:
            return await records.instances() == []

        await eventually(is_gone)
        assert await records.maps() == [newer, DEFAULT]
        assert await records.remove_map(lead, "chat")
        assert await records.remove_map(lead, "nobody")
        assert await records.maps() == [DEFAULT]


async def test_versions_of_maps_are_written_and_removed_with_them(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        assert await records.map_versions() == {}
        lead = await led_by(records, "one")
        assert await records.write_map(lead, DEFAULT)
        assert await records.write_map(lead, CHAT)
        assert await records.map_versions() == {"chat": 4, "default": 1}
        assert await records.maps(["chat", "nobody"]) == [CHAT]
        assert await records.maps([]) == []
        assert await records.write_map(lead, CHAT.model_copy(update={"version": 5}))
        assert await records.remove_map(lead, "default")
        assert await records.map_versions() == {"chat": 5}
        await records.resign(lead)
        assert not await records.write_map(lead, CHAT.model_copy(update={"version": 6}))
        assert not await records.remove_map(lead, "chat")
        assert await records.map_versions() == {"chat": 5}


@pytest.mark.parametrize("forged", [{"version": 2**62}, {"version": -1}, {"term": 2**62}, {"name": "other"}])
async def test_a_map_that_no_controller_wrote_is_skipped(
    redis_url: str, caplog: pytest.LogCaptureFixture, forged: dict[str, object]
) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        assert await records.write_map(await led_by(records, "one"), DEFAULT)
        with redis.Redis.from_url(redis_url) as client:
            client.hset(keys.MAPS, "chat", CHAT.model_copy(update=forged).model_dump_json())
            client.hset(keys.MAP_VERSIONS, "chat", str(forged.get("version", 4)))
        for _ in range(2):
            assert await records.maps() == [DEFAULT]
            assert await records.maps(["chat"]) == []
        assert [one.levelname for one in caplog.records] == ["ERROR"]
        assert ("chat" in await records.map_versions()) == ("version" not in forged)


async def test_a_version_of_tomorrow_is_read_and_one_of_the_day_after_is_not(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        now_ms = int(time.time() * 1000)
        with redis.Redis.from_url(redis_url) as client:
            client.hset(keys.MAP_VERSIONS, "soon", str(now_ms + 80_000_000))
            client.hset(keys.MAP_VERSIONS, "late", str(now_ms + 90_000_000))
        assert list(await records.map_versions()) == ["soon"]


@pytest.mark.parametrize("forged", ["4611686018427387904", "nan", "inf", "-5", "many", ""])
async def test_a_forged_term_does_not_count(redis_url: str, forged: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        with redis.Redis.from_url(redis_url) as client:
            client.set(keys.TERM, forged)
            before_ms = int(time.time() * 1000)
            lead = await led_by(records, "one")
            assert before_ms <= lead.term <= int(time.time() * 1000)
            client.set(keys.LEADER, f"one|{forged}", px=60_000)
            again = await led_by(records, "one")
            assert lead.term < again.term <= int(time.time() * 1000) + 1
        assert await records.write_map(again, CHAT)


async def test_a_map_that_cannot_be_read_is_passed_over(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        assert await records.write_map(await led_by(records, "one"), CHAT)
        with redis.Redis.from_url(redis_url) as client:
            client.hset(keys.MAPS, "broken", '{"name": "broken"}')
        assert await records.maps() == [CHAT]


@pytest.mark.parametrize("after", ["resigned", "ran out", "another leads", "leads again"])
async def test_who_leads_no_more_changes_nothing(redis_url: str, after: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        lead = await led_by(records, "one")
        assert await records.write_map(lead, CHAT)
        if after == "ran out":
            with redis.Redis.from_url(redis_url) as client:
                client.pexpire(keys.LEADER, 1)
                await eventually(lambda: not client.exists(keys.LEADER))
        else:
            await records.resign(lead)
        if after in ("another leads", "leads again"):
            await led_by(records, "two" if after == "another leads" else "one")
        assert not await records.write_map(lead, CHAT.model_copy(update={"version": 99}))
        assert not await records.write_map(lead, DEFAULT)
        assert not await records.remove_map(lead, "chat")
        assert await records.maps() == [CHAT]


async def test_nobody_leads_while_it_is_away(servers: Servers) -> None:
    async with registry.connect(servers.start_redis(), ttl_s=5.0, timeout_s=5.0) as records:
        lead = await led_by(records, "one")
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        for asked in (
            records.lead("one", 60.0),
            records.leader(),
            records.resign(lead),
            records.maps(),
            records.write_map(lead, CHAT),
            records.remove_map(lead, "chat"),
            records.members(["a"]),
            records.heartbeats(["a"]),
            records.map_versions(),
        ):
            with pytest.raises(RegistryUnavailable):
                await asked
