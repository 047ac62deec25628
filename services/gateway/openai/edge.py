"""The edge of the HTTP API: every request gets an id and a key check here, every failure becomes an answer, once."""

import asyncio
import logging

from opentelemetry.trace import SpanKind, Status, StatusCode, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.api import ApiContext
from services.gateway.openai.auth import authenticate
from services.gateway.openai.errors import error_event, error_response
from services.gateway.openai.exchange import Exchange
from shared import __version__
from shared.errors import InternalError, RequestError, gateway_is_ending

GENERATING = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
"""Paths whose requests are counted and traced, and their label."""

LAST_WORDS_S = 5.0
"""How long a client may take to read that its request has failed."""

log = logging.getLogger(__name__)
propagator = TraceContextTextMapPropagator()


class Answer:
    """What has gone out of one answer; adds the headers that all answers have."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._headers = [
            (b"server", f"pdserve/{__version__}".encode()),
            (b"x-request-id", request_id.encode()),
        ]
        self.is_begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_begun = True
            message = {**message, "headers": [*message["headers"], *self._headers]}
        await self._send(message)


class Edge:
    """ASGI middleware around the whole API."""

    def __init__(self, app: ASGIApp, api: ApiContext) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = GENERATING.get(scope["path"])
        exchange = Exchange(endpoint or "other")
        exchange.put_into(scope)
        answer = Answer(send, exchange.request_id)
        if endpoint is None:
            await self._serve(scope, receive, answer)
        else:
            await self._observe(endpoint, scope, receive, answer)

    async def _observe(self, endpoint: str, scope: Scope, receive: Receive, answer: Answer) -> None:
        metrics = self._api.metrics
        code = "cancelled"
        parent = propagator.extract(Headers(scope=scope))
        with (
            metrics.in_flight.labels(endpoint).track_inprogress(),
            self._api.tracer.start_as_current_span(f"POST {scope['path']}", context=parent, kind=SpanKind.SERVER),
        ):
            try:
                code = await self._serve(scope, receive, answer)
            finally:
                metrics.requests.labels(endpoint, code).inc()

    async def _serve(self, scope: Scope, receive: Receive, answer: Answer) -> str:
        """Answer the request, whatever happens; returns the outcome's code."""
        ended: asyncio.CancelledError | None = None
        failure: RequestError
        try:
            authenticate(self._api.api_keys, scope["path"], Headers(scope=scope).get("authorization"))
            await self._app(scope, receive, answer.send)
            return "ok"
        except RequestError as error:
            failure = error
        except asyncio.CancelledError as error:
            # Only the server cancels, when it has waited long enough for its requests to end.
            ended = error
            failure = gateway_is_ending()
        except Exception:
            log.exception("request %s met a fault of this program", Exchange.of(scope).request_id)
            failure = InternalError("The gateway failed at this request; its log says why, under the request's id.")
        if failure.status >= 500:
            get_current_span().set_status(Status(StatusCode.ERROR, failure.message))
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._tell(failure, scope, receive, answer)
        except TimeoutError:
            log.warning("request %s: the client reads nothing", Exchange.of(scope).request_id)
        if ended is not None:
            raise ended
        return failure.code

    async def _tell(self, failure: RequestError, scope: Scope, receive: Receive, answer: Answer) -> None:
        if answer.is_begun:
            # Only streams begin before they are sure to end well.
            await answer.send({"type": "http.response.body", "body": error_event(failure), "more_body": False})
        else:
            await error_response(failure)(scope, receive, answer.send)
