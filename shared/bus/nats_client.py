"""nats-py's client (the pinned version), made to survive whatever arrives.

In nats-py an undecodable message, a late answer to a flush that was cancelled, and any unknown control line end the
reading task without a reconnect, and most errors of the server close the client for good. Here a message that cannot
be decoded is skipped, and everything else leads to a reconnect. This file is the only one that touches the library's
protected names.
"""

import asyncio
import json
import logging
import time
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.protocol.parser import Parser

CRLF = b"\r\n"
MAX_LINE_BYTES = 1 << 20
"""A control line of the server is never this long."""
REPORT_EVERY_S = 10.0
STAYS_OPEN = ("permissions violation", "invalid publish subject", "invalid subject")
"""Errors after which the server keeps the connection open."""

log = logging.getLogger(__name__)


class TolerantParser(Parser):
    """Splits what the server sends into control lines and payloads, by the same rules by which the server writes them.

    The library's own parser takes any white space in a subject for a separator, which a client can put there.
    """

    nc: "TolerantClient"

    async def parse(self, data: bytes = b"") -> None:
        """Handles all complete messages in the buffer.

        Raises:
            nats.errors.ProtocolError: a line is not NATS' protocol; the client reconnects.
        """
        self.buf.extend(data)
        buffer, position = self.buf, 0
        try:
            # `reset` replaces the buffer when the client reconnects in the middle.
            while buffer is self.buf and (end := buffer.find(CRLF, position)) >= 0:
                line = bytes(buffer[position:end])
                if not line.startswith((b"MSG ", b"HMSG ")):
                    position = end + len(CRLF)
                    await self._handle(line)
                    continue
                words = line.split(b" ")
                num_bytes, num_header_bytes = _sizes(words)
                start = end + len(CRLF)
                if len(buffer) < start + num_bytes + len(CRLF):
                    break
                middle, position = start + num_header_bytes, start + num_bytes + len(CRLF)
                headers = bytes(buffer[start:middle])
                payload = bytes(buffer[middle : start + num_bytes])
                reply = words[3] if len(words) == (6 if words[0] == b"HMSG" else 5) else b""
                await self.nc._process_msg(int(words[2]), words[1], reply, payload, headers)
        finally:
            del buffer[:position]
        if buffer is self.buf and len(buffer) > MAX_LINE_BYTES and CRLF not in buffer:
            raise nats.errors.ProtocolError

    async def _handle(self, line: bytes) -> None:
        word, _, rest = line.partition(b" ")
        match word.upper():
            case b"PING":
                await self.nc._process_ping()
            case b"PONG":
                await self.nc._process_pong()
            case b"+OK":
                pass
            case b"-ERR":
                await self.nc._process_err(rest.decode(errors="replace").strip().strip("'"))
            case b"INFO":
                await self.nc._process_info(_info(rest))
            case _:
                raise nats.errors.ProtocolError


def _sizes(words: list[bytes]) -> tuple[int, int]:
    """Returns the size of a message with its headers, and that of the headers, in bytes."""
    try:
        num_bytes = int(words[-1])
        num_header_bytes = int(words[-2]) if words[0] == b"HMSG" else 0
        int(words[2])
    except (ValueError, IndexError) as error:
        raise nats.errors.ProtocolError from error
    if not 0 <= num_header_bytes <= num_bytes:
        raise nats.errors.ProtocolError
    return num_bytes, num_header_bytes


def _info(text: bytes) -> dict[str, Any]:
    try:
        info = json.loads(text)
    except ValueError as error:
        raise nats.errors.ProtocolError from error
    return info if isinstance(info, dict) else {}


class TolerantClient(Client):
    """A client that skips undecodable messages and never closes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = TolerantParser(self)
        self._num_skipped = 0
        self._reported_at = float("-inf")

    @property
    def has_stopped(self) -> bool:
        """Returns whether the client takes itself for connected, but reads and writes nothing any more."""
        tasks = (self._reading_task, self._flusher_task)
        return self.is_connected and any(task is None or task.done() for task in tasks)

    @property
    def is_lost(self) -> bool:
        """Returns whether the client is not connected, and nothing tries to reconnect it."""
        is_reconnecting = self._reconnection_task is not None and not self._reconnection_task.done()
        return not self.is_connected and not is_reconnecting

    def is_worth_a_report(self) -> bool:
        """Returns whether a sender's fault may be logged now: once in `REPORT_EVERY_S`, to bound the log."""
        now = time.monotonic()
        if now - self._reported_at < REPORT_EVERY_S:
            return False
        self._reported_at = now
        return True

    async def reconnect(self) -> None:
        """Begins to reconnect, with all subscriptions."""
        await self._process_op_err(nats.errors.StaleConnectionError())

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except Exception as error:  # an edge: what a sender wrote must not end the reading task  # noqa: BLE001
            self._skipped(subject, error)

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        """Writes buffered commands before the ping: in nats-py it overtakes them, and a flush ends too early."""
        if self._pending:
            self._transport.writelines(self._pending[:])  # type: ignore[union-attr]
            self._pending = []
            self._pending_data_size = 0
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        """Without this, the answer to a flush that was cancelled or timed out ends the reading task."""
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
            self._pings_outstanding = 0
        else:
            await super()._process_pong()

    async def _process_err(self, err_msg: str) -> None:
        error = nats.errors.Error(f"the NATS server reports: {err_msg}")
        self._err = error
        if any(known in err_msg.lower() for known in STAYS_OPEN):
            await self._error_cb(error)
        else:
            log.warning("%s; reconnecting", error)
            await self._process_op_err(error)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Passes on a cancellation, which the library swallows while its buffer is full."""
        task = asyncio.current_task()
        before = task.cancelling() if task is not None else 0
        result = await super()._flush_pending(force_flush)
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
        return result

    def _skipped(self, subject: bytes, error: Exception) -> None:
        self._num_skipped += 1
        if self.is_worth_a_report():
            log.warning(
                "skipped %d undecodable messages so far, the last one on %.60r: %.200r",
                self._num_skipped,
                subject,
                error,
            )
