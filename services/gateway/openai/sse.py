"""What goes out to a client, as OpenAI's clients read it: server-sent events (WHATWG HTML, section 9.2) and errors."""

import math
from collections.abc import Iterable

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Send

from shared.errors import MethodNotAllowed, RequestError

EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Without it, nginx collects events before it passes them on.
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class EventStream:
    """Sends a response as events, whose head goes out with the first: what fails before it has a status of its own."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_started = False

    async def write(self, events: Iterable[object], *, is_last: bool = False) -> None:
        """Sends events in one piece, with OpenAI's end mark after the last; waits while the client does not read."""
        data = b"".join(b"data: " + to_json(event) + b"\n\n" for event in events)
        if is_last:
            data += DONE
        if not data:
            return
        if not self._has_started:
            self._has_started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM_HEADERS)})
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def respond(self, content: object) -> None:
        """Sends the whole response as one JSON object."""
        body = to_json(content)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def error_json(error: RequestError) -> bytes:
    """Returns the body `{"error": {"message", "type", "param", "code"}}`."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 499 else "server_error")
    body = error.body
    return to_json({"error": {"message": body.message, "type": kind, "param": body.param, "code": body.code}})


def error_response(error: RequestError) -> Response:
    """Returns the whole response, with `Retry-After` in whole seconds where trying again makes sense."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 415:
        headers["accept-encoding"] = "gzip, identity"
    return Response(error_json(error), status_code=error.status, headers=headers, media_type="application/json")


def error_event(error: RequestError) -> bytes:
    """Returns the same body as a server-sent event, for a stream that has started."""
    return b"data: " + error_json(error) + b"\n\n"
