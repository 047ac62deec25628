"""One connection to NATS: typed messages, bounded sizes, trace context in the headers, and reconnecting by itself.

It does not know what messages mean. Whatever a client sends, a message is skipped or the connection renewed within a
second; `nats_client.py` has the guards inside the library, and `Bus.watch` here is the last one.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from opentelemetry import propagate
from opentelemetry.context import Context
from pydantic import BaseModel, ValidationError

from shared.addresses import Credentials, credentials, resolved
from shared.bus import subjects
from shared.bus.nats_client import TolerantClient
from shared.errors import (
    BusUnavailable,
    InvalidRequest,
    MessageTooLarge,
    NoResponders,
    PeerUnavailable,
    invalid_request,
)

STATUS = "Status"
NO_RESPONDERS = "503"

RECONNECT_WAIT_S = 0.1
WATCH_EVERY_S = 0.2
CONNECT_TIMEOUT_S = 2
FLUSH_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0
PING_INTERVAL_S = 2
SLOW_CONSUMER_MESSAGES = 65536
MAX_CONTROL_LINE_BYTES = 4096
"""NATS' default. The server closes the connection of a sender whose subjects and sizes take more."""
SIZES_BYTES = 24
"""The two sizes and the spaces in a control line take at most so many bytes."""
HEADER_FRAME_BYTES = len(b"NATS/1.0\r\n\r\n")

AnyModel = TypeVar("AnyModel", bound=BaseModel)
log = logging.getLogger(__name__)


class Incoming:
    """A received message, parsed on demand."""

    def __init__(self, bus: "Bus", msg: Msg) -> None:
        self._bus = bus
        self._msg = msg
        self.subject = msg.subject
        self.headers: dict[str, str] = msg.headers or {}

    @property
    def reply_to(self) -> str:
        """Returns the inbox where the sender expects an answer; empty if it expects none or names no inbox."""
        reply = self._msg.reply
        return reply if subjects.is_inbox(reply) else ""

    @property
    def num_bytes(self) -> int:
        """Returns the size of the message without its headers."""
        return len(self._msg.data)

    @property
    def is_no_responders(self) -> bool:
        """Returns whether NATS reports here that a message, sent with this subject as its reply, had no subscriber."""
        return self.headers.get(STATUS) == NO_RESPONDERS and not self._msg.data

    @property
    def trace_context(self) -> Context:
        return propagate.extract(self.headers)

    def parse(self, kind: type[AnyModel]) -> AnyModel:
        """Returns the message as a `kind`.

        Raises:
            InvalidRequest: it is none; the text names the first invalid field.
        """
        try:
            return kind.model_validate_json(self._msg.data)
        except ValidationError as error:
            raise invalid_request(error) from error

    async def respond(self, message: BaseModel) -> None:
        """Sends the answer, if the sender expects one.

        Raises:
            MessageTooLarge: the answer is over the limits of NATS.
        """
        if self.reply_to:
            await self._bus.publish(self.reply_to, message)


Handler = Callable[[Incoming], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Subscribed:
    """A subscription that is renewed with the client."""

    subject: str
    queue: str
    on_message: Callable[[Msg], Awaitable[None]]
    client: TolerantClient | None = None
    current: Subscription | None = None


class Bus:
    """A connected bus. Made by `connect`; a lost connection is renewed for as long as the process lives."""

    def __init__(self, address: Credentials, name: str) -> None:
        self._address = address
        self._name = name
        self._client = self._new_client()
        self._subscribed: list[_Subscribed] = []
        self._reconnected: list[Callable[[], None]] = []
        self._is_away = False
        self._replies_to = f"{inbox_prefix(address.user)}.{secrets.token_hex(11)}"
        self._waiting: dict[str, asyncio.Future[Incoming]] = {}
        self._numbers = count()
        self._is_subscribed_to_replies = False

    @property
    def connected(self) -> bool:
        """Returns whether the connection stands; after a loss only once the `on_reconnect` callbacks were called."""
        return self._client.is_connected and not self._is_away

    @property
    def max_payload(self) -> int:
        """Returns the largest message in bytes, headers included, that the server accepts."""
        return self._client.max_payload

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Calls `callback` after each reconnect: what was sent or due meanwhile may be lost."""
        self._reconnected.append(callback)

    def check_subjects(self, subject: str, reply: str = "") -> None:
        """Raises `MessageTooLarge` where the subjects of a message are too long for NATS' protocol."""
        num_bytes = len(subject.encode()) + len(reply.encode()) + SIZES_BYTES
        if num_bytes > MAX_CONTROL_LINE_BYTES:
            raise MessageTooLarge(
                f"The subjects of a message take {num_bytes} bytes, and NATS accepts {MAX_CONTROL_LINE_BYTES}: "
                "use a shorter reply inbox."
            )

    async def publish(self, subject: str, message: BaseModel, *, no_responders_to: str = "") -> None:
        """Sends to all subscribers. If there is none, NATS reports so to the subject `no_responders_to`, if given.

        While the connection is away, messages are buffered, and beyond the buffer's size dropped.

        Raises:
            MessageTooLarge: the message, or its subjects, are over the limits of NATS.
        """
        self.check_subjects(subject, no_responders_to)
        payload, headers = message.model_dump_json().encode(), _headers()
        num_bytes = len(payload) + _num_header_bytes(headers)
        if num_bytes > self.max_payload:
            raise MessageTooLarge(
                f"A message to {subject[:200]} takes {num_bytes} bytes, and NATS accepts {self.max_payload}: "
                "send a smaller request, or raise max_payload of NATS."
            )
        try:
            await self._client.publish(subject, payload, reply=no_responders_to, headers=headers)
        except nats.errors.OutboundBufferLimitError:
            log.warning("NATS is away and the buffer is full: dropped a message to %.200s", subject)
        except (nats.errors.ConnectionClosedError, nats.errors.ConnectionDrainingError):
            log.warning("the connection to NATS is being renewed: dropped a message to %.200s", subject)
        except nats.errors.BadSubjectError as error:
            raise InvalidRequest(f"{subject[:200]!r} is no subject of NATS.") from error

    async def request(self, subject: str, message: BaseModel, answer: type[AnyModel], *, timeout_s: float) -> AnyModel:
        """Sends and waits for one answer, `timeout_s` at most.

        Raises:
            NoResponders: nobody is subscribed to the subject; NATS reports it within milliseconds.
            PeerUnavailable: no answer came in time.
            MessageTooLarge: the message is over the limits of NATS.
            InvalidRequest: the answer is no `answer`.
        """
        token = str(next(self._numbers))
        waiting: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self._waiting[token] = waiting
        try:
            async with asyncio.timeout(timeout_s):
                if not self._is_subscribed_to_replies:
                    self._is_subscribed_to_replies = True
                    await self.subscribe(f"{self._replies_to}.*", self._on_reply)
                await self.publish(subject, message, no_responders_to=f"{self._replies_to}.{token}")
                incoming = await waiting
        except TimeoutError as error:
            raise PeerUnavailable(f"No answer came on {subject} within {timeout_s:g} s.") from error
        finally:
            del self._waiting[token]
        if incoming.is_no_responders:
            raise NoResponders(f"Nobody is subscribed to {subject}.")
        return incoming.parse(answer)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Callable[[], Awaitable[None]]:
        """Calls `handler` for one message after another; it must not wait for peers. Live when this returns.

        What a handler raises is logged and ends nothing else. Returns a function that ends the subscription: no more
        messages come, and those that have come are handled.
        """

        async def on_message(msg: Msg) -> None:
            try:
                await handler(Incoming(self, msg))
            except asyncio.CancelledError:
                if _is_being_cancelled():
                    raise
                log.exception("the handler of a message on %.200s waited for a cancelled task", subject)
            except Exception:  # an edge: a message affects nothing but itself
                log.exception("internal error while handling a message on %.200s", subject)

        subscribed = _Subscribed(subject, queue, on_message)
        self._subscribed.append(subscribed)
        await self._renew_subscription(subscribed)
        await self.flush()

        async def end() -> None:
            if subscribed in self._subscribed:
                self._subscribed.remove(subscribed)
                with suppress(nats.errors.Error):
                    if subscribed.current is not None:
                        await subscribed.current.drain()  # type: ignore[no-untyped-call]

        return end

    async def flush(self) -> None:
        """Returns when the server has handled all that was sent before; at once while it is away."""
        if self._client.is_connected:
            try:
                await self._client.flush(FLUSH_TIMEOUT_S)  # type: ignore[arg-type]
            except nats.errors.Error as error:
                log.warning("NATS did not confirm what was sent: %r", error)

    async def watch(self) -> None:
        """Renews a connection that the library has closed, or whose end it has not noticed. Runs until cancelled."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            try:
                if self._client.has_stopped:
                    log.error("the NATS client has stopped reading or writing: reconnecting")
                    await self._client.reconnect()
                elif self._client.is_lost:
                    log.error("the NATS client has closed (%r): making a new one", self._client.last_error)
                    await self._replace_client()
            except (nats.errors.Error, OSError, ValueError, EOFError) as error:
                log.warning("NATS cannot be reached, trying again: %r", error)
            except asyncio.CancelledError:
                if _is_being_cancelled():
                    raise
                log.exception("the NATS client waited for a cancelled task; trying again")
            except Exception:  # an edge: without this task, a connection that is lost later would stay lost
                log.exception("internal error while reconnecting to NATS; trying again")

    async def open(self) -> None:
        """Connects for the first time; waits for the server for ever."""
        await self._connect(self._client)

    async def close(self) -> None:
        await _close(self._client)

    @property
    def last_error(self) -> Exception | None:
        return self._client.last_error

    def _new_client(self) -> TolerantClient:
        return TolerantClient()

    async def _connect(self, client: TolerantClient) -> None:
        async def on_error(error: Exception) -> None:
            if isinstance(error, nats.errors.SlowConsumerError):
                log.error("messages were lost: this process is too slow for %s", error)
            elif client.is_connected and client.is_worth_a_report():
                log.warning("NATS client: %r", error)
            else:
                log.debug("NATS client: %r", error)

        async def on_disconnect() -> None:
            if client is self._client and not client.is_closed and not client.is_draining:
                self._is_away = True
                log.warning("lost the connection to NATS at %s; reconnecting", self._address.url)

        async def on_reconnect() -> None:
            self._on_reconnected()

        user, password = self._address.user, self._address.password
        await client.connect(
            self._address.url,
            name=self._name,
            user=user if password is not None else None,
            password=password,
            token=user if password is None else None,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            connect_timeout=CONNECT_TIMEOUT_S,
            reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]
            max_reconnect_attempts=-1,
            ping_interval=PING_INTERVAL_S,
            flush_timeout=FLUSH_TIMEOUT_S,
        )

    async def _replace_client(self) -> None:
        self._is_away = True
        old, new = self._client, self._new_client()
        try:
            await self._connect(new)
            self._client = new
            for subscribed in list(self._subscribed):
                await self._renew_subscription(subscribed)
            await self.flush()
        except BaseException:
            await _close(new)  # `watch` finds a closed client, and replaces it in turn
            raise
        else:
            self._on_reconnected()
        finally:
            if self._client is new:
                await _close(old)

    async def _renew_subscription(self, subscribed: _Subscribed) -> None:
        """Subscribes at the present client, unless that was done, or it is closed and about to be replaced."""
        client = self._client
        if subscribed.client is client:
            return
        subscribed.client = client
        with suppress(nats.errors.ConnectionClosedError):
            subscribed.current = await client.subscribe(
                subscribed.subject,
                queue=subscribed.queue,
                cb=subscribed.on_message,
                pending_msgs_limit=SLOW_CONSUMER_MESSAGES,
            )

    def _on_reconnected(self) -> None:
        log.warning("reconnected to NATS at %s", self._address.url)
        self._is_away = False
        for callback in self._reconnected:
            try:
                callback()
            except Exception:  # an edge: the other callbacks and the connection go on
                log.exception("internal error after a reconnect to NATS")

    async def _on_reply(self, incoming: Incoming) -> None:
        waiting = self._waiting.get(incoming.subject.rpartition(".")[2])
        if waiting is not None and not waiting.done():
            waiting.set_result(incoming)


@asynccontextmanager
async def connect(url: str, *, name: str, timeout_s: float) -> AsyncIterator[Bus]:
    """Connects to NATS at `url`; waits up to `timeout_s` for the server.

    Args:
        url: may contain a user and a password, percent-encoded, or name a file with such a URL (`file:///...`).
            Answers then arrive at `_INBOX.<user>.`, which is what the accounts of `pdserve/nats_accounts.py` allow.

    Raises:
        BusUnavailable: the server cannot be reached, or rejects the user.
    """
    try:
        address = credentials(resolved(url))
    except ValueError as error:
        raise BusUnavailable(f"PDSERVE_NATS_URL cannot be used: {error}.") from None
    bus = Bus(address, name)
    try:
        async with asyncio.timeout(timeout_s):
            await bus.open()
    except (nats.errors.Error, OSError, ValueError, EOFError, TimeoutError) as error:
        await bus.close()
        cause = bus.last_error or error
        raise BusUnavailable(
            f"Cannot connect to NATS at {address.url} ({cause!r}). Start a server there or set PDSERVE_NATS_URL, "
            "with a user and password if the server has accounts."
        ) from error
    watching = asyncio.create_task(bus.watch(), name="watching the NATS client")
    try:
        yield bus
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await bus.close()


def inbox_prefix(user: str | None) -> str:
    """Returns the prefix of a user's reply inboxes. A user of the accounts may subscribe to no others."""
    return f"_INBOX.{re.sub(r'[^A-Za-z0-9_-]', '_', user)}" if user else "_INBOX"


async def _close(client: TolerantClient) -> None:
    """Closes a client for good, in whatever state it is; waits for `CLOSE_TIMEOUT_S` at most."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.close()
    except (nats.errors.Error, OSError, TimeoutError):
        pass
    except Exception:  # an edge: a client that cannot be closed must not keep its owner from going on
        log.exception("internal error while closing a NATS client")


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _headers() -> dict[str, str] | None:
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers or None


def _num_header_bytes(headers: Mapping[str, str] | None) -> int:
    """Bytes of a header block: a line `name: value` for each, in a frame."""
    if headers is None:
        return 0
    return HEADER_FRAME_BYTES + sum(len(name) + len(value.encode()) + 4 for name, value in headers.items())
