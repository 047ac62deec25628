"""Groups as a gateway knows them, with maps and records in a real Valkey, and changes announced on a real NATS."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import redis

from pdserve.servers import Servers
from services.gateway import groups as groups_module
from services.gateway.groups import Group, Groups
from shared.bus import connection, subjects
from shared.bus.connection import Bus
from shared.messages.records import GroupMap, InstanceRecord, Member
from shared.messages.serving import Cancel, Message
from shared.registry import keys, registry
from shared.registry.registry import Lead, Registry
from shared.settings import GatewaySettings
from tests.harness import eventually
from tests.registry.test_view import record

SETTINGS = GatewaySettings(model_name="m", heartbeat_s=0.5, heartbeat_late_s=2.0)
P1, P2 = record("p1"), record("p2")
D1, D2 = record("d1", role="decode"), record("d2", role="decode")
BOTH = (P1, D1)


@dataclass
class Watched:
    """Groups, and what they stand on; `now` is their clock."""

    groups: Groups
    bus: Bus
    registry: Registry
    lead: Lead
    lost: list[str]
    num_open: dict[str, int] = field(default_factory=dict)
    now: float = 1000.0
    written: dict[str, InstanceRecord] = field(default_factory=dict)

    async def write(self, *records: InstanceRecord) -> None:
        """Writes records as instances do: `state_version` grows when anything but the heartbeat has changed."""
        for one in records:
            before = self.written.get(one.id, one)
            same = {"heartbeat": one.heartbeat, "state_version": before.state_version}
            num_changes = one.model_copy(update=same) != before.model_copy(update=same)
            written = one.model_copy(update={"state_version": before.state_version + num_changes})
            self.written[one.id] = written
            await self.registry.write_instance(written)

    async def map(self, name: str, *members: InstanceRecord, version: int = 1, scenario: str | None = None) -> None:
        """Writes a group's map to the registry, for the next reading to find."""
        assert await self.registry.write_map(self.lead, map_of(name, members, version, scenario))

    async def serve(self, name: str, *members: InstanceRecord, scenario: str | None = None) -> Group:
        """A group of these instances, and that it is known."""
        await self.write(*members)
        await self.map(name, *members, scenario=scenario)
        await self.groups.read()
        return self.group(name)

    async def announce(self) -> None:
        """Says that something has changed, as controllers and instances do."""
        await self.bus.publish(subjects.CHANGED, Message())

    async def pass_time(self, *beating: InstanceRecord, seconds: float = 3.0) -> None:
        """Reads often for some seconds, in which only these hearts beat."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            await self.write(*(one.model_copy(update={"heartbeat": int(2 * self.now)}) for one in beating))
            await self.groups.read()

    def group(self, name: str) -> Group:
        found = self.groups.named(name)
        assert found is not None
        return found


def member(one: InstanceRecord) -> Member:
    """An instance as a map contains it."""
    return Member.model_validate({"instance_id": one.id, **one.model_dump(include=set(Member.model_fields))})


def map_of(name: str, members: Sequence[InstanceRecord], version: int, scenario: str | None = None) -> GroupMap:
    found = tuple(member(one) for one in members)
    return GroupMap(name=name, scenario=scenario or name, version=version, term=1, members=found)


def ids(group: Group) -> list[str]:
    return sorted(one.id for role in ("prefill", "decode") for one in group.ready(role))


@asynccontextmanager
async def watching(
    nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, settings: GatewaySettings = SETTINGS
) -> AsyncIterator[Watched]:
    async with (
        registry.connect(redis_url, ttl_s=60.0, timeout_s=5.0) as records,
        connection.connect(nats_url, name="g", timeout_s=5.0) as bus,
    ):
        lead = await records.lead("c", 60.0)
        assert lead is not None
        lost: list[str] = []
        groups = Groups(settings, records, lambda: watched.num_open.keys(), lost.append)
        watched = Watched(groups, bus, records, lead, lost)
        monkeypatch.setattr(groups_module, "time", SimpleNamespace(monotonic=lambda: watched.now))
        await bus.subscribe(subjects.CHANGED, groups.on_changed)
        yield watched


@pytest.fixture
async def one(nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    async with watching(nats_url, redis_url, monkeypatch) as watched:
        yield watched


async def test_members_are_asked_that_are_as_the_map_has_them(one: Watched) -> None:
    await one.write(*BOTH, P2, D2)
    await one.map("chat", *BOTH)
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p1"]
    assert [found.id for found in one.groups.ready("prefill")] == ["p1"]


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 2},
        {"epoch": 0},
        {"role": "decode"},
        {"role": None, "state": "spare"},
        {"state": "changing"},
        {"state": "draining"},
        {"state": "spare"},
        {"model": "other"},
    ],
)
async def test_a_member_whose_record_is_another_is_not_asked(one: Watched, changes: dict[str, object]) -> None:
    await one.write(P1.model_copy(update=changes), P2, D1)
    await one.map("chat", P1, P2, D1)
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p2"]
    await one.write(P1)
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p1", "p2"]


async def test_a_member_without_a_record_or_whose_heart_is_late_is_not_asked(one: Watched) -> None:
    await one.write(P1, D1)
    await one.map("chat", P1, P2, D1)
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p1"]
    await one.pass_time(D1)
    assert ids(one.group("chat")) == ["d1"]
    assert one.lost == ["p1"]
    await one.pass_time(P1, D1)
    assert ids(one.group("chat")) == ["d1", "p1"]


async def test_one_that_says_that_it_ends_is_not_lost(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    ending = P1.model_copy(update={"state": "draining"})
    await one.pass_time(ending, D1)
    await one.registry.remove_instance(ending)
    await one.pass_time(D1)
    assert one.lost == []


async def test_a_map_is_taken_as_redis_has_it_and_the_group_stays_the_same(one: Watched) -> None:
    await one.write(*BOTH, P2, D2)
    await one.map("chat", *BOTH, version=5)
    await one.groups.read()
    group = one.group("chat")
    assert ids(group) == ["d1", "p1"]
    await one.map("chat", P1, D2, version=6)
    await one.groups.read()
    assert one.group("chat") is group
    assert group.map.version == 6
    assert ids(group) == ["d2", "p1"]


async def test_a_map_on_the_bus_is_not_believed(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    watch = asyncio.create_task(one.groups.watch())
    for subject in (f"{subjects.PREFIX}.map.chat", subjects.CHANGED):
        await one.bus.publish(subject, map_of("chat", (P2, D2), 99))
    await one.map("later")
    await one.announce()
    await eventually(lambda: one.groups.named("later"))
    assert one.group("chat").map.version == 1
    assert ids(one.group("chat")) == ["d1", "p1"]
    watch.cancel()


async def test_what_is_announced_is_read_at_once(one: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "READ_EVERY_S", 1e6)
    await one.map("default")
    watch = asyncio.create_task(one.groups.watch())
    await eventually(lambda: one.group("default").map.version)
    await one.write(*BOTH)
    await one.map("chat", *BOTH)
    await one.announce()
    await eventually(lambda: one.groups.named("chat") and ids(one.group("chat")) == ["d1", "p1"])
    await one.write(P1.model_copy(update={"state": "draining"}))
    await one.bus.publish(subjects.CHANGED, Cancel(request_ids=[]))
    await eventually(lambda: ids(one.group("chat")) == ["d1"])
    watch.cancel()


async def test_a_scenario_is_served_by_its_group(one: Watched) -> None:
    chat = await one.serve("chat", *BOTH)
    default = await one.serve("default", P2, D2)
    assert one.groups.of("chat") is chat
    assert one.groups.of(None) is default
    assert one.groups.of("default") is default


async def test_a_scenario_that_nobody_serves_goes_to_the_default_group(one: Watched) -> None:
    chat = await one.serve("chat", *BOTH)
    default = await one.serve("default", P2, D2)
    assert one.groups.of("unknown") is default
    await one.write(D1.model_copy(update={"state": "draining"}))
    await one.groups.read()
    assert one.groups.of("chat") is default
    await one.write(D1)
    await one.groups.read()
    assert one.groups.of("chat") is chat


async def test_where_nobody_serves_it_a_request_waits_for_its_own_group(one: Watched) -> None:
    default = one.groups.of("chat")
    assert (default.name, ids(default)) == ("default", [])
    await one.map("default")
    await one.map("chat", P1)
    await one.groups.read()
    assert one.groups.of(None) is default is one.group("default")
    assert one.groups.of("chat") is one.group("chat")
    assert one.groups.of("unknown") is default


async def test_the_default_group_is_the_one_that_stood_in_for_it(one: Watched) -> None:
    before = one.groups.of(None)
    assert await one.serve("default", *BOTH) is before
    assert ids(before) == ["d1", "p1"]


async def test_of_several_groups_the_one_with_fewer_requests_for_each_instance(one: Watched) -> None:
    small = await one.serve("chat", *BOTH, scenario="chat")
    large = await one.serve("chat-2", P2, D2, record("p3"), record("d3", role="decode"), scenario="chat")
    small.counts.open, large.counts.open = 2, 3
    assert one.groups.of("chat") is large
    small.counts.open, large.counts.open = 2, 5
    assert one.groups.of("chat") is small
    await one.write(P1.model_copy(update={"state": "changing"}))
    await one.groups.read()
    assert one.groups.of("chat") is large


async def test_a_request_that_has_begun_goes_where_its_weights_are(one: Watched) -> None:
    old = await one.serve("chat", *BOTH)
    upgraded = [record("p2", fingerprint="new"), record("d2", role="decode", fingerprint="new")]
    new = await one.serve("chat-2", *upgraded, scenario="chat")
    old.counts.open = 100
    assert one.groups.of("chat") is new
    assert one.groups.of("chat", "f") is old
    assert one.groups.of("chat", "new") is new
    old.counts.open, new.counts.open = 0, 100
    assert one.groups.of("chat", "new") is new
    mixed = await one.serve("default", record("p3", fingerprint="third"), record("d3", role="decode"))
    assert one.groups.of("chat", "third") is old
    assert mixed.serves()
    assert not mixed.serves("third")


async def test_groups_that_are_no_more_are_dropped_once_nothing_of_theirs_is_open(one: Watched) -> None:
    chat = await one.serve("chat", *BOTH)
    await one.serve("default", P2, D2)
    chat.counts.open = 1
    assert await one.registry.remove_map(one.lead, "chat")
    await one.groups.read()
    assert one.group("chat") is chat
    assert ids(chat) == ["d1", "p1"]
    chat.counts.open = 0
    await one.groups.read()
    assert one.groups.named("chat") is None
    assert [group.name for group in one.groups.all()] == ["default"]


async def test_a_registry_that_has_lost_everything_takes_nothing_away(one: Watched, redis_url: str) -> None:
    await one.serve("chat", *BOTH)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p1"]
    await one.pass_time(P1, D1)
    assert ids(one.group("chat")) == ["d1", "p1"]
    assert one.lost == []


async def test_a_registry_that_is_away_takes_nothing_away(
    servers: Servers, nats_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(nats_url, servers.start_redis(), monkeypatch) as one:
        await one.serve("chat", *BOTH)
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        for _ in range(3):
            one.now += 10.0
            await one.groups.read()
        assert ids(one.group("chat")) == ["d1", "p1"]
        assert caplog.text.count("continuing with the instances known so far") == 1
        servers.start_redis()
        await one.write(P1)
        one.now += 10.0
        await one.groups.read()
        assert ids(one.group("chat")) == ["d1", "p1"]
        assert one.lost == []


async def test_one_that_left_its_map_and_dies_is_lost_to_the_streams_that_it_has(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    one.num_open = {"p1": 1}
    await one.map("chat", D1, version=2)
    await one.pass_time(P1, D1)
    assert one.lost == []
    assert ids(one.group("chat")) == ["d1"]
    await one.pass_time(D1)
    assert one.lost == ["p1"]


async def test_one_that_has_streams_is_watched_though_no_map_has_ever_had_it(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    await one.write(P2)
    one.num_open = {"p2": 1}
    await one.pass_time(P1, D1, P2)
    one.num_open = {"p2": 1}
    await one.pass_time(P1, D1)
    assert one.lost == ["p2"]


async def test_one_that_left_its_map_and_lives_is_not_lost(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    one.group("chat").affinity.remember("p1", [7])
    await one.map("chat", D1, version=2)
    await one.pass_time(P1, D1, seconds=10.0)
    assert one.lost == []
    assert one.group("chat").affinity.matched([7]) == {"p1": 1}


async def test_what_a_lost_instance_had_computed_is_forgotten(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    default = await one.serve("default", P2, D2)
    for group in one.groups.all():
        group.affinity.remember("p1", [7])
        group.affinity.remember("p2", [7])
    await one.pass_time(P2, D1, D2)
    assert one.lost == ["p1"]
    assert one.group("chat").affinity.matched([7]) == default.affinity.matched([7]) == {"p2": 1}


async def test_the_shortest_context_is_that_of_live_members_of_our_model(one: Watched) -> None:
    assert one.groups.max_model_len() is None
    short, spare, other = (
        record("p2", max_model_len=50),
        record("p3", max_model_len=10, role=None, group=None, state="spare"),
        record("d2", role="decode", max_model_len=20, model="other"),
    )
    await one.write(*BOTH, short, spare, other)
    await one.map("chat", *BOTH, short, other)
    one.num_open = {"p3": 1}
    await one.groups.read()
    assert one.groups.max_model_len() == 50
    await one.pass_time(*BOTH, spare, other)
    assert one.groups.max_model_len() == 100


async def test_records_that_cannot_be_read_are_skipped(
    one: Watched, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await one.serve("chat", *BOTH)
    with redis.Redis.from_url(redis_url) as client:
        client.set(keys.instance("p1"), "{}", px=5000)
        client.hset(keys.MAPS, "broken", "{}")
        client.hset(keys.MAP_VERSIONS, "broken", "1")
    await one.pass_time(D1)
    assert one.lost == ["p1"]
    assert one.groups.named("broken") is None
    assert caplog.text.count("the map of group broken in Redis") == 1, "once, though it is read again and again"


@pytest.mark.parametrize("broken", ["", "{}", "null", '{"id": "p2"}', "\xff\xfe", "[" * 10_000])
async def test_a_heartbeat_that_cannot_be_read_is_none(one: Watched, redis_url: str, broken: str) -> None:
    await one.serve("chat", *BOTH)
    with redis.Redis.from_url(redis_url) as client:
        client.set(keys.heartbeat("p1"), broken.encode("latin-1"), px=60_000)
    await one.pass_time(D1)
    assert one.lost == ["p1"]
    assert ids(one.group("chat")) == ["d1"]


async def test_a_changed_record_that_cannot_be_read_is_not_asked(one: Watched, redis_url: str) -> None:
    await one.serve("chat", *BOTH)
    await one.write(P1.model_copy(update={"blocks_total": 7}))
    with redis.Redis.from_url(redis_url) as client:
        client.set(keys.instance("p1"), "{}", px=60_000)
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1"]
    await one.write(P1)
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p1"]


@pytest.mark.parametrize("version", ["4611686018427387904", "-1", "nan", "1e3", "", "9" * 5000])
async def test_a_forged_map_version_is_ignored(
    one: Watched, redis_url: str, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    group = await one.serve("chat", *BOTH)
    with redis.Redis.from_url(redis_url) as client:
        client.hset(keys.MAP_VERSIONS, "chat", version)
        client.hset(keys.MAPS, "chat", map_of("chat", (P2, D2), 2).model_dump_json())
    await one.groups.read()
    await one.groups.read()
    assert one.group("chat") is group
    assert ids(group) == ["d1", "p1"]
    assert caplog.text.count("the map version of group chat in Redis") == 1
    await one.map("chat", P1, version=3)
    await one.groups.read()
    assert ids(group) == ["p1"]


@pytest.mark.parametrize("forged", [{"version": 2**62}, {"term": 2**62}, {"name": "other"}])
async def test_a_forged_map_is_ignored_and_the_next_one_is_taken(
    one: Watched, redis_url: str, forged: dict[str, object]
) -> None:
    await one.serve("chat", *BOTH)
    with redis.Redis.from_url(redis_url) as client:
        client.hset(keys.MAP_VERSIONS, "chat", "2")
        client.hset(keys.MAPS, "chat", map_of("chat", (P2, D2), 2).model_copy(update=forged).model_dump_json())
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p1"]
    assert one.groups.named("other") is None
    await one.map("chat", P1, version=3)
    await one.groups.read()
    assert ids(one.group("chat")) == ["p1"]


async def test_a_forged_map_is_believed_only_while_redis_has_it(one: Watched, redis_url: str) -> None:
    """One that cannot be told from a real one does not keep later ones out by a higher version."""
    await one.serve("chat", *BOTH)
    with redis.Redis.from_url(redis_url) as client:
        client.hset(keys.MAP_VERSIONS, "chat", "1000000")
        client.hset(keys.MAPS, "chat", map_of("chat", (), 1000000).model_dump_json())
    await one.groups.read()
    assert ids(one.group("chat")) == []
    await one.map("chat", *BOTH, version=2)
    await one.groups.read()
    assert ids(one.group("chat")) == ["d1", "p1"]


async def test_a_round_without_changes_parses_no_record_and_no_map(
    one: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills = [record(f"p{number}") for number in range(200)]
    decodes = [record(f"d{number}", role="decode") for number in range(100)]
    group = await one.serve("chat", *prefills, *decodes)
    assert len(group.ready("prefill")) == 200
    parsed: list[str] = []
    for kind in (InstanceRecord, GroupMap):
        parse = kind.model_validate_json

        def count(text: str, parse: Callable[[str], object] = parse, name: str = kind.__name__) -> object:
            parsed.append(name)
            return parse(text)

        monkeypatch.setattr(kind, "model_validate_json", count)
    ready, version = group.ready("prefill"), group.version
    one.now += 0.5
    await one.write(*(found.model_copy(update={"heartbeat": 2}) for found in (*prefills, *decodes)))
    await one.groups.read()
    assert parsed == []
    assert group.ready("prefill") is ready
    assert group.version == version
    heartbeat = one.groups.heartbeat("p7")
    assert heartbeat is not None
    assert heartbeat.heartbeat == 2
    await one.write(prefills[7].model_copy(update={"state": "changing"}))
    await one.groups.read()
    assert parsed == ["InstanceRecord"]
    assert len(group.ready("prefill")) == 199


async def test_listeners_hear_of_changes_and_of_nothing_else(one: Watched) -> None:
    group = await one.serve("chat", *BOTH)
    heard: list[int] = []
    group.on_change.append(lambda: heard.append(len(group.ready("prefill"))))
    await one.pass_time(*BOTH)
    assert heard == []
    await one.map("chat", *BOTH, P2, version=2)
    await one.write(P2)
    await one.groups.read()
    assert heard == [2]
    await one.pass_time(P1, D1)
    assert heard == [2, 1]
    await one.write(P1.model_copy(update={"state": "draining"}))
    await one.groups.read()
    assert heard == [2, 1, 0]
    assert group.find("p1") is None
    found = group.find("d1")
    assert found is not None
    assert found.role == "decode"


async def test_a_gateway_reads_only_its_own_groups(
    nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GatewaySettings(model_name="m", watch_groups="chat, default")
    async with watching(nats_url, redis_url, monkeypatch, settings) as one:
        await one.serve("chat", *BOTH)
        await one.serve("chat--2", P2, D2, scenario="chat")
        others = (record("p3"), record("d3", role="decode"))
        await one.write(*others)
        await one.map("code", *others)
        await one.map("default")
        await one.groups.read()
        assert sorted(group.name for group in one.groups.all()) == ["chat", "chat--2", "default"]
        assert one.groups.heartbeat("p3") is None
        assert one.groups.of("code").name == "default"
        one.num_open = {"p3": 1}
        await one.groups.read()
        assert one.groups.heartbeat("p3") is not None


async def test_an_instance_that_nothing_here_depends_on_is_not_watched_any_more(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    await one.map("chat", D1, version=2)
    await one.pass_time(P1, D1)
    assert one.groups.heartbeat("p1") is None
    assert one.lost == []


async def test_one_that_was_found_dead_is_not_asked_until_it_answers_and_its_heart_beats(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    heard: list[str] = []
    one.group("chat").on_change.append(lambda: heard.extend(ids(one.group("chat"))))
    one.groups.mark_lost("p1")
    one.groups.mark_lost("nobody")
    assert ids(one.group("chat")) == ["d1"] == heard
    assert [found.id for found in one.groups.ready("prefill")] == []
    await one.pass_time(*BOTH)
    assert ids(one.group("chat")) == ["d1"], "that its heart beats is not enough: it may be cut off from NATS"
    assert set(one.groups.lost) == {"p1"}
    one.groups.mark_alive("p1")
    assert ids(one.group("chat")) == ["d1", "p1"]
    one.groups.mark_lost("p1")
    one.groups.mark_alive("p1")
    assert ids(one.group("chat")) == ["d1"], "its heart has not beaten since"
    await one.pass_time(*BOTH, seconds=0.5)
    assert ids(one.group("chat")) == ["d1", "p1"]
    assert not one.groups.lost
    assert one.lost == []


@pytest.mark.parametrize("changes", [{"started_at": 7.0}, {"epoch": 2, "state": "changing"}])
async def test_one_that_was_found_dead_is_asked_again_once_it_has_changed(
    one: Watched, changes: dict[str, object]
) -> None:
    await one.serve("chat", *BOTH)
    one.groups.mark_lost("p1")
    await one.write(P1.model_copy(update={**changes, "heartbeat": 2}))
    await one.groups.read()
    assert not one.groups.lost


async def test_what_was_marked_is_forgotten_with_the_instance(one: Watched) -> None:
    await one.serve("chat", *BOTH)
    one.groups.mark_lost("p1")
    await one.pass_time(D1)
    assert one.lost == ["p1"]
    assert set(one.groups.lost) == {"p1"}
    await one.map("chat", D1, version=2)
    await one.registry.remove_instance(P1)
    await one.pass_time(D1)
    assert not one.groups.lost


async def test_a_cache_is_forgotten_when_the_weights_change(one: Watched) -> None:
    group = await one.serve("chat", *BOTH)
    group.affinity.remember("p1", [7])
    await one.write(P1.model_copy(update={"fingerprint": "new", "heartbeat": 2}))
    await one.groups.read()
    assert group.affinity.matched([7]) == {}


async def test_whether_another_group_serves_a_request(one: Watched) -> None:
    chat = await one.serve("chat", *BOTH)
    default = await one.serve("default", P2, D2)
    assert not one.groups.is_served_elsewhere("chat", None, chat)
    await one.write(P1.model_copy(update={"state": "draining"}))
    await one.groups.read()
    assert one.groups.is_served_elsewhere("chat", None, chat)
    assert one.groups.is_served_elsewhere("chat", "f", chat)
    assert not one.groups.is_served_elsewhere("chat", "other weights", chat)
    assert not one.groups.is_served_elsewhere("chat", None, default)
