"""The NATS API and clients that do not come back."""

import asyncio
from types import SimpleNamespace

import pytest

from pdserve.servers import Servers
from services.gateway import inbox, nats_api
from services.gateway.metrics import GatewayMetrics
from services.gateway.nats_api import NatsApi
from shared.bus import connection, subjects
from shared.bus.connection import Incoming
from shared.bus.messages import Message
from tests.harness import eventually, free_port


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
            await bus.publish(subjects.GENERATE, Message(v=1), tell_if_gone="an-inbox-of-nobody")
            await eventually(lambda: api._answering)
            servers.processes["nats"].kill()
            servers.processes["nats"].wait()
            await eventually(lambda: not bus.connected)
            servers.start_nats(port)
            await eventually(lambda: bus.connected)
            [answering] = api._answering.values()
            await eventually(lambda: answering.inbox._sending_again)
        assert not api._answering
