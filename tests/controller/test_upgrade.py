"""An upgrade step by step, over instances that only follow orders, and real maps."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from services.controller.maps import LeadLost
from services.controller.policy.upgrade import ImpossibleUpgrade
from services.controller.upgrade import Upgrade
from services.controller.workflows import Workflows
from shared.errors import RegistryUnavailable
from shared.messages.records import InstanceRecord, Role
from tests.controller.fleet import Fleet, fleet
from tests.controller.world import serving, spare
from tests.harness import eventually

OLD, NEW = "old", "new"


@dataclass
class Upgraded:
    """A group chat of instances with old weights, and an upgrade of it."""

    made: Fleet
    is_paused: list[bool] = field(default_factory=list)

    async def add(self, *names: str, **wishes: Any) -> None:
        """p1, d1, ... are members, s1, ... spares."""
        for name in names:
            role: Role | None = {"p": "prefill", "d": "decode"}.get(name[0])  # type: ignore[assignment]
            if role is None:
                await self.made.add(spare(name, model_path=OLD, fingerprint=OLD), **wishes)
                continue
            record = serving(name, role, model_path=OLD, fingerprint=OLD)
            await self.made.add(record, **wishes)
            await self.made.maps.add("chat", record)

    def upgrade(self) -> Upgrade:
        brain = SimpleNamespace(
            cluster=self.made.cluster,
            workflows=self.made.workflows,
            decisions=self.made.decisions,
            spares=self.spares,
            is_paused=False,
        )
        return Upgrade(brain, self.made.maps, NEW)  # type: ignore[arg-type]

    def spares(self) -> list[InstanceRecord]:
        return sorted((one for one in self.made.cluster.alive.values() if one.state == "spare"), key=lambda one: one.id)

    def models(self) -> dict[str, str]:
        return {one.id: one.model_path for one in self.made.cluster.alive.values()}

    def members(self) -> set[str]:
        return {one.instance_id for one in self.made.cluster.maps["chat"].members}

    async def run(self) -> str:
        upgrade = self.upgrade()
        upgrade.refuse_impossible()
        async with asyncio.timeout(30.0):
            await upgrade.run()
        assert not upgrade.is_running
        return upgrade.status()


@asynccontextmanager
async def upgraded(nats_url: str, redis_url: str) -> AsyncIterator[Upgraded]:
    async with fleet(nats_url, redis_url) as made:
        yield Upgraded(made)


async def test_all_get_the_new_model_and_so_does_the_group(nats_url: str, redis_url: str) -> None:
    async with upgraded(nats_url, redis_url) as one:
        await one.add("p1", "p2", "d1", "d2")
        assert "done, 4 instances" in await one.run()
        assert set(one.models().values()) == {NEW}
        assert one.members() == {"p1", "p2", "d1", "d2"}
        group = one.made.cluster.maps["chat"]
        assert (group.model_path, group.next_model_path) == (NEW, None)


async def test_spares_that_stood_in_are_spares_again(nats_url: str, redis_url: str) -> None:
    async with upgraded(nats_url, redis_url) as one:
        await one.add("p1", "d1")
        with pytest.raises(ImpossibleUpgrade):
            one.upgrade().refuse_impossible()
        await one.add("s1", "s2")
        assert "done, 4 instances" in await one.run()
        assert one.members() == {"p1", "d1"}
        assert {record.id for record in one.spares()} == {"s1", "s2"}


async def test_one_that_is_lost_before_its_turn_stops_nothing(nats_url: str, redis_url: str) -> None:
    async with upgraded(nats_url, redis_url) as one:
        await one.add("p1", "p2", "d1", "d2", "d3")

        def lose(order: object) -> None:
            one.made.instances["d3"].is_alive = False

        one.made.instances["p1"].before_order = lose
        said = await one.run()
        assert "done" in said, said
        await eventually(lambda: "d3" not in one.made.cluster.alive)
        assert set(one.models().values()) == {NEW}


async def test_one_that_is_lost_while_it_loads_stops_nothing(nats_url: str, redis_url: str) -> None:
    async with upgraded(nats_url, redis_url) as one:
        await one.add("p1", "p2", "p3", "d1", "d2")
        await one.add("d3", dies_changing=True)
        said = await one.run()
        assert "done" in said, said
        assert set(one.models().values()) == {NEW}


async def test_a_model_that_does_not_load_leaves_nothing_behind(nats_url: str, redis_url: str) -> None:
    async with upgraded(nats_url, redis_url) as one:
        await one.add("p1", "d1", "d2")
        await one.add("p2", problems=["no such folder"])
        await one.made.maps.want_model("chat", OLD)
        said = await one.run()
        assert "stopped" in said
        assert "no such folder" in said
        assert set(one.models().values()) == {OLD}
        assert one.members() == {"p1", "p2", "d1", "d2"}
        group = one.made.cluster.maps["chat"]
        assert (group.model_path, group.next_model_path) == (OLD, None)


async def test_another_leader_is_left_to_go_on(nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with upgraded(nats_url, redis_url) as one:
        await one.add("p1", "p2", "d1", "d2")

        async def lost(self: Workflows, instance_id: str, *args: Any, **wishes: Any) -> None:
            raise LeadLost("another leads")

        with monkeypatch.context() as patched:
            patched.setattr(Workflows, "assign", lost)
            assert "left to the next leader" in await one.run()
        assert one.made.maps.next_model() == NEW
        assert "done, 4 instances" in await one.run()


async def test_while_redis_is_away_it_waits(nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with upgraded(nats_url, redis_url) as one:
        await one.add("p1", "p2", "d1", "d2")
        assign, times = Workflows.assign, iter([True, True])

        async def away(self: Workflows, instance_id: str, *args: Any, **wishes: Any) -> None:
            if next(times, False):
                raise RegistryUnavailable("Redis is away")
            await assign(self, instance_id, *args, **wishes)

        monkeypatch.setattr(Workflows, "assign", away)
        assert "done, 4 instances" in await one.run()
