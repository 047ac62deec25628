"""A client's inbox over a real NATS server: what a restart swallows comes again; a client that went is noticed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import pytest

from pdserve.servers import Servers
from shared.bus import connection, reply_inbox
from shared.bus.connection import Bus, Incoming
from shared.bus.reply_inbox import ReplyInbox
from shared.errors import MessageTooLarge
from shared.messages.generate_api import GenerateChunk
from tests.harness import eventually, free_port

INBOX = "_INBOX.client"


class Sender:
    """An inbox, and what became of it."""

    def __init__(self, bus: Bus, inbox: ReplyInbox) -> None:
        self.bus = bus
        self.inbox = inbox
        self.gone = asyncio.Event()

    async def send(self, count: int) -> None:
        for _ in range(count):
            index = self.inbox.index
            await self.inbox.send(GenerateChunk(id="r", index=index, text=str(index), token_ids=[]))


@asynccontextmanager
async def sender(nats_url: str) -> AsyncIterator[Sender]:
    async with connection.connect(nats_url, name="g", timeout_s=5.0) as bus:
        made = Sender(bus, ReplyInbox(bus, INBOX, "reported.r", lambda: made.gone.set()))

        async def on_report(incoming: Incoming) -> None:
            if incoming.is_no_responders:
                made.inbox.on_no_responders(int(incoming.subject.rsplit(".", 1)[1]))

        await bus.subscribe("reported.>", on_report)
        bus.on_reconnect(lambda: made.inbox.bus_reconnected())
        try:
            yield made
        finally:
            made.inbox.close()


@asynccontextmanager
async def listening(nats_url: str) -> AsyncIterator[list[int]]:
    """A client at the inbox, and the indices that it has received."""
    heard: list[int] = []

    async def hear(incoming: Incoming) -> None:
        heard.append(incoming.parse(GenerateChunk).index)

    async with connection.connect(nats_url, name="client", timeout_s=5.0) as bus:
        await bus.subscribe(INBOX, hear)
        yield heard


async def test_a_restart_of_the_bus_loses_a_slow_client_nothing(servers: Servers) -> None:
    """The client comes back later than the gateway, as nats clients do by default."""
    port = free_port()
    url = servers.start_nats(port)
    heard: list[int] = []

    async def hear(message: nats.aio.msg.Msg) -> None:
        heard.append(json.loads(message.data)["index"])

    client = await nats.connect(url, reconnect_time_wait=2)
    await client.subscribe(INBOX, cb=hear)
    await client.flush()
    async with sender(url) as one:
        await one.send(10)
        await eventually(lambda: len(heard) == 10)
        servers.processes["nats"].kill()
        servers.processes["nats"].wait()
        await one.send(5)
        servers.start_nats(port)
        await one.send(5)
        await eventually(lambda: set(heard) == set(range(20)))
        assert list(dict.fromkeys(heard)) == list(range(20)), "messages come in order, if perhaps twice"
        assert not one.gone.is_set()
    await client.close()


async def test_a_client_that_went_is_noticed_at_once(nats_url: str) -> None:
    async with sender(nats_url) as one:
        await one.send(1)
        await eventually(one.gone.is_set)


async def test_a_client_that_does_not_return_is_considered_gone(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_inbox, "CLIENT_RETURNS_S", 0.5)
    monkeypatch.setattr(reply_inbox, "SEND_AGAIN_S", 0.1)
    port = free_port()
    async with sender(servers.start_nats(port)) as one:
        servers.processes["nats"].kill()
        servers.processes["nats"].wait()
        await one.send(1)
        servers.start_nats(port)
        await eventually(one.gone.is_set)


async def test_what_was_received_is_not_kept(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer takes the memory of its last seconds alone."""
    monkeypatch.setattr(reply_inbox, "IN_FLIGHT_S", 0.05)
    async with listening(nats_url) as heard, sender(nats_url) as one:
        for _ in range(20):
            await one.send(10)
            await asyncio.sleep(0.02)
        assert one.inbox.num_kept < 100
        await eventually(lambda: heard == list(range(200)))
        await eventually(lambda: one.inbox.is_settled)
        assert one.inbox.num_kept == 0
        assert one.inbox.index == 200


async def test_while_the_bus_is_away_everything_is_kept(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is away: what was on its way when the connection broke, and what was sent since."""
    monkeypatch.setattr(reply_inbox, "IN_FLIGHT_S", 0.05)
    port = free_port()
    url = servers.start_nats(port)
    async with listening(url) as heard, sender(url) as one:
        await one.send(5)
        servers.processes["nats"].kill()
        servers.processes["nats"].wait()
        await eventually(lambda: not one.bus.connected)
        await one.send(5)
        await asyncio.sleep(0.2)
        await one.send(5)
        assert one.inbox.num_kept >= 10
        servers.start_nats(port)
        await eventually(lambda: set(heard) >= set(range(15)))
        await one.send(1)
        await eventually(lambda: 15 in heard)
        await eventually(lambda: one.inbox.is_settled)


async def test_a_message_that_is_too_large_leaves_its_index_to_the_next(nats_url: str) -> None:
    async with listening(nats_url) as heard, sender(nats_url) as one:
        await one.send(1)
        with pytest.raises(MessageTooLarge):
            await one.inbox.send(GenerateChunk(id="r", index=1, text="x" * one.bus.max_payload, token_ids=[]))
        await one.send(1)
        await eventually(lambda: heard == [0, 1])


async def test_closing_ends_sending_again(servers: Servers) -> None:
    port = free_port()
    async with sender(servers.start_nats(port)) as one:
        await one.send(1)
        one.inbox.bus_reconnected()
        assert one.inbox._is_resending
        one.inbox.close()
        await eventually(lambda: not one.inbox._is_resending)
        one.inbox.on_no_responders(0)
        one.inbox.bus_reconnected()
        assert not one.inbox._is_resending
        assert not one.gone.is_set()


async def test_a_report_of_an_old_or_absurd_message_is_no_error(nats_url: str) -> None:
    async with listening(nats_url) as heard, sender(nats_url) as one:
        await one.send(3)
        one.inbox.bus_reconnected()
        for index in (-5, 0, 10**9):
            one.inbox.on_no_responders(index)
        await eventually(lambda: set(heard) == {0, 1, 2} and len(heard) >= 6)
