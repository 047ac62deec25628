"""Operators' requests: whatever they contain, the controller goes on."""

import asyncio
from typing import Any, cast

from nats.aio.msg import Msg

from services.controller.admin import Admin
from services.controller.brain import Brain
from services.controller.maps import Maps
from shared.bus import subjects
from shared.bus.connection import MAX_CONTROL_LINE_BYTES, Incoming, connect
from tests.harness import eventually


async def test_a_reply_inbox_that_nats_does_not_accept_does_not_end_the_controller(nats_url: str, caplog: Any) -> None:
    """The server takes a control line that just fits; the answer's line, with sizes of headers, does not."""
    inbox = subjects.INBOX_PREFIX + "x" * (MAX_CONTROL_LINE_BYTES - len(subjects.INBOX_PREFIX))
    async with connect(nats_url, name="controller-test", timeout_s=5.0) as bus, asyncio.TaskGroup() as tasks:
        admin = Admin("", cast(Brain, None), cast(Maps, None), tasks)
        msg = Msg(_client=cast(Any, None), subject=subjects.admin("unknown"), reply=inbox, data=b"{}")
        task = tasks.create_task(admin.handle(Incoming(bus, msg)))
        await eventually(task.done)
    assert "could not be sent" in caplog.text
