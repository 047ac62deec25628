"""Instances from elsewhere: asked for, waited for, given back; and the asking over a real bus."""

from dataclasses import dataclass, field

import pytest

from services.controller import provisioning
from services.controller.provisioning import ASK_EVERY_S, IDLE_S, STARTING_S, BusProvisioner, Provisioning
from shared.bus import connection, subjects
from shared.bus.connection import Incoming
from shared.messages.control import Provision, Provisioned
from tests.controller.world import spare


@dataclass
class Fake:
    """Notes what it is asked for, and can start so many."""

    room: int = 9
    started: list[int] = field(default_factory=list)
    ended: list[list[tuple[str, int]]] = field(default_factory=list)

    async def start(self, number: int) -> int:
        self.started.append(number)
        return min(number, self.room)

    async def end(self, processes: list[tuple[str, int]]) -> None:
        self.ended.append(processes)


SPARE = spare("s1", pid=11)
ON_DEMAND = spare("s2", pid=22, on_demand=True)


async def test_what_is_lacking_beyond_the_spares_is_asked_for() -> None:
    fake = Fake()
    asking = Provisioning(fake)
    assert await asking.follow(0, [], 0.0) == 0
    assert await asking.follow(2, [SPARE, ON_DEMAND], 1.0) == 0
    assert await asking.follow(3, [SPARE], 2.0) == 2
    assert fake.started == [2]
    assert fake.ended == []


async def test_what_was_asked_for_is_waited_for() -> None:
    fake = Fake()
    asking = Provisioning(fake)
    assert await asking.follow(3, [], 10.0) == 3
    assert await asking.follow(3, [], 10.25) == 0
    assert await asking.follow(3, [SPARE], 9.9 + ASK_EVERY_S) == 0
    assert await asking.follow(3, [SPARE], 10.0 + ASK_EVERY_S) == 0
    assert await asking.follow(5, [SPARE], 10.5 + ASK_EVERY_S) == 1
    assert fake.started == [3, 1]


async def test_who_does_not_come_is_waited_for_no_longer() -> None:
    fake = Fake()
    asking = Provisioning(fake)
    assert await asking.follow(2, [], 0.0) == 2
    assert await asking.follow(2, [ON_DEMAND], 100.0) == 0
    assert await asking.follow(2, [ON_DEMAND], 1.0 + STARTING_S) == 1


async def test_who_starts_them_says_how_many_can_be() -> None:
    assert await Provisioning(Fake(room=1)).follow(3, [], 0.0) == 1
    assert await Provisioning(Fake(room=0)).follow(3, [], 0.0) == 0


async def test_those_on_demand_that_were_idle_for_long_are_given_back() -> None:
    fake = Fake()
    asking = Provisioning(fake)
    later = spare("s3", pid=33, on_demand=True)
    await asking.follow(0, [SPARE, ON_DEMAND], 0.0)
    await asking.follow(0, [SPARE, ON_DEMAND, later], IDLE_S)
    assert fake.ended == []
    await asking.follow(0, [SPARE, ON_DEMAND, later], IDLE_S + 0.25)
    assert fake.ended == [[("h", 22)]]
    await asking.follow(0, [SPARE, later], 2 * IDLE_S + 0.25)
    assert fake.ended == [[("h", 22)], [("h", 33)]]


async def test_one_that_had_a_place_meanwhile_begins_anew() -> None:
    fake = Fake()
    asking = Provisioning(fake)
    await asking.follow(0, [ON_DEMAND], 0.0)
    await asking.follow(0, [], 30.0)
    await asking.follow(0, [ON_DEMAND], 40.0)
    await asking.follow(0, [ON_DEMAND], 40.0 + IDLE_S)
    assert fake.ended == []
    await asking.follow(0, [ON_DEMAND], 40.25 + IDLE_S)
    assert fake.ended == [[("h", 22)]]


async def test_none_is_given_back_while_a_place_is_vacant() -> None:
    fake = Fake()
    asking = Provisioning(fake)
    await asking.follow(0, [ON_DEMAND], 0.0)
    await asking.follow(1, [ON_DEMAND], 2 * IDLE_S)
    assert (fake.started, fake.ended) == ([], [])


async def test_wishes_go_over_the_bus(nats_url: str) -> None:
    heard: list[Provision] = []

    async def answer(incoming: Incoming) -> None:
        heard.append(incoming.parse(Provision))
        await incoming.respond(Provisioned(started=heard[-1].start - 1, capacity=0))

    async with connection.connect(nats_url, name="c", timeout_s=5.0) as bus:
        stop = await bus.subscribe(subjects.PROVISION, answer)
        asking = BusProvisioner(bus)
        assert await asking.start(3) == 2
        await asking.end([("h", 7), ("h", 8)])
        assert heard == [Provision(start=3), Provision(end=[("h", 7), ("h", 8)])]
        await stop()


async def test_where_nobody_listens_or_answers_nothing_is_started(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def say_nothing(incoming: Incoming) -> None:
        pass

    monkeypatch.setattr(provisioning, "TIMEOUT_S", 0.05)
    async with connection.connect(nats_url, name="c", timeout_s=5.0) as bus:
        asking = BusProvisioner(bus)
        assert await asking.start(3) == 0
        await asking.end([("h", 7)])
        await bus.subscribe(subjects.PROVISION, say_nothing)
        assert await asking.start(3) == 0
