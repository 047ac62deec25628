"""Which gateways are dead: nobody answers for them, and their heartbeat stands still. Not one that only reconnects."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from nats.aio.subscription import Subscription

from shared import dead_gateways
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.dead_gateways import AbsentGateways, GatewayDeaths
from shared.messages.records import GatewayRecord
from shared.messages.serving import Pong
from shared.registry import registry
from shared.registry.open_answers import OpenAnswer, OpenAnswers
from shared.registry.registry import Registry
from tests.harness import eventually
from tests.system.client import NatsClient, nats_client, next_message

ALIVE = (1.0, 7)


def test_one_without_a_record_is_dead_after_two_pings() -> None:
    gateways = AbsentGateways(1.5)
    assert gateways.update({"g": None}, 10.0) == []
    assert gateways.update({}, 10.5) == [], "it has answered"
    assert gateways.update({"g": None}, 11.0) == []
    assert gateways.update({"g": None}, 11.5) == ["g"]


def test_one_whose_heartbeat_stands_still_is_dead_after_a_while() -> None:
    gateways = AbsentGateways(1.5)
    for tick in range(3):
        assert gateways.update({"g": ALIVE}, 10.0 + tick / 2) == []
    assert gateways.update({"g": ALIVE}, 11.5) == ["g"]


def test_one_whose_heartbeat_moves_only_has_lost_its_connection() -> None:
    gateways = AbsentGateways(1.5)
    for tick in range(100):
        assert gateways.update({"g": (1.0, tick // 2)}, tick / 2) == []
    assert gateways.update({"g": None}, 50.0) == [], "Redis may have lost the record: another ping decides"


def test_a_reader_that_was_away_begins_anew() -> None:
    """Nobody could renew a record while Redis was away."""
    gateways = AbsentGateways(1.5)
    for tick in range(3):
        gateways.update({"g": ALIVE, "h": None}, 10.0 + tick / 2)
    assert gateways.update({"g": ALIVE, "h": None}, 12.5) == []
    assert gateways.update({"g": ALIVE, "h": None}, 13.0) == ["h"]


def gateway_record(heartbeat: int) -> GatewayRecord:
    return GatewayRecord(
        id="other",
        pid=1,
        host="h",
        version="1",
        started_at=1.0,
        heartbeat=heartbeat,
        address="http://127.0.0.1:1",
        open_requests=1,
        waiting_requests=0,
    )


@dataclass
class World:
    """A gateway that watches, and another one that owes an answer and has no connection to NATS."""

    deaths: GatewayDeaths
    bus: Bus
    records: Registry
    client: NatsClient
    answer: Subscription

    async def checks(self, number: int) -> None:
        for _ in range(number):
            await self.deaths.check()
            await asyncio.sleep(0.02)


@pytest.fixture
async def world(nats_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(dead_gateways, "MIN_SILENT_S", 0.3)
    async with (
        registry.connect(redis_url, ttl_s=60.0, timeout_s=5.0) as records,
        connection.connect(nats_url, name="g", timeout_s=5.0) as bus,
        nats_client(nats_url) as client,
    ):
        inbox = client.connection.new_inbox()
        answer = await client.connection.subscribe(inbox)
        await client.connection.flush()
        owed = OpenAnswers(records, "other")
        owed.add("key", OpenAnswer(inbox=inbox, id="mine"))
        await owed.flush()
        deaths = GatewayDeaths(bus, records, OpenAnswers(records, "g"), "g", heartbeat_s=0.01)
        yield World(deaths, bus, records, client, answer)


async def test_a_gateway_that_only_reconnects_keeps_its_clients(world: World) -> None:
    for number in range(20):
        await world.records.write_gateway(gateway_record(number))
        await world.checks(2)
    await world.client.connection.flush()
    assert world.answer.pending_msgs == 0

    async def has_ended() -> bool:
        await world.deaths.check()
        return world.answer.pending_msgs > 0

    await eventually(has_ended)
    message = await next_message(world.answer)
    assert (message["type"], message["id"], message["index"]) == ("error", "mine", -1)


async def test_a_gateway_that_answers_is_alive_whatever_redis_has(world: World) -> None:
    async def answers(incoming: Incoming) -> None:
        await incoming.respond(Pong())

    await world.bus.subscribe(subjects.gateway("other", "ping"), answers)
    await world.checks(20)
    await world.client.connection.flush()
    assert world.answer.pending_msgs == 0
