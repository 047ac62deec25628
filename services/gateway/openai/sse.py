"""An answer as a stream of server-sent events (WHATWG HTML, section 9.2), in the form that OpenAI's clients read."""

import asyncio

from pydantic_core import to_json
from starlette.types import Send

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would else collect events before it passes them on.
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """Sends events; the head goes out with the first, so that what fails before it can still have a status of its own.

    Several tasks may write at a time. An answer that is not ended is broken off by the server.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_begun = False
        self._lock = asyncio.Lock()

    async def write(self, data: object) -> None:
        """Send one event with `data` as JSON; waits while the client does not read."""
        event = b"data: " + to_json(data) + b"\n\n"
        async with self._lock:
            if not self._is_begun:
                self._is_begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def end(self) -> None:
        """Send OpenAI's end mark, and end the answer."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
