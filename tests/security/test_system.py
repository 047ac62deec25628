"""A whole system under NATS accounts: it serves, operators operate, and a client sees and moves nothing of others."""

import asyncio
import json
from collections.abc import Callable

from pdserve.admin import ask_admin
from shared.bus import subjects
from shared.messages.control import AdminRequest
from tests.bus.raw_client import RawClient, pub
from tests.harness import System
from tests.system.client import nats_client

REQUEST = {"prompt": "a secret question", "max_tokens": 20, "ignore_eos": True}
EVERYTHING = (">", "_INBOX.>", "_INBOX.*.>", "_INBOX.client.>", "pdserve.v1.>", "pdserve.v1.generate", "pdserve.>")


def test_a_system_serves_and_operates_under_accounts(start_system: Callable[..., System]) -> None:
    system = start_system(num_prefill=2, settings={"engine": "mock"})
    asyncio.run(serve_and_operate(system))
    logs = "".join(path.read_text() for path in system.folder.glob("*.log"))
    assert "Permissions Violation" not in logs, "services stay within their permissions"
    assert not any(password in logs for password in system.accounts.passwords.values())


async def serve_and_operate(system: System) -> None:
    server = system.nats.clients["client"].rpartition("@")[2]
    with RawClient(f"nats://{server}", "eve", system.accounts.passwords["eve"]) as eve:
        for number, subject in enumerate(EVERYTHING):
            eve.send(f"SUB {subject} {number}\r\n".encode())
        async with nats_client(system.nats.clients["client"]) as client:
            messages = await client.answer(REQUEST)
        assert messages[-1]["type"] == "done", messages
        assert eve.send(b"") == b"", "she hears nothing of it"

        flipped = system.instance("prefill", 1)
        record = next(one for one in await asyncio.to_thread(system.live) if one.pid == flipped.pid)
        order = {"instance": record.id, "role": "decode"}
        said = eve.send(pub(subjects.admin("flip").encode(), json.dumps(order).encode(), b"_INBOX.eve.1"))
        assert b"Permissions Violation" in said
        answer = await ask_admin(system.nats_url, "flip", AdminRequest.model_validate(order))
        assert answer.ok, answer.message
        assert eve.send(b"") == b""
    async with nats_client(system.nats.clients["client"]) as client:
        assert (await client.answer(REQUEST))[-1]["type"] == "done"
