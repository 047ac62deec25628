"""One connection to NATS: typed messages, our headers, deadlines, and coming back by itself after a restart.

Owns what travels in headers: the trace context, the time of sending, and a request's absolute deadline. It does not
know what messages mean.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from opentelemetry import propagate
from opentelemetry.context import Context
from pydantic import BaseModel, ValidationError

from shared.addresses import shown
from shared.errors import BusUnavailable, DeadlineExceeded, InvalidRequest, PeerUnavailable, invalid_request

DEADLINE = "Pd-Deadline"
SENT = "Pd-Sent"
STATUS = "Status"
NO_RESPONDERS = "503"

RECONNECT_WAIT_S = 0.1
FLUSH_TIMEOUT_S = 2.0
SLOW_CONSUMER_MESSAGES = 65536

AnyModel = TypeVar("AnyModel", bound=BaseModel)
log = logging.getLogger(__name__)


class Incoming:
    """A received message, parsed on demand."""

    def __init__(self, msg: Msg) -> None:
        self._msg = msg
        self.subject = msg.subject
        self.headers: dict[str, str] = msg.headers or {}

    @property
    def reply_to(self) -> str:
        return self._msg.reply

    @property
    def nobody_listens(self) -> bool:
        """Whether this is NATS saying that a message sent with this subject as its reply reached nobody."""
        return self.headers.get(STATUS) == NO_RESPONDERS

    @property
    def deadline(self) -> float:
        """The absolute deadline (Unix seconds) of the request this belongs to.

        Raises:
            InvalidRequest: it has none.
        """
        try:
            return float(self.headers[DEADLINE])
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"a request needs the header {DEADLINE} in Unix seconds") from error

    @property
    def trace_context(self) -> Context:
        return propagate.extract(self.headers)

    def parse(self, kind: type[AnyModel]) -> AnyModel:
        """The message as a `kind`.

        Raises:
            InvalidRequest: it is none; the message names the first field at fault.
        """
        try:
            return kind.model_validate_json(self._msg.data)
        except ValidationError as error:
            raise invalid_request(error) from error

    async def respond(self, message: BaseModel) -> None:
        await self._msg.respond(message.model_dump_json().encode())


Handler = Callable[[Incoming], Awaitable[None]]


class Bus:
    """A connected bus. Made by `connect`; a lost connection is renewed for as long as the process lives."""

    def __init__(self) -> None:
        self._client = Client()
        self._reconnected: list[Callable[[], None]] = []

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def max_payload(self) -> int:
        """The largest message in bytes that the server takes."""
        return self._client.max_payload

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Calls `callback` after each renewal: what was sent or due in between may be lost."""
        self._reconnected.append(callback)

    async def publish(self, subject: str, message: BaseModel, *, tell_if_gone: str = "") -> None:
        """Sends to whoever listens. If nobody does, NATS says so to the subject `tell_if_gone`, if given."""
        try:
            await self._client.publish(
                subject, message.model_dump_json().encode(), reply=tell_if_gone, headers=_headers(None)
            )
        except nats.errors.OutboundBufferLimitError:
            log.warning("the bus is away and its buffer is full: dropped a message to %s", subject)

    async def request(
        self,
        subject: str,
        message: BaseModel,
        answer: type[AnyModel],
        *,
        timeout_s: float,
        deadline: float | None = None,
    ) -> AnyModel:
        """Sends and waits for one answer.

        Args:
            timeout_s: how long the peer may take.
            deadline: the absolute deadline of the whole request, for the peer to keep.

        Raises:
            PeerUnavailable: nobody listens, or no answer came in time.
            DeadlineExceeded: the deadline has passed already.
        """
        if deadline is not None and time.time() >= deadline:
            raise DeadlineExceeded("the request's deadline has passed")
        payload = message.model_dump_json().encode()
        if len(payload) > self.max_payload:
            raise InvalidRequest(
                f"the request takes {len(payload)} bytes on the bus, whose limit is {self.max_payload}: "
                "raise max_payload of NATS"
            )
        try:
            # Not the client's own timeout: `wait_for`, on which it stands, swallows cancellations before Python 3.12.
            async with asyncio.timeout(timeout_s):
                msg = await self._client.request(subject, payload, timeout=None, headers=_headers(deadline))  # type: ignore[arg-type]
        except nats.errors.NoRespondersError as error:
            raise PeerUnavailable(f"nobody listens on {subject}") from error
        except (TimeoutError, nats.errors.OutboundBufferLimitError) as error:
            raise PeerUnavailable(f"no answer on {subject} within {timeout_s} s") from error
        return Incoming(msg).parse(answer)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Callable[[], Awaitable[None]]:
        """Calls `handler` for one message after another; it must not wait for peers. Live when this returns.

        Returns a way to end it: no more messages come, and those that have are handled.
        """

        async def on_message(msg: Msg) -> None:
            await handler(Incoming(msg))

        subscription = await self._client.subscribe(
            subject, queue=queue, cb=on_message, pending_msgs_limit=SLOW_CONSUMER_MESSAGES
        )
        await self._client.flush()
        return subscription.drain

    async def flush(self) -> None:
        """Returns when the server has handled all that was sent before; at once while it is away."""
        if self._client.is_connected:
            try:
                await self._client.flush(FLUSH_TIMEOUT_S)  # type: ignore[arg-type]
            except nats.errors.Error as error:
                log.warning("bus: %r", error)


@asynccontextmanager
async def connect(url: str, *, name: str, timeout_s: float) -> AsyncIterator[Bus]:
    """Connects to NATS at `url`; waits up to `timeout_s` for the server to be there.

    Raises:
        BusUnavailable: it is not there.
    """
    bus = Bus()
    client = bus._client

    async def on_error(error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            log.error("messages were lost: this process is too slow for %s", error)
        elif client.is_connected:
            log.warning("bus: %r", error)
        else:
            log.debug("bus: %r", error)

    async def on_disconnect() -> None:
        if not client.is_closed and not client.is_draining:
            log.warning("the connection to NATS at %s is lost; coming back", shown(url))

    async def on_reconnect() -> None:
        log.warning("the connection to NATS at %s is back", shown(url))
        for callback in bus._reconnected:
            callback()

    try:
        async with asyncio.timeout(timeout_s):
            await client.connect(
                url,
                name=name,
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
                connect_timeout=2,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]
                max_reconnect_attempts=-1,
                ping_interval=5,
            )
    except (nats.errors.Error, OSError, ValueError, TimeoutError) as error:
        cause = client.last_error or error
        raise BusUnavailable(
            f"no NATS server takes us at {shown(url)} ({cause!r}): start one there or set PDSERVE_NATS_URL"
        ) from error
    try:
        yield bus
    finally:
        await client.close()


def _headers(deadline: float | None) -> dict[str, str]:
    headers = {SENT: f"{time.time():.6f}"}
    if deadline is not None:
        headers[DEADLINE] = f"{deadline:.6f}"
    propagate.inject(headers)
    return headers
