"""A client's reply inbox: its messages in order, and once more those that a restart of NATS may have lost.

Where nobody is subscribed, NATS reports "no responders" for each message. Usually that means that the client has gone.
Shortly after a reconnect it more likely means that the client has not reconnected yet (NATS clients wait two seconds by
default), so messages are sent again until it has. A client may receive one twice, and recognises it by its index.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import InvalidRequest, PDServeError
from shared.messages.generate_api import ApiMessage

CLIENT_RETURNS_S = 10.0
"""How long after a reconnect of ours a client may take to subscribe again."""
SEND_AGAIN_S = 0.5
IN_FLIGHT_S = 5.0
"""Messages sent so shortly before the connection broke may not have reached NATS; older ones are not kept."""
REPORTED_AFTER_S = 0.05
"""NATS reports that nobody is subscribed before it answers a flush; so long the report may wait in our own queue."""
LARGEST_INDEX = 2**31

log = logging.getLogger(__name__)


class _Sent(NamedTuple):
    message: ApiMessage
    sent_at: float


class ReplyInbox:
    """The inbox of one request. Memory: the messages of the last `IN_FLIGHT_S`, or those a client has not received yet.

    Args:
        subject: where the client is subscribed; also an attribute.
        no_responders_prefix: NATS reports to `<prefix>.<message index>` that it is not; the owner of that
            subscription calls `on_no_responders`.
        on_gone: called once, when the client is considered gone.

    Raises:
        InvalidRequest: the subject is not an inbox.
        MessageTooLarge: the subject is too long to be published to.
    """

    def __init__(self, bus: Bus, subject: str, no_responders_prefix: str, on_gone: Callable[[], None]) -> None:
        if not subjects.is_inbox(subject):
            raise InvalidRequest(
                f"The reply subject is not an inbox, which begins with {subjects.INBOX_PREFIX}: use one that your NATS "
                "client makes."
            )
        bus.check_subjects(subject, f"{no_responders_prefix}.{LARGEST_INDEX}")
        self._bus = bus
        self.subject = subject
        self._prefix = no_responders_prefix
        self._on_gone = on_gone
        self._is_gone = False
        self._kept: deque[_Sent] = deque()
        self._num_sent = 0
        self._reconnected_at = float("-inf")
        self._first_lost: int | None = None
        """The first message that has to be sent again."""
        self._resending: asyncio.Task[None] | None = None

    @property
    def index(self) -> int:
        """Returns the index of the next message."""
        return self._num_sent

    @property
    def num_kept(self) -> int:
        """Messages in memory."""
        return len(self._kept)

    async def send(self, message: ApiMessage) -> None:
        """Sends the next message, or appends it to those that are being sent again.

        Raises:
            MessageTooLarge: it is over the limits of NATS. It was not sent, and its index is free again.
        """
        now = time.monotonic()
        self._drop_received(now)
        self._kept.append(_Sent(message, now))
        self._num_sent += 1
        if not self._is_resending:
            try:
                await self._publish(self._num_sent - 1, message)
            except PDServeError:
                self._kept.pop()
                self._num_sent -= 1
                raise

    def on_no_responders(self, index: int) -> None:
        """Handles NATS' report that nobody was subscribed when message `index` was sent."""
        if self._client_may_return:
            self._send_again_from(index)
        else:
            self._end()

    def bus_reconnected(self) -> None:
        """Sends again what may have been lost with the connection, of which NATS reports nothing."""
        self._reconnected_at = time.monotonic()
        if self._kept:
            self._send_again_from(self._first_kept)

    def close(self) -> None:
        """Ends sending again. To be called when the request has ended and its last message was sent."""
        self._is_gone = True
        if self._resending is not None:
            self._resending.cancel()

    @property
    def is_settled(self) -> bool:
        """Returns whether no message of the last `IN_FLIGHT_S` could be asked for again."""
        self._drop_received(time.monotonic())
        return not self._kept

    @property
    def _client_may_return(self) -> bool:
        # NATS may report what was sent with a reconnect before this process knows that it is connected again.
        return not self._bus.connected or time.monotonic() - self._reconnected_at <= CLIENT_RETURNS_S

    @property
    def _first_kept(self) -> int:
        return self._num_sent - len(self._kept)

    @property
    def _is_resending(self) -> bool:
        return self._resending is not None and not self._resending.done()

    def _drop_received(self, now: float) -> None:
        if self._first_lost is None and not self._is_resending and self._bus.connected:
            while self._kept and now - self._kept[0].sent_at > IN_FLIGHT_S:
                self._kept.popleft()

    def _end(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._on_gone()

    def _send_again_from(self, index: int) -> None:
        if self._is_gone:
            return
        index = max(index, self._first_kept)
        self._first_lost = index if self._first_lost is None else min(index, self._first_lost)
        if not self._is_resending:
            self._resending = asyncio.create_task(self._send_again(), name=f"sending again to {self.subject[:60]}")

    async def _send_again(self) -> None:
        """Sends from the first lost message on, until all were received or the client is considered gone."""
        try:
            position = self._num_sent
            while self._first_lost is not None or position < self._num_sent:
                if self._first_lost is not None:
                    await asyncio.sleep(SEND_AGAIN_S)
                    if not self._client_may_return:
                        self._end()
                        return
                    position, self._first_lost = self._first_lost, None
                while position < self._num_sent:
                    await self._publish(position, self._kept[position - self._first_kept].message)
                    position += 1
                await self._bus.flush()
                await asyncio.sleep(REPORTED_AFTER_S)
        except PDServeError as error:
            log.warning("an answer cannot be sent again: %s", error)
            self._end()

    async def _publish(self, index: int, message: ApiMessage) -> None:
        await self._bus.publish(self.subject, message, no_responders_to=f"{self._prefix}.{index}")
