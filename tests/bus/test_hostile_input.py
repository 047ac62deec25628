"""Whatever a client publishes, and whatever befalls the library: the bus skips it, or is back within a second."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from nats.aio.subscription import Subscription
from pydantic import BaseModel

from pdserve.servers import Servers
from shared.bus import connection
from shared.bus.connection import MAX_CONTROL_LINE_BYTES, Bus, Incoming
from shared.bus.nats_client import TolerantClient, TolerantParser
from shared.bus.reply_inbox import ReplyInbox
from shared.errors import InvalidRequest, MessageTooLarge, NoResponders, PeerUnavailable
from tests.bus.raw_client import RawClient, hpub, pub
from tests.harness import eventually, free_port


class Text(BaseModel):
    text: str


GOOD = b'{"text": "x"}'
BAD_HEADERS = {
    "4 bytes": b"abcd",
    "8 bytes": b"NATS/1.0",
    "1 byte": b"N",
    "status that is not UTF-8": b"NATS/1.0 \xff\xff\xff\r\n\r\n",
    "description that is not UTF-8": b"NATS/1.0 100 \xff\xfe\r\n\r\n",
    "description that is not UTF-8, with headers": b"NATS/1.0 100 \xff\xfe\r\nA: b\r\n\r\n",
    "a space alone": b"NATS/1.0 ",
}
ODD_HEADERS = {
    "no end": b"NATS/1.0\r\nA: b",
    "names and values that are not UTF-8": b"NATS/1.0\r\n\xff: b\r\nA: \xff\r\n\r\n",
    "no colon": b"NATS/1.0\r\nabc\r\n\r\n",
    "a trace context of nonsense": b"NATS/1.0\r\ntraceparent: 00-\xff\r\ntracestate: ,,=\r\nbaggage: a=%%%;;\r\n\r\n",
}
ODD_REPLIES = {
    "not UTF-8": b"_INBOX.\xff\xfe",
    "vertical tab": b"_INBOX.a\x0bb",
    "form feed and a digit": b"_INBOX.a\x0c7",
    "zero": b"_INBOX.\x00",
    "wildcards": b"_INBOX.*.>",
    "empty tokens": b"..",
    "a service's subject": b"pdserve.v1.admin.flip",
    "no inbox": b"answers.for.me",
    "the prefix alone": b"_INBOX.",
    "4,000 characters": b"_INBOX." + b"a" * 4000,
}


@dataclass
class Echo:
    """A bus with a subscription that answers each message, as a gateway does; and its peer."""

    bus: Bus
    peer: Bus
    reconnects: list[None] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)

    async def answer(self, incoming: Incoming) -> None:
        text = incoming.parse(Text)
        _ = incoming.trace_context
        self.heard.append(incoming.subject)
        await incoming.respond(text)

    async def works(self) -> None:
        """A request is answered within a second, even if the first tries fall into a reconnect."""
        async with asyncio.timeout(1.0):
            while True:
                try:
                    await self.peer.request("echo.me", Text(text="y"), Text, timeout_s=0.3)
                except PeerUnavailable:
                    await asyncio.sleep(0.02)
                else:
                    return

    async def send(self, url: str, data: bytes) -> bytes:
        def sent() -> bytes:
            with RawClient(url) as raw:
                return raw.send(data)

        return await asyncio.to_thread(sent)


@asynccontextmanager
async def echo(url: str) -> AsyncIterator[Echo]:
    async with (
        connection.connect(url, name="a", timeout_s=5.0) as bus,
        connection.connect(url, name="b", timeout_s=5.0) as peer,
    ):
        made = Echo(bus, peer)
        bus.on_reconnect(lambda: made.reconnects.append(None))
        await bus.subscribe("echo.>", made.answer)
        await made.works()
        yield made


@pytest.mark.parametrize("headers", BAD_HEADERS.values(), ids=BAD_HEADERS)
@pytest.mark.parametrize("payload", [GOOD, b""], ids=["a payload", "no payload"])
async def test_a_malformed_header_block_is_skipped(nats_url: str, headers: bytes, payload: bytes) -> None:
    async with echo(nats_url) as one:
        await one.send(nats_url, hpub(b"echo.you", headers, payload, b"_INBOX.x"))
        await one.works()
        assert one.bus.connected
        assert not one.reconnects


@pytest.mark.parametrize("headers", ODD_HEADERS.values(), ids=ODD_HEADERS)
async def test_odd_headers_do_not_keep_a_message_from_being_handled(nats_url: str, headers: bytes) -> None:
    async with echo(nats_url) as one:
        await one.send(nats_url, hpub(b"echo.odd", headers, GOOD, b"_INBOX.x"))
        await eventually(lambda: "echo.odd" in one.heard)
        await one.works()
        assert not one.reconnects


@pytest.mark.parametrize("reply", ODD_REPLIES.values(), ids=ODD_REPLIES)
async def test_an_odd_reply_inbox_harms_nobody(nats_url: str, reply: bytes) -> None:
    async with echo(nats_url) as one:
        said = await one.send(nats_url, pub(b"echo.you", GOOD, reply))
        assert b"-ERR" not in said
        await one.works()
        assert not one.reconnects


@pytest.mark.parametrize("subject", [b"echo.\xff\xfe", b"echo.a\x0bb", b"echo.\x00", b"echo." + b"a" * 3900])
async def test_an_odd_subject_harms_nobody(nats_url: str, subject: bytes) -> None:
    async with echo(nats_url) as one:
        await one.send(nats_url, pub(subject, GOOD) * 3)
        await one.works()
        assert not one.reconnects


@pytest.mark.parametrize("payload", [b"", b"\xff\xfe", b"[" * 5000, b'{"text": "\\ud800"}', b'{"text": 1e999}'])
async def test_an_odd_payload_ends_with_its_message(nats_url: str, payload: bytes) -> None:
    async with echo(nats_url) as one:
        await one.send(nats_url, pub(b"echo.you", payload, b"_INBOX.x"))
        await one.works()
        assert not one.reconnects


async def test_an_answer_goes_to_inboxes_only(nats_url: str) -> None:
    """Or a client could have a service send messages that it must not send itself."""
    forged: list[Incoming] = []

    async def on_order(incoming: Incoming) -> None:
        forged.append(incoming)

    async with echo(nats_url) as one:
        await one.peer.subscribe("pdserve.v1.>", on_order)
        await one.send(nats_url, pub(b"echo.you", GOOD, b"pdserve.v1.admin.flip"))
        await eventually(lambda: "echo.you" in one.heard)
        await one.works()
        assert not forged
        for subject in ("pdserve.v1.cancel", "answers.for.me", "$SYS.x", "_INBOXES.x", ""):
            with pytest.raises(InvalidRequest, match="begins with _INBOX"):
                ReplyInbox(one.bus, subject, "reports", lambda: None)


async def test_subjects_over_the_control_line_are_not_sent(nats_url: str) -> None:
    async with echo(nats_url) as one:
        with pytest.raises(MessageTooLarge, match="shorter reply inbox"):
            await one.bus.publish("a" * 2100, Text(text="x"), no_responders_to="b" * 2100)
        with pytest.raises(MessageTooLarge, match="shorter reply inbox"):
            ReplyInbox(one.bus, "_INBOX." + "a" * 4050, "pdserve.v1.gateway.g.gone.r", lambda: None)
        longest = MAX_CONTROL_LINE_BYTES - connection.SIZES_BYTES - len("echo.x")
        await one.bus.publish("echo.x", Text(text="x"), no_responders_to="b" * longest)
        await eventually(lambda: "echo.x" in one.heard)
        await one.works()
        assert not one.reconnects


@pytest.mark.parametrize("with_trace", [False, True])
async def test_sizes_are_compared_with_headers(
    nats_url: str, with_trace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library compares the payload alone, and the server then closes the connection."""
    headers = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "baggage": "a=é"} if with_trace else {}
    monkeypatch.setattr(connection.propagate, "inject", lambda carrier: carrier.update(headers))
    extra = len(b"NATS/1.0\r\n\r\n") + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
    async with echo(nats_url) as one:
        fits = one.bus.max_payload - len('{"text":""}') - (extra if with_trace else 0)
        await one.bus.publish("echo.large", Text(text="x" * fits))
        await eventually(lambda: "echo.large" in one.heard)
        with pytest.raises(MessageTooLarge, match="raise max_payload"):
            await one.bus.publish("echo.large", Text(text="x" * (fits + 1)))
        with pytest.raises(MessageTooLarge, match="raise max_payload"):
            await one.bus.request("echo.large", Text(text="x" * (fits + 1)), Text, timeout_s=5.0)
        await one.works()
        assert not one.reconnects


@pytest.mark.parametrize(
    "error",
    ["Maximum Control Line Exceeded", "Unknown Protocol Operation", "Maximum Payload Violation", "Stale Connection"],
)
async def test_an_error_of_the_server_never_closes_for_good(nats_url: str, error: str) -> None:
    async with echo(nats_url) as one:
        await one.bus._client._ps.parse(f"-ERR '{error}'\r\n".encode())
        await one.works()
        assert len(one.reconnects) == 1


async def test_a_permissions_violation_changes_nothing(nats_url: str) -> None:
    async with echo(nats_url) as one:
        await one.bus._client._ps.parse(b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n")
        await one.works()
        assert not one.reconnects


@pytest.mark.parametrize("junk", [b"WHAT IS THIS\r\n", b"MSG a\r\n", b"HMSG a 1 9 4\r\n", b"INFO {\r\n", b"-ERR \r\n"])
async def test_what_is_not_the_protocol_leads_to_a_reconnect(nats_url: str, junk: bytes) -> None:
    async with echo(nats_url) as one:
        transport = one.bus._client._transport
        assert transport is not None
        transport._io_reader.feed_data(junk)
        await eventually(lambda: bool(one.reconnects))
        await one.works()


async def test_a_reading_task_that_ended_is_noticed(nats_url: str) -> None:
    async with echo(nats_url) as one:
        reading = one.bus._client._reading_task
        assert reading is not None
        reading.cancel()
        await one.works()
        assert len(one.reconnects) == 1


async def test_a_client_that_closed_is_replaced(nats_url: str) -> None:
    async with echo(nats_url) as one:
        before = one.bus._client
        await before.close()
        assert not one.bus.connected
        await one.bus.publish("echo.dropped", Text(text="x"))
        await one.works()
        assert one.bus._client is not before
        assert len(one.reconnects) == 1
        assert (await one.bus.request("echo.self", Text(text="z"), Text, timeout_s=5.0)).text == "z"
        with pytest.raises(NoResponders):
            await one.bus.request("nobody", Text(text="z"), Text, timeout_s=5.0)


async def test_a_client_that_closed_while_the_server_is_away_is_replaced_later(servers: Servers) -> None:
    port = free_port()
    url = servers.start_nats(port)
    async with echo(url) as one:
        servers.processes["nats"].kill()
        servers.processes["nats"].wait()
        await eventually(lambda: not one.bus.connected)
        await one.bus._client.close()
        servers.start_nats(port)
        await eventually(lambda: one.bus.connected and one.peer.connected)
        await one.works()


class FailingOnce(TolerantClient):
    """A client one of whose methods raises what nats-py should not, the first time that any client calls it."""

    def __init__(self, method: str, errors: list[BaseException]) -> None:
        super().__init__()
        self._method = method
        self._errors = errors

    def _may_fail(self, method: str) -> None:
        if method == self._method and self._errors:
            raise self._errors.pop()

    async def connect(self, *args: Any, **options: Any) -> None:
        await super().connect(*args, **options)
        self._may_fail("connect")

    async def subscribe(self, *args: Any, **options: Any) -> Subscription:
        self._may_fail("subscribe")
        return await super().subscribe(*args, **options)

    async def flush(self, *args: Any) -> None:
        self._may_fail("flush")
        await super().flush(*args)


@pytest.mark.parametrize("error", [AssertionError("x"), AttributeError("x"), asyncio.CancelledError()])
@pytest.mark.parametrize("method", ["connect", "subscribe", "flush"])
async def test_an_unexpected_error_of_the_library_does_not_end_the_watch(
    nats_url: str, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException
) -> None:
    """It comes while a closed client is replaced; the next try has all subscriptions again."""
    errors = [error]
    async with echo(nats_url) as one:
        monkeypatch.setattr(one.bus, "_new_client", lambda: FailingOnce(method, errors))
        await one.bus._client.close()
        await eventually(lambda: not errors and one.bus.connected)
        await one.works()
        await one.bus._client.close()
        await eventually(lambda: one.bus.connected)
        await one.works()


async def test_an_unexpected_error_while_reconnecting_does_not_end_the_watch(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with echo(nats_url) as one:
        reconnect = one.bus._client.reconnect
        errors = [AttributeError("x")]

        async def fail_once() -> None:
            if errors:
                raise errors.pop()
            await reconnect()

        monkeypatch.setattr(one.bus._client, "reconnect", fail_once)
        reading = one.bus._client._reading_task
        assert reading is not None
        reading.cancel()
        await eventually(lambda: len(one.reconnects) == 1)
        await one.works()


async def test_a_flush_comes_after_all_that_was_sent_before(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a subscription need not be live when `subscribe` returns, nor a missing subscriber be reported."""
    async with echo(nats_url) as one:
        client = one.bus._client
        transport = client._transport
        assert transport is not None
        written: list[bytes] = []
        write, write_lines = transport.write, transport.writelines

        def note(data: bytes) -> None:
            written.append(data)
            write(data)

        def note_lines(lines: list[bytes]) -> None:
            written.extend(lines)
            write_lines(lines)

        monkeypatch.setattr(transport, "write", note)
        monkeypatch.setattr(transport, "writelines", note_lines)
        await client.subscribe("a.new.subject")
        await client.publish("a.subject", b"x")
        await one.bus.flush()
        assert [data.split()[0] for data in written] == [b"SUB", b"PUB", b"PING"]


async def test_a_flush_that_was_cancelled_harms_nobody(nats_url: str) -> None:
    """Its answer still arrives, and ended the library's reading task."""
    async with echo(nats_url) as one:
        for _ in range(20):
            flushing = asyncio.create_task(one.bus.flush())
            await asyncio.sleep(0)
            flushing.cancel()
            await asyncio.wait([flushing])
        await one.works()
        await one.bus.flush()
        assert not one.reconnects


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError(), ExceptionGroup("x", [ValueError()])])
async def test_what_a_handler_raises_ends_its_message_alone(nats_url: str, error: Exception) -> None:
    heard: list[Incoming] = []

    async def fail(incoming: Incoming) -> None:
        heard.append(incoming)
        raise error

    async with echo(nats_url) as one:
        await one.bus.subscribe("bad", fail)

        async def is_called_again() -> bool:
            await one.peer.publish("bad", Text(text="x"))
            return len(heard) >= 2

        await eventually(is_called_again)
        await one.works()


async def test_a_handler_that_waits_for_a_cancelled_task_goes_on_with_the_next_message(nats_url: str) -> None:
    heard: list[Incoming] = []

    async def wait(incoming: Incoming) -> None:
        heard.append(incoming)
        ended = asyncio.get_running_loop().create_future()
        ended.cancel()
        await ended

    async with echo(nats_url) as one:
        await one.bus.subscribe("bad", wait)

        async def is_called_again() -> bool:
            await one.peer.publish("bad", Text(text="x"))
            return len(heard) >= 2

        await eventually(is_called_again)


async def test_a_callback_that_fails_does_not_stop_a_reconnect(nats_url: str) -> None:
    def fail() -> None:
        raise RuntimeError("x")

    async with echo(nats_url) as one:
        one.bus._reconnected.insert(0, fail)
        await one.bus._client.reconnect()
        await eventually(lambda: len(one.reconnects) == 1)
        await one.works()


class Collector:
    """The parser's client: what it was given."""

    def __init__(self) -> None:
        self.got: list[tuple[int, bytes, bytes, bytes, bytes]] = []

    async def _process_msg(self, *message: object) -> None:
        self.got.append(message)  # type: ignore[arg-type]

    async def _process_ping(self) -> None:
        self.got.append((0, b"ping", b"", b"", b""))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_messages_are_parsed_alike_however_they_are_cut(size: int) -> None:
    stream = (
        b"MSG a.b 7 5\r\n12\r\n5\r\nPING\r\nMSG a 8 r\x0b1 0\r\n\r\nHMSG s 9 reply 12 14\r\nNATS/1.0\r\n\r\nab\r\n"
        b"HMSG s 9 0 2\r\nab\r\n+OK\r\n"
    )
    collector = Collector()
    parser = TolerantParser(collector)
    for start in range(0, len(stream), size):
        await parser.parse(stream[start : start + size])
    assert collector.got == [
        (7, b"a.b", b"", b"12\r\n5", b""),
        (0, b"ping", b"", b"", b""),
        (8, b"a", b"r\x0b1", b"", b""),
        (9, b"s", b"reply", b"ab", b"NATS/1.0\r\n\r\n"),
        (9, b"s", b"", b"ab", b""),
    ]
    assert not parser.buf
