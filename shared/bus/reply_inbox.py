"""A client's reply inbox: messages in order, and again those that a restart of the bus may have swallowed.

Where nobody listens, NATS says so for each message. Usually that means that the client has gone. Shortly after the bus
was away it more likely means that the client has not come back yet (nats clients wait two seconds by default), so
messages are sent again until it has. A client may get one twice, and knows it by its index.
"""

import asyncio
import time
from collections.abc import Callable

from shared.bus.connection import Bus
from shared.messages.generate_api import ApiMessage

CLIENT_RETURNS_S = 10.0
"""How long after the bus was away a client may take to listen again."""
SEND_AGAIN_S = 0.5
IN_FLIGHT_S = 5.0
"""Messages sent so shortly before the bus went away may not have reached it."""
TOLD_AFTER_S = 0.05
"""NATS tells of a message that nobody heard before it answers a flush; so long we take to hear it."""


class Inbox:
    """The inbox of one request.

    Args:
        subject: where the client listens.
        told: the subject prefix under which NATS tells that nobody does; the message's index is put behind it.
        tasks: where sending again runs.
        on_gone: called once, when the client is given up.
    """

    def __init__(
        self, bus: Bus, subject: str, told: str, tasks: asyncio.TaskGroup, on_gone: Callable[[], None]
    ) -> None:
        self._bus = bus
        self._subject = subject
        self._told = told
        self._tasks = tasks
        self._on_gone = on_gone
        self._messages: list[ApiMessage] = []
        self._sent_at: list[float] = []
        self._came_back_at = -CLIENT_RETURNS_S
        self._unheard: int | None = None
        """The first message that has to be sent again."""
        self._sending_again = False

    @property
    def index(self) -> int:
        """That of the next message."""
        return len(self._messages)

    async def send(self, message: ApiMessage) -> None:
        """Sends the next message, or puts it behind those that are being sent again."""
        self._messages.append(message)
        self._sent_at.append(time.monotonic())
        if not self._sending_again:
            await self._publish(len(self._messages) - 1)

    def unheard(self, index: int) -> None:
        """Nobody heard message `index`."""
        if time.monotonic() - self._came_back_at > CLIENT_RETURNS_S:
            self._on_gone()
        else:
            self._send_again_from(index)

    def bus_came_back(self) -> None:
        """What was sent last may be lost, with nobody to tell."""
        now = time.monotonic()
        self._came_back_at = now
        recent = [index for index, sent_at in enumerate(self._sent_at) if now - sent_at <= IN_FLIGHT_S]
        if recent:
            self._send_again_from(recent[0])

    def _send_again_from(self, index: int) -> None:
        self._unheard = index if self._unheard is None else min(index, self._unheard)
        if not self._sending_again:
            self._sending_again = True
            self._tasks.create_task(self._send_again())

    async def _send_again(self) -> None:
        """Sends from the first unheard message on, until all were heard or the client is given up."""
        try:
            while self._unheard is not None:
                await asyncio.sleep(SEND_AGAIN_S)
                if time.monotonic() - self._came_back_at > CLIENT_RETURNS_S:
                    self._on_gone()
                    return
                position, self._unheard = self._unheard, None
                while position < len(self._messages):
                    await self._publish(position)
                    position += 1
                await self._bus.flush()
                await asyncio.sleep(TOLD_AFTER_S)
        finally:
            self._sending_again = False

    async def _publish(self, index: int) -> None:
        told = f"{self._told}.{index}"
        await self._bus.publish(self._subject, self._messages[index], tell_if_gone=told)
