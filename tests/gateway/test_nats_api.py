"""The NATS API: what it tells the core, whom it refuses, and clients that do not come back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from pydantic import ConfigDict

from pdserve.servers import Servers
from services.gateway import inbox, nats_api
from services.gateway.api import ApiContext
from services.gateway.telemetry import GatewayMetrics
from services.gateway.nats_api import NatsApi
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.messages.generate_api import GenerateDone, GenerateFailed
from shared.messages.serving import Message
from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.conftest import DEMO, MODEL
from tests.gateway.openai.fake_core import FakeCore
from tests.harness import eventually, free_port


class Anything(Message):
    """A request as a client may write it, right or wrong."""

    model_config = ConfigDict(extra="allow")


@dataclass
class Client:
    bus: Bus
    core: FakeCore

    async def end_of(self, **fields: object) -> GenerateDone | GenerateFailed:
        """The terminal message of a request."""
        ends: list[GenerateDone | GenerateFailed] = []
        kinds = {"done": GenerateDone, "error": GenerateFailed}

        async def hear(incoming: Incoming) -> None:
            kind = incoming.parse(Anything).model_dump()["type"]
            if kind in kinds:
                ends.append(incoming.parse(kinds[kind]))

        stop = await self.bus.subscribe("answer", hear)
        await self.bus.publish(subjects.GENERATE, Anything.model_validate(fields), no_responders_to="answer")
        await eventually(lambda: ends)
        await stop()
        [end] = ends
        return end


@asynccontextmanager
async def api_over(core: FakeCore, nats_url: str) -> AsyncIterator[Client]:
    """The API on a real bus."""
    context = ApiContext(core=core, tokenizer=Tokenizer(DEMO), served_model_name=MODEL, metrics=GatewayMetrics())
    async with connection.connect(nats_url, name="g", timeout_s=5.0) as bus, asyncio.TaskGroup() as tasks:
        api = NatsApi(context, bus, "g", tasks)
        await api.subscribe()
        yield Client(bus, core)
        await api.drain(5.0)


async def test_a_request_names_its_scenario_and_its_priority(nats_url: str) -> None:
    async with api_over(FakeCore(), nats_url) as client:
        for fields in ({}, {"scenario": "chat-2_B"}, {"priority": "batch", "scenario": None}):
            end = await client.end_of(prompt="Hi", **fields)
            assert isinstance(end, GenerateDone)
        told = [(call.scenario, call.priority) for call in client.core.calls]
        assert told == [(None, "interactive"), ("chat-2_B", "interactive"), (None, "batch")]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("scenario", "a b", "but it is 'a b'"),
        ("scenario", "", "at least 1 character"),
        ("scenario", "x" * 65, "at most 64 characters"),
        ("priority", "urgent", "'interactive' or 'batch', but it is 'urgent'"),
    ],
)
async def test_a_bad_scenario_or_priority_is_refused_by_name(nats_url: str, field: str, value: str, says: str) -> None:
    async with api_over(FakeCore(), nats_url) as client:
        end = await client.end_of(prompt="Hi", **{field: value})
        assert isinstance(end, GenerateFailed)
        assert (end.error.code, end.error.param) == ("invalid_request", field)
        assert says in end.error.message
        assert client.core.calls == []


async def test_a_client_may_be_given_up_after_its_answer_is_forgotten(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending the last words again outlasts their keeping; that must not end the gateway, and with it everybody."""
    monkeypatch.setattr(nats_api, "LINGER_S", 2.0)
    monkeypatch.setattr(inbox, "CLIENT_RETURNS_S", 1.0)
    monkeypatch.setattr(inbox, "SEND_AGAIN_S", 3.0)
    port = free_port()
    async with connection.connect(servers.start_nats(port), name="g", timeout_s=5.0) as bus:
        async with asyncio.TaskGroup() as tasks:
            api = NatsApi(SimpleNamespace(metrics=GatewayMetrics()), bus, "g", tasks)  # type: ignore[arg-type]

            async def told(incoming: Incoming) -> None:
                api.nobody_heard(subjects.verb_and_key(incoming.subject)[1])

            await bus.subscribe(subjects.gateway("g", ">"), told)
            await api.subscribe()
            await bus.publish(subjects.GENERATE, Message(v=1), no_responders_to="an-inbox-of-nobody")
            await eventually(lambda: api._answering)
            servers.processes["nats"].kill()
            servers.processes["nats"].wait()
            await eventually(lambda: not bus.connected)
            servers.start_nats(port)
            await eventually(lambda: bus.connected)
            [answering] = api._answering.values()
            await eventually(lambda: answering.inbox._sending_again)
        assert not api._answering
