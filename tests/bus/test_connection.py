"""The bus on a real NATS server: typed messages, headers, who is told what, and a restart of the server."""

import asyncio
import random

import pytest
from pydantic import BaseModel

from pdserve.servers import Servers
from shared.bus import connection
from shared.bus.connection import Bus, Incoming
from shared.errors import BusUnavailable, InvalidRequest, MessageTooLarge, NoResponders, PeerUnavailable
from shared.messages.serving import AskReply, Cancel
from tests.harness import eventually, free_port


class Text(BaseModel):
    text: str


class Note(BaseModel):
    number: int


async def test_a_request_gets_a_typed_answer(nats_url: str) -> None:
    heard: list[Incoming] = []

    async def answer(incoming: Incoming) -> None:
        heard.append(incoming)
        await incoming.respond(AskReply(accepted=False, reason="no_slot"))

    async with connection.connect(nats_url, name="a", timeout_s=5.0) as bus:
        await bus.subscribe("there", answer)
        reply = await bus.request("there", Note(number=3), AskReply, timeout_s=5.0)
        assert reply == AskReply(accepted=False, reason="no_slot")
        assert heard[0].parse(Note) == Note(number=3)


async def test_no_responders_and_silence_are_a_peer_that_is_unavailable(nats_url: str) -> None:
    async def say_nothing(incoming: Incoming) -> None:
        pass

    async with connection.connect(nats_url, name="a", timeout_s=5.0) as bus:
        await bus.subscribe("silent", say_nothing)
        with pytest.raises(NoResponders, match="Nobody is subscribed to nobody"):
            await bus.request("nobody", Note(number=1), AskReply, timeout_s=5.0)
        with pytest.raises(PeerUnavailable, match="No answer"):
            await bus.request("silent", Note(number=1), AskReply, timeout_s=0.05)


async def test_a_message_that_is_too_large_says_so(nats_url: str) -> None:
    async with connection.connect(nats_url, name="a", timeout_s=5.0) as bus:
        with pytest.raises(MessageTooLarge, match="raise max_payload"):
            await bus.request("x", Text(text="y" * bus.max_payload), AskReply, timeout_s=5.0)


async def test_a_message_of_another_form_names_its_first_fault(nats_url: str) -> None:
    heard: asyncio.Queue[Incoming] = asyncio.Queue()
    async with connection.connect(nats_url, name="a", timeout_s=5.0) as bus:
        await bus.subscribe("here", heard.put)
        await bus.publish("here", Note(number=1))
        incoming = await asyncio.wait_for(heard.get(), 10)
        with pytest.raises(InvalidRequest, match="`request_ids` is required") as caught:
            incoming.parse(Cancel)
        assert caught.value.param == "request_ids"


async def test_a_sender_is_told_when_is_no_responders(nats_url: str) -> None:
    told: asyncio.Queue[Incoming] = asyncio.Queue()
    async with connection.connect(nats_url, name="a", timeout_s=5.0) as bus:
        await bus.subscribe("told.>", told.put)
        await bus.publish("nobody", Note(number=1), no_responders_to="told.stream-1")
        incoming = await asyncio.wait_for(told.get(), 10)
        assert incoming.is_no_responders
        assert incoming.subject == "told.stream-1"


async def test_it_comes_back_after_a_restart_with_its_subscriptions(servers: Servers) -> None:
    port = free_port()
    url = servers.start_nats(port)
    numbers: list[int] = []
    renewals: list[None] = []

    async def hear(incoming: Incoming) -> None:
        numbers.append(incoming.parse(Note).number)

    async with connection.connect(url, name="a", timeout_s=5.0) as bus:
        bus.on_reconnect(lambda: renewals.append(None))
        await bus.subscribe("here", hear)
        servers.processes["nats"].kill()
        servers.processes["nats"].wait()
        await eventually(lambda: not bus.connected)
        servers.start_nats(port)
        await eventually(lambda: bool(renewals) and bus.connected)
        await bus.publish("here", Note(number=7))
        await eventually(lambda: numbers == [7])


async def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(BusUnavailable, match="set PDSERVE_NATS_URL"):
        async with connection.connect(f"nats://127.0.0.1:{free_port()}", name="a", timeout_s=0.5):
            pass


async def test_a_request_can_be_cancelled_at_any_moment(nats_url: str) -> None:
    """Also while its answer arrives: a request thought not to be made leaves what it got with nobody."""
    dice = random.Random(0)

    async def answer(incoming: Incoming) -> None:
        await incoming.respond(AskReply(accepted=True))

    async def ask_for_ever(bus: Bus) -> None:
        while True:
            await bus.request("there", Note(number=1), AskReply, timeout_s=5.0)

    async with connection.connect(nats_url, name="a", timeout_s=5.0) as bus:
        await bus.subscribe("there", answer)
        for _ in range(300):
            asking = asyncio.create_task(ask_for_ever(bus))
            await asyncio.sleep(dice.uniform(0.0, 0.003))
            asking.cancel()
            await asyncio.wait([asking], timeout=5.0)
            assert asking.cancelled()
