"""Around every HTTP request: its id, the API key, metrics and the trace; every failure becomes one response here."""

import asyncio
import hmac
import logging
import time
import uuid
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from opentelemetry.trace import SpanKind, Status, StatusCode, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.api import ApiContext
from services.gateway.openai.sse import error_event, error_response
from shared import __version__
from shared.errors import (
    BodyTooLarge,
    Cancelled,
    InternalError,
    InvalidAPIKey,
    InvalidRequest,
    RequestError,
    RequestTimeout,
    UnsupportedEncoding,
    gateway_is_ending,
)

ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
"""Paths whose requests are counted and traced, and their label."""
OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})
"""Paths that need no API key."""

ERROR_TIMEOUT_S = 5.0
"""How long a client may take to read that its request has failed."""
MAX_DRAINED_BYTES = 64 * 2**20
"""How much of the body of a rejected request is read and dropped, since some clients send all before they read."""

log = logging.getLogger(__name__)
propagator = TraceContextTextMapPropagator()


class RequestContext:
    """One HTTP request and its response: what is known of it, and how far both have come.

    Attributes:
        endpoint: the label of its metrics.
        request_id: sent to the client in the header x-request-id; the ids of its choices begin with it.
        arrived_at: `time.monotonic()` when its first byte was read.
        read_deadline: `time.monotonic()` at which its body must have arrived; None sets no bound.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["context"] = self
        self.headers = Headers(scope=scope)
        self.endpoint = ENDPOINTS.get(scope["path"], "other")
        self.request_id = uuid.uuid4().hex
        self.arrived_at: float = state.get("arrived_at", time.monotonic())
        self.read_deadline: float | None = state.get("read_deadline")
        self.has_started = False
        self.has_ended = False
        self._is_disconnected = False
        self._has_unread_body = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"
        self._receive = receive
        self._send = send

    @staticmethod
    def of(scope: Scope) -> "RequestContext":
        context = scope["state"]["context"]
        assert isinstance(context, RequestContext)
        return context

    async def receive(self) -> Message:
        """Receives the next part of the request, or the client's disconnect."""
        message = await self._receive()
        self._is_disconnected = message["type"] == "http.disconnect"
        self._has_unread_body = self._has_unread_body and message.get("more_body", False)
        return message

    async def read_body(self, max_bytes: int) -> bytes:
        """Reads the request's body, and decompresses it if it is encoded with gzip.

        Raises:
            BodyTooLarge: by its Content-Length before anything is read, or once it has too many bytes.
            RequestTimeout: it has not arrived by `read_deadline`.
            UnsupportedEncoding, InvalidRequest: it cannot be decoded.
            Cancelled: the client disconnected.
        """
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", "x-gzip"):
            raise UnsupportedEncoding(f"Content-Encoding {encoding[:40]!r} is not supported: use gzip or none.")
        if int(self.headers.get("content-length", "0")) > max_bytes:
            raise _too_large(max_bytes)
        body = bytearray()
        left_s = None if self.read_deadline is None else self.read_deadline - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                while self._has_unread_body:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Cancelled("The client disconnected before it had sent the request.")
                    body += message["body"]
                    if len(body) > max_bytes:
                        raise _too_large(max_bytes)
        except TimeoutError as error:
            raise RequestTimeout("The body did not arrive in time: send it faster, or shorten it.") from error
        return bytes(body) if encoding == "identity" else await asyncio.to_thread(_unzip, body, max_bytes)

    async def send(self, message: Message) -> None:
        """Sends a part of the response, with the headers that all responses have; waits while the client does not read.

        Raises:
            Cancelled: the client has disconnected.
        """
        if self._is_disconnected:
            raise Cancelled("The client disconnected before its response was complete.")
        if message["type"] == "http.response.start":
            self.has_started = True
            own = [(b"server", f"pdserve/{__version__}".encode()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": [*message["headers"], *own]}
        elif not message.get("more_body", False):
            self.has_ended = True
        await self._send(message)

    async def fail(self, error: RequestError) -> None:
        """Ends the response with an error: as a response of its own, or as the last event of a stream.

        Does nothing if the response has ended, or the client is gone: the failure is in the log only.
        """
        if self._is_disconnected or self.has_ended:
            return
        if self.has_started:
            await self.send({"type": "http.response.body", "body": error_event(error), "more_body": False})
            return
        response = error_response(error)
        if self._has_unread_body:
            response.headers["connection"] = "close"
        await self.send(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self.send({"type": "http.response.body", "body": response.body, "more_body": True})
        num_drained = 0
        while self._has_unread_body and num_drained < MAX_DRAINED_BYTES and not isinstance(error, RequestTimeout):
            num_drained += len((await self.receive()).get("body", b""))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class ApiMiddleware:
    """ASGI middleware around the whole API."""

    def __init__(self, app: ASGIApp, api: ApiContext) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = RequestContext(scope, receive, send)
        if context.endpoint == "other":
            await self._serve(scope, context)
            return
        metrics = self._api.metrics
        code = "cancelled"
        with (
            metrics.endpoint(context.endpoint).in_flight.track_inprogress(),
            self._api.tracer.start_as_current_span(
                f"POST {scope['path']}", context=propagator.extract(context.headers), kind=SpanKind.SERVER
            ),
        ):
            try:
                code = await self._serve(scope, context)
            finally:
                metrics.requests.labels(context.endpoint, code).inc()

    async def _serve(self, scope: Scope, context: RequestContext) -> str:
        """Responds to a request, whatever happens; returns `ok` or the error's code."""
        cancelled: asyncio.CancelledError | None = None
        failure: RequestError
        try:
            authenticate(self._api.api_keys, scope["path"], context.headers.get("authorization"))
            await self._app(scope, context.receive, context.send)
            return "ok"
        except RequestError as error:
            failure = error
        except asyncio.CancelledError as error:
            # Only the server cancels, when it has waited long enough for its requests to end.
            cancelled, failure = error, gateway_is_ending()
        except Exception:
            log.exception("internal error while handling request %s", context.request_id)
            failure = InternalError("The gateway failed on this request. Its log has the reason, under the request id.")
        if failure.status >= 500:
            get_current_span().set_status(Status(StatusCode.ERROR, failure.message))
        try:
            async with asyncio.timeout(ERROR_TIMEOUT_S):
                await context.fail(failure)
        except TimeoutError:
            log.warning("request %s: the client does not read the error, so it is dropped", context.request_id)
        if cancelled is not None:
            raise cancelled
        return failure.code


def authenticate(api_keys: frozenset[str], path: str, authorization: str | None) -> None:
    """Checks a request's API key, `Authorization: Bearer <key>`, unless there are no keys or its path is open.

    Raises:
        InvalidAPIKey: it has none, or a wrong one.
    """
    if not api_keys or path in OPEN_PATHS:
        return
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        raise InvalidAPIKey("There is no API key: send the header `Authorization: Bearer <key>`.")
    # Headers come decoded as Latin-1. Every key is compared in constant time, so that the time reveals none.
    sent = key.encode("latin-1")
    matches = [hmac.compare_digest(sent, known.encode()) for known in api_keys]
    if not any(matches):
        raise InvalidAPIKey("The API key is not valid: ask this service's operator for one.")


def _unzip(body: bytearray, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        content = decompressor.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"The body is not valid gzip ({error}): check Content-Encoding.") from error
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidRequest("The body is not one complete gzip stream: check Content-Encoding.")
    return content


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the {max_bytes} bytes that this service takes: shorten it.")


@asynccontextmanager
async def connected(context: RequestContext) -> AsyncIterator[None]:
    """Cancels the block when the client disconnects before its response has ended.

    Raises:
        Cancelled: the client disconnected.
        Exception: the block's first error, be it of one of its own tasks.
    """

    async def watch() -> None:
        while (await context.receive())["type"] != "http.disconnect":
            pass
        if not context.has_ended:
            raise Cancelled("The client disconnected before its response was complete.")

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            yield
            watching.cancel()
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns what went wrong first; what followed from it stays in the group."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
