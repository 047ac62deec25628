"""A client's inbox over a real NATS server: what a restart swallows comes again; a client that went is noticed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import pytest

from pdserve.servers import Servers
from shared.bus import connection, reply_inbox
from shared.bus.connection import Incoming
from shared.bus.reply_inbox import ReplyInbox
from shared.messages.generate_api import GenerateChunk
from tests.harness import eventually, free_port


class Sender:
    """An inbox, and what became of it."""

    def __init__(self, inbox: ReplyInbox) -> None:
        self.inbox = inbox
        self.gone = asyncio.Event()

    async def send(self, count: int) -> None:
        for _ in range(count):
            index = self.inbox.index
            await self.inbox.send(GenerateChunk(id="r", index=index, text=str(index), token_ids=[]))


@asynccontextmanager
async def sender(nats_url: str) -> AsyncIterator[Sender]:
    async with connection.connect(nats_url, name="g", timeout_s=5.0) as bus:
        made = Sender(ReplyInbox(bus, "inbox", "reported.r", lambda: made.gone.set()))

        async def on_report(incoming: Incoming) -> None:
            if incoming.is_no_responders:
                made.inbox.on_no_responders(int(incoming.subject.rsplit(".", 1)[1]))

        await bus.subscribe("reported.>", on_report)
        bus.on_reconnect(lambda: made.inbox.bus_reconnected())
        try:
            yield made
        finally:
            made.inbox.close()


async def test_a_restart_of_the_bus_loses_a_slow_client_nothing(servers: Servers) -> None:
    """The client comes back later than the gateway, as nats clients do by default."""
    port = free_port()
    url = servers.start_nats(port)
    heard: list[int] = []

    async def hear(message: nats.aio.msg.Msg) -> None:
        heard.append(json.loads(message.data)["index"])

    client = await nats.connect(url, reconnect_time_wait=2)
    await client.subscribe("inbox", cb=hear)
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
