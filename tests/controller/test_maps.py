"""Writing maps under a lease and announcing them, with a real NATS and a real Valkey."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import pytest
import redis

from pdserve.servers import Servers
from services.controller import maps as maps_module
from services.controller.cluster import Cluster
from services.controller.maps import GroupGone, LeadLost, Maps
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import RegistryUnavailable
from shared.groups import GroupSpec
from shared.messages.records import GroupMap
from shared.messages.serving import Message
from shared.registry import keys, registry
from shared.registry.registry import Lead, Registry
from tests.controller.world import map_of, member, serving
from tests.harness import eventually

CHAT = GroupSpec(name="chat", scenario="talk", ttft_ms=2000, tpot_ms=100)
CODE = GroupSpec(name="code")
P1, P2, D1 = serving("p1", "prefill"), serving("p2", "prefill"), serving("d1", "decode", epoch=4)


@dataclass
class Desk:
    """A leader's pen, and what is announced."""

    bus: Bus
    records: Registry
    lead: Lead | None = None
    announced: list[GroupMap] = field(default_factory=list)
    """The map that was last written before each announcement, which itself has no content."""
    unannounced: deque[GroupMap] = field(default_factory=deque)
    markers: set[str] = field(default_factory=set)
    cluster: Cluster = field(default_factory=lambda: Cluster(2.0))

    def __post_init__(self) -> None:
        self.maps = Maps(self.cluster, self.records, self.bus, lambda: self.lead)
        write = self.records.write_map

        async def write_map(lead: Lead, new: GroupMap) -> bool:
            is_written = await write(lead, new)
            if is_written:
                self.unannounced.append(new)
            return is_written

        self.records.write_map = write_map  # type: ignore[method-assign]

    async def hear(self, incoming: Incoming) -> None:
        if incoming.subject == subjects.CHANGED:
            incoming.parse(Message)
            self.announced.append(self.unannounced.popleft())
        else:
            self.markers.add(incoming.subject)

    async def take_the_lead(self, controller_id: str = "one") -> Lead:
        self.lead = await self.records.lead(controller_id, 60.0)
        assert self.lead is not None
        return self.lead

    async def all_announced(self) -> list[GroupMap]:
        """All that has been announced so far, once."""
        marker = subjects.admin(f"marker-{time.monotonic_ns()}")
        await self.bus.publish(marker, Message())
        await eventually(lambda: marker in self.markers)
        assert not self.unannounced, "every map that is written is announced"
        found = list(self.announced)
        self.announced.clear()
        return found

    async def written(self) -> dict[str, GroupMap]:
        return {one.name: one for one in await self.records.maps()}

    def ids(self, name: str) -> list[str]:
        return [one.instance_id for one in self.cluster.maps[name].members]


@asynccontextmanager
async def desk(nats_url: str, redis_url: str) -> AsyncIterator[Desk]:
    async with (
        connection.connect(nats_url, name="c", timeout_s=5.0) as bus,
        registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records,
    ):
        made = Desk(bus, records)
        await bus.subscribe(f"{subjects.PREFIX}.>", made.hear)
        await made.take_the_lead()
        yield made


async def test_every_change_is_written_and_announced_under_the_lease(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        lead = one.lead
        assert lead is not None
        await one.maps.declare(CHAT)
        await one.maps.add("chat", P1)
        await one.maps.add("chat", D1)
        await one.maps.want_model("chat", "new")
        await one.maps.remove(["p1", "nobody"])
        announced = await one.all_announced()
        assert [[known.instance_id for known in step.members] for step in announced] == [
            [],
            ["p1"],
            ["p1", "d1"],
            ["p1", "d1"],
            ["d1"],
        ]
        last = announced[-1]
        assert last.model_copy(update={"version": 0}) == map_of(
            "chat", D1, scenario="talk", version=0, term=lead.term, ttft_s=2.0, tpot_s=0.1, model_path="new"
        )
        assert await one.written() == one.cluster.maps == {"chat": last}
        assert one.maps.term() == lead.term


async def test_a_group_that_is_founded_has_the_model_of_its_founder(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.want_model("chat", "new")
        await one.maps.plan_model("newer")
        assert one.maps.next_model() == "newer"
        for name, founder in (("chat--2", "chat"), ("other", "other")):
            await one.maps.declare(CHAT.model_copy(update={"name": name}), founder=founder)
        maps = await one.written()
        assert (maps["chat--2"].model_path, maps["chat--2"].next_model_path) == ("new", "newer")
        assert (maps["other"].model_path, maps["other"].next_model_path) == (None, None)
        await one.maps.declare(CHAT, founder="other")
        assert (await one.written())["chat"].model_path == "new", "only a new group has a founder"
        await one.maps.plan_model(None)
        assert one.maps.next_model() is None


async def test_versions_grow_whatever_the_clock_says(
    nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(nats_url, redis_url) as one:
        for now in (2_000.0, 2_000.0, 1_000.0, 3_000.0):
            monkeypatch.setattr(maps_module, "time", SimpleNamespace(time=lambda now=now: now))
            await one.maps.want_model("chat", "m") if one.cluster.maps else await one.maps.declare(CHAT)
        versions = [step.version for step in await one.all_announced()]
        assert versions == [2_000_000, 2_000_001, 2_000_002, 3_000_000]


async def test_versions_grow_from_one_leader_to_the_next(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        first = one.lead
        assert first is not None
        await one.records.resign(first)
        second = await one.take_the_lead("two")
        await one.maps.add("chat", P1)
        before, after = await one.all_announced()
        assert after.version > before.version
        assert (before.term, after.term) == (first.term, second.term)


async def test_what_is_declared_already_is_not_written_again(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.add("chat", P1)
        await one.all_announced()
        await one.maps.declare(CHAT)
        await one.maps.remove(["nobody"])
        await one.maps.restore()
        assert await one.all_announced() == []


async def test_other_objectives_are_announced_and_members_stay(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.add("chat", P1)
        await one.maps.declare(CHAT.model_copy(update={"tpot_ms": 50.0}))
        await one.maps.declare(CHAT, finds_scenarios=True)
        third, fourth = (await one.all_announced())[2:]
        assert (third.tpot_s, third.finds_scenarios, third.members) == (0.05, False, (member(P1),))
        assert (fourth.tpot_s, fourth.finds_scenarios, fourth.members) == (0.1, True, (member(P1),))


async def test_a_member_that_comes_again_is_there_once_as_what_it_is_now(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.add("chat", P1)
        await one.maps.add("chat", P1.model_copy(update={"role": "decode", "epoch": 2, "kv_port": 7}))
        [found] = one.cluster.maps["chat"].members
        assert (found.role, found.epoch, found.kv_port) == ("decode", 2, 7)


async def test_instances_leave_whichever_map_has_them(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.declare(CODE)
        await one.maps.add("chat", P1)
        await one.maps.add("code", P2)
        await one.maps.add("code", D1)
        await one.maps.remove(["p1", "d1"])
        assert (one.ids("chat"), one.ids("code")) == ([], ["p2"])
        assert await one.written() == one.cluster.maps


async def test_changes_at_the_same_time_are_all_kept(nats_url: str, redis_url: str) -> None:
    """Workflows run beside each other, and each changes what it finds."""
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        ids = [f"p{number}" for number in range(8)]
        await asyncio.gather(*(one.maps.add("chat", serving(name, "prefill")) for name in ids))
        assert one.ids("chat") == ids
        news = [one.maps.add("chat", D1), one.maps.want_model("chat", "new")]
        await asyncio.gather(*(one.maps.remove([name]) for name in ids[:4]), *news, one.maps.remove(ids[6:]))
        assert one.ids("chat") == ["p4", "p5", "d1"]
        assert one.cluster.maps["chat"].model_path == "new"
        assert await one.written() == one.cluster.maps
        versions = [step.version for step in await one.all_announced()]
        assert all(before < after for before, after in pairwise(versions))


async def test_a_group_that_is_forgotten(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.declare(CODE)
        await one.maps.forget("chat")
        await one.maps.forget("nobody")
        assert list(one.cluster.maps) == ["code"]
        assert await one.written() == one.cluster.maps
        with pytest.raises(GroupGone, match="group chat is no more"):
            await one.maps.add("chat", P1)
        with pytest.raises(GroupGone, match="group chat is no more"):
            await one.maps.want_model("chat", "new")
        await one.maps.restore()
        assert list(await one.written()) == ["code"]


CHANGES: dict[str, Callable[[Maps], Awaitable[None]]] = {
    "declare": lambda maps: maps.declare(CODE),
    "declare otherwise": lambda maps: maps.declare(CHAT, finds_scenarios=True),
    "add": lambda maps: maps.add("chat", D1),
    "remove": lambda maps: maps.remove(["p1"]),
    "want a model": lambda maps: maps.want_model("chat", "new"),
    "forget": lambda maps: maps.forget("chat"),
    "restore": lambda maps: maps.restore(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lost", ["another leads", "it ran out", "our clock says so"])
async def test_who_leads_no_more_writes_and_announces_nothing(
    nats_url: str, redis_url: str, change: str, lost: str
) -> None:
    """Whether we know that already, or Redis has to tell us."""
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.add("chat", P1)
        known = dict(one.cluster.maps)
        if change == "restore":
            with redis.Redis.from_url(redis_url) as client:
                client.delete(keys.MAPS)
        written = await one.written()
        await one.all_announced()
        assert one.lead is not None
        await one.records.resign(one.lead)
        if lost == "another leads":
            assert await one.records.lead("two", 60.0) is not None
        elif lost == "our clock says so":
            one.lead = None
        with pytest.raises(LeadLost):
            await CHANGES[change](one.maps)
        assert await one.all_announced() == []
        assert await one.written() == written
        assert one.cluster.maps == known


async def test_without_a_lease_there_is_no_term(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        one.lead = None
        with pytest.raises(LeadLost):
            one.maps.term()


async def test_maps_that_redis_has_lost_are_written_again(nats_url: str, redis_url: str) -> None:
    """By whoever leads after it lost the lease too; its term and the versions are higher."""
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.declare(CODE)
        await one.maps.add("chat", P1)
        before, first = dict(one.cluster.maps), one.lead
        await one.all_announced()
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        assert first is not None
        await eventually(lambda: int(time.time() * 1000) > first.term)  # terms are milliseconds
        await one.take_the_lead()
        await one.cluster.read(one.records)
        assert one.cluster.maps == before
        await one.maps.restore()
        after = await one.written()
        assert after == one.cluster.maps
        assert {step.name: step for step in await one.all_announced()} == after
        for name, known in before.items():
            assert after[name].version > known.version
            assert after[name].term > known.term
            assert after[name].members == known.members


async def test_one_lost_map_is_written_again_alone(nats_url: str, redis_url: str) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        await one.maps.declare(CODE)
        await one.all_announced()
        with redis.Redis.from_url(redis_url) as client:
            client.hdel(keys.MAPS, "code")
        await one.maps.restore()
        assert [step.name for step in await one.all_announced()] == ["code"]


@pytest.mark.parametrize("forged", [{"version": 2**62}, {"term": 2**62}, {"version": 5}])
async def test_a_map_that_another_program_has_written_is_replaced(
    nats_url: str, redis_url: str, forged: dict[str, object]
) -> None:
    async with desk(nats_url, redis_url) as one:
        await one.maps.declare(CHAT)
        [known] = await one.all_announced()
        with redis.Redis.from_url(redis_url) as client:
            client.hset(keys.MAPS, "chat", known.model_copy(update=forged).model_dump_json())
            client.hset(keys.MAP_VERSIONS, "chat", str(forged.get("version", known.version)))
        await one.maps.restore()
        [again] = await one.all_announced()
        assert again.version > known.version
        assert await one.records.maps() == [again]


async def test_while_redis_is_away_nothing_changes(servers: Servers) -> None:
    async with desk(servers.start_nats(), servers.start_redis()) as one:
        await one.maps.declare(CHAT)
        await one.maps.add("chat", P1)
        await one.all_announced()
        known = dict(one.cluster.maps)
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        for change in CHANGES.values():
            with pytest.raises(RegistryUnavailable):
                await change(one.maps)
        assert await one.all_announced() == []
        assert one.cluster.maps == known
