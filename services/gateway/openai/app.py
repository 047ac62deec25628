"""The HTTP API as one ASGI application, and the server that runs it: uvicorn, with limits and deadlines of our own."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.gateway.api import ApiContext
from services.gateway.openai.chat import prepare_chat
from services.gateway.openai.completions import prepare_completions
from services.gateway.openai.handler import Handler
from services.gateway.openai.idempotency import IdempotentAnswers
from services.gateway.openai.meta import Meta
from services.gateway.openai.middleware import ApiMiddleware
from services.gateway.openai.schemas import ChatCompletionRequest, CompletionRequest
from services.gateway.openai.sse import error_response
from shared.errors import (
    RETRY_AFTER_S,
    HeadersTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    PathNotFound,
    RequestError,
    RequestTimeout,
)
from shared.settings import GatewaySettings

LINGER_S = 2.0
"""How long a rejected connection stays open, so that a client that still sends can read why it was rejected."""
MAX_FRAMING_PER_BODY_BYTE = 8
"""Chunks of one byte need five bytes around each."""


def create_app(
    api: ApiContext, answers: IdempotentAnswers | None = None, cors_origins: Sequence[str] = ()
) -> Starlette:
    """Makes the application; serve it with `http_server_config`.

    Args:
        answers: keeps the answers of requests with an Idempotency-Key; None ignores such keys.
        cors_origins: origins of web pages that may use the API; `*` allows all.
    """
    middleware = [Middleware(ApiMiddleware, api=api)]
    if cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
        middleware.insert(0, cors)
    chat = Handler(api, ChatCompletionRequest, prepare_chat, answers)
    completions = Handler(api, CompletionRequest, prepare_completions, answers)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            *Meta(api).routes(),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _reject},
    )
    app.router.redirect_slashes = False
    return app


async def _reject(request: Request, error: Exception) -> Response:
    """Turns Starlette's own rejections, of a path or a method, into errors of this API."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        raise MethodNotAllowed(f"{request.url.path} does not take {request.method}: use {allow}.", allow=allow)
    raise PathNotFound(
        f"There is no {request.url.path} here: the API is at /v1/chat/completions, /v1/completions and /v1/models."
    )


def http_server_config(
    api: ApiContext, settings: GatewaySettings, answers: IdempotentAnswers | None = None
) -> uvicorn.Config:
    """Returns the configuration of the gateway's HTTP server."""
    limits = HttpLimits(
        read_timeout_s=settings.http_read_timeout_s,
        write_timeout_s=settings.http_write_timeout_s,
        max_header_bytes=settings.max_header_bytes,
        max_connections=settings.max_connections,
    )
    return uvicorn.Config(
        create_app(api, answers, settings.cors_origin_list),
        host=settings.http_host,
        port=settings.http_port,
        http=partial(HttpConnection, limits=limits),  # type: ignore[arg-type]  # a class with one argument bound
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=max(1, int(settings.http_idle_timeout_s)),
        timeout_graceful_shutdown=max(1, int(settings.drain_timeout_s)),
    )


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds on one connection, and on the number of connections.

    Attributes:
        read_timeout_s: from the first byte of a request to the last of its body.
        write_timeout_s: how long a client may leave unread what is ready to be sent.
    """

    read_timeout_s: float
    write_timeout_s: float
    max_header_bytes: int
    max_connections: int


class HttpConnection(HttpToolsProtocol):
    """One client's connection.

    A client that connects and sends nothing, or sends a request too slowly, is disconnected, as is one that does not
    read. Offers to upgrade to another protocol are ignored, bodies of such requests are read. HTTP/1.0 gets no chunks.
    """

    def __init__(self, *args: Any, limits: HttpLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._arrived_at = 0.0
        self._is_receiving = False  # a request has begun and is not complete
        self._is_in_head = False
        self._is_rejected = False
        self._num_bytes = 0  # of the request that arrives, and of its body
        self._num_body_bytes = 0
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.max_connections:
            self._abort()  # even rejected ones are too many
        elif len(self.connections) > self._limits.max_connections:
            message = f"This gateway has {self._limits.max_connections} connections and takes no more: try again."
            self._reject(Overloaded(message, retry_after_s=RETRY_AFTER_S))
        else:
            self._set_read_timer(self._limits.read_timeout_s, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._read_timer, self._write_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_rejected:
            return
        self._unset_keepalive_if_required()
        if not self._is_receiving:
            self._arrived_at = time.monotonic()
        self._num_bytes += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._feed_without_upgrade(data[upgrade.args[0] :])
            framing = self._num_bytes - self._num_body_bytes
            if framing > self._limits.max_header_bytes + MAX_FRAMING_PER_BODY_BYTE * self._num_body_bytes:
                raise self._headers_too_large()
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._reject(cause if isinstance(cause, RequestError) else InvalidRequest("This is not valid HTTP/1.1."))
        except RequestError as error:
            self._reject(error)
        else:
            if not self._is_receiving and (self.cycle is None or self.cycle.response_complete):
                self._start_idle_timer()

    def _feed_without_upgrade(self, rest: bytes) -> None:
        """Parses a request once more without its offer to upgrade, which would end the parser's message."""
        kept = [(name, value) for name, value in self.headers if name not in (b"connection", b"upgrade")]
        closes = any(name == b"connection" and b"close" in value.lower() for name, value in self.headers)
        kept += [(b"connection", b"close")] if closes else []
        version = self.parser.get_http_version().encode()
        head = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)
        head += b"".join(b"%s: %s\r\n" % header for header in kept)
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(head + b"\r\n" + rest)
        except httptools.HttpParserUpgrade as error:
            raise InvalidRequest("Method CONNECT is not supported.") from error

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_receiving = self._is_in_head = True
        self.scope["state"]["arrived_at"] = self._arrived_at
        self.scope["state"]["read_deadline"] = self._arrived_at + self._limits.read_timeout_s
        self._set_read_timer(self._limits.read_timeout_s, self._head_is_late)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if (
            sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url)
            > self._limits.max_header_bytes
        ):
            raise self._headers_too_large()
        self._is_in_head = False
        super().on_headers_complete()
        # The application responds with 408 if the body is late. This is for responses that do not wait for the body.
        self._set_read_timer(self._limits.read_timeout_s + LINGER_S, self._abort)

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_receiving = False
        self._num_bytes = self._num_body_bytes = 0
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        served: Any = _Unchunked(app, cycle) if cycle.scope["http_version"] == "1.0" else app
        super()._start_asgi_task(cycle, served)

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            self._close()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_write_timer(self._limits.write_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()

    def eof_received(self) -> None:
        if self._is_rejected:
            self.transport.close()

    def _reject(self, error: RequestError) -> None:
        """Responds to what is no request, and reads no more."""
        self._is_rejected = True
        if self.cycle is not None and not self.cycle.response_complete:
            self._close()  # a response is on its way: no other may begin
            return
        response = error_response(error)
        response.headers["connection"] = "close"
        head = b"HTTP/1.1 %d %s\r\n" % (error.status, HTTPStatus(error.status).phrase.encode())
        head += b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        self.transport.write(head + b"\r\n" + bytes(response.body))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_read_timer(LINGER_S, self._abort)

    def _headers_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"The headers have more than {self._limits.max_header_bytes} bytes: shorten them.")

    def _head_is_late(self) -> None:
        self._reject(RequestTimeout(f"The request did not arrive within {self._limits.read_timeout_s:g} s."))

    def _start_idle_timer(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _close(self) -> None:
        """Closes the connection once everything has been sent, or the client has not read it in time."""
        self.transport.close()
        self._set_write_timer(self._limits.write_timeout_s)

    def _abort(self) -> None:
        self.transport.abort()

    def _set_read_timer(self, seconds: float, callback: Any) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = self.loop.call_later(seconds, callback)

    def _set_write_timer(self, seconds: float) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._write_timer = self.loop.call_later(seconds, self._abort)


class _Unchunked:
    """Serves an HTTP/1.0 request: its response ends where the connection is closed."""

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unchunked(message: Message) -> None:
            # uvicorn chunks what has no length, and checks the length: each part is announced as the rest.
            self._cycle.chunked_encoding = False
            self._cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, send_unchunked)
