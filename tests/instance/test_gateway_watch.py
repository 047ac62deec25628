"""Pings between an instance and gateways on a real bus."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.instance.gateway_watch import GatewayWatch
from shared.messages.serving import Ping, Pong
from tests.harness import eventually


class Held:
    """What an instance holds for gateways."""

    def __init__(self, **by_gateway: list[str]) -> None:
        self.by_gateway = by_gateway
        self.released: list[str] = []

    def unchanged(self) -> dict[str, list[str]]:
        return dict(self.by_gateway)

    def release_gateway(self, gateway_id: str) -> None:
        self.released.append(gateway_id)
        del self.by_gateway[gateway_id]

    def release_requests(self, request_ids: list[str]) -> None:
        self.released += request_ids
        for ids in self.by_gateway.values():
            ids[:] = [one for one in ids if one not in request_ids]


class Gateway:
    """Answers pings unless it hangs; knows the requests in `known`."""

    def __init__(self, *known: str) -> None:
        self.known = known
        self.hangs = False
        self.pings: list[Ping] = []

    async def handle(self, incoming: Incoming) -> None:
        ping = incoming.parse(Ping)
        self.pings.append(ping)
        if not self.hangs:
            await incoming.respond(Pong(unknown=[one for one in ping.request_ids if one not in self.known]))


@asynccontextmanager
async def watching(nats_url: str, held: Held) -> AsyncIterator[GatewayWatch]:
    async with connection.connect(nats_url, name="i", timeout_s=5.0) as bus, asyncio.TaskGroup() as tasks:
        watch = GatewayWatch(bus, "i", held, tasks)
        running = tasks.create_task(watch.run())
        yield watch
        running.cancel()


@asynccontextmanager
async def gateway_bus(nats_url: str, gateway_id: str, gateway: Gateway) -> AsyncIterator[Bus]:
    async with connection.connect(nats_url, name=gateway_id, timeout_s=5.0) as bus:
        await bus.subscribe(subjects.gateway(gateway_id, ">"), gateway.handle)
        yield bus


async def test_a_gateway_that_has_died_loses_its_requests_and_no_other_does(nats_url: str) -> None:
    held = Held(dies=["a"], lives=["b"])
    dies, lives = Gateway("a"), Gateway("b")
    async with gateway_bus(nats_url, "lives", lives), watching(nats_url, held):
        async with gateway_bus(nats_url, "dies", dies):
            await eventually(lambda: len(dies.pings) >= 2 and len(lives.pings) >= 2)
            assert held.released == []
        await eventually(lambda: held.released == ["dies"])
        num_pings = len(lives.pings)
        await eventually(lambda: len(lives.pings) > num_pings + 1)
        assert held.released == ["dies"]


async def test_a_report_that_it_is_gone_is_a_reason_to_ask_it_at_once(nats_url: str) -> None:
    """Forged or not, and once only however often it is reported."""
    held = Held(lives=["b"])
    lives = Gateway("b")
    async with gateway_bus(nats_url, "lives", lives), watching(nats_url, held) as watch:
        for _ in range(10):
            watch.ping_now("lives")
            watch.ping_now("stranger")
        await eventually(lambda: lives.pings)
        assert len(lives.pings) == 1
        assert held.released == []


async def test_a_gateway_that_hangs_keeps_its_requests(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.instance.gateway_watch.PING_TIMEOUT_S", 0.1)
    held = Held(hangs=["a"])
    hangs = Gateway("a")
    hangs.hangs = True
    async with gateway_bus(nats_url, "hangs", hangs), watching(nats_url, held):
        await eventually(lambda: len(hangs.pings) >= 3)
        assert held.released == []


async def test_requests_that_a_gateway_does_not_know_are_released(nats_url: str) -> None:
    held = Held(lives=["known", "unknown"])
    async with gateway_bus(nats_url, "lives", Gateway("known")), watching(nats_url, held):
        await eventually(lambda: held.released == ["unknown"])
        assert held.by_gateway == {"lives": ["known"]}
