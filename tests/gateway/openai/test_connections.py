"""Connections as clients treat them: slow, silent, endless, too many, of other versions. Sockets without a library."""

import asyncio
import contextlib
import gzip
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from services.gateway.api import ApiContext
from tests.gateway.openai.conftest import MODEL, serving
from tests.gateway.openai.fake_core import FakeCore
from tests.harness import eventually

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": MODEL, "prompt": "Hi"}


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


def post(body: bytes, *headers: str, version: str = "1.1", path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def encoded(fields: object) -> bytes:
    return json.dumps(fields).encode()


async def response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a response that has a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(status.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def test_a_silent_connection_is_closed(api: ApiContext) -> None:
    async with serving(api, http_read_timeout_s=0.2) as port, connected(port) as (reader, _):
        assert await reader.read() == b""


async def test_a_slow_head_and_a_slow_body_get_408(api: ApiContext, core: FakeCore) -> None:
    whole = post(encoded(TEXT))
    for sent in (whole[:30], whole[:-5]):
        async with serving(api, http_read_timeout_s=0.3) as port, connected(port) as (reader, writer):
            writer.write(sent)
            status, headers, body = await response(reader)
            assert status == 408
            assert json.loads(body)["error"]["code"] == "request_timeout"
            assert headers["connection"] == "close"
            assert await reader.read() == b""
    assert core.calls == []


async def test_a_body_that_nobody_reads_and_that_never_ends_is_cut(api: ApiContext) -> None:
    async with serving(api, http_read_timeout_s=0.2) as port, connected(port) as (reader, writer):
        writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n1")
        status, _, _ = await response(reader)
        assert status == 404
        assert await reader.read() == b""


async def test_an_idle_connection_is_closed_also_after_stray_bytes(api: ApiContext) -> None:
    async with serving(api, http_idle_timeout_s=1.0) as port:
        for stray in (b"", b"\r\n"):
            async with connected(port) as (reader, writer):
                writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await response(reader))[0] == 200
                writer.write(stray)
                assert await reader.read() == b""


async def test_a_connection_serves_several_requests(port: int) -> None:
    async with connected(port) as (reader, writer):
        for _ in range(3):
            writer.write(post(encoded(TEXT)))
            assert (await response(reader))[0] == 200
        writer.write(post(encoded(TEXT)) + post(encoded(CHAT), path="/v1/chat/completions"))
        assert b"text_completion" in (await response(reader))[2]
        assert b"chat.completion" in (await response(reader))[2]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health/live HTTP/1.1\r\nX-Long: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nX-Endless: " + b"x" * 5000,
        b"GET /health/live HTTP/1.1\r\n" + b"A: b\r\n" * 2000,
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Trailer: " + b"x" * 5000,
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 5000,
    ],
)
async def test_headers_that_are_too_large_get_431(api: ApiContext, sent: bytes) -> None:
    async with serving(api, max_header_bytes=4000) as port, connected(port) as (reader, writer):
        writer.write(sent)
        if b"chunked" in sent:  # the request is being served: the connection closes
            await reader.read()
            return
        status, _, body = await response(reader)
        assert status == 431
        assert "4000 bytes" in json.loads(body)["error"]["message"]
        assert await reader.read() == b""


async def test_what_is_not_http_gets_400(port: int) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"CONNECT x:80 HTTP/1.1\r\n\r\n"):
        async with connected(port) as (reader, writer):
            writer.write(sent)
            status, _, body = await response(reader)
            assert status == 400
            assert json.loads(body)["error"]["code"] == "invalid_request"


async def test_connections_are_bounded(api: ApiContext) -> None:
    async with serving(api, max_connections=2) as port:
        async with connected(port), connected(port), connected(port) as (reader, _):
            status, headers, body = await response(reader)
            assert (status, headers["retry-after"]) == (429, "1")
            assert "2 connections" in json.loads(body)["error"]["message"]
            async with connected(port), connected(port) as (reader, _):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""

        async def is_served() -> bool:
            async with connected(port) as (reader, writer):
                writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    return (await response(reader))[0] == 200
                return False

        await eventually(is_served)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("protocol", ["h2c", "websocket", "x"])
async def test_an_offer_to_upgrade_keeps_the_body(port: int, core: FakeCore, chunked: bool, protocol: str) -> None:
    """The HTTP client of Java sends such offers."""
    body = encoded(TEXT)
    upgrade = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAEAAEAAAAIAAAAA"]
    sent = post(body, *upgrade)
    if chunked:
        head = sent[: -len(body)].replace(f"Content-Length: {len(body)}".encode(), b"Transfer-Encoding: chunked")
        sent = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    async with connected(port) as (reader, writer):
        for cut in (len(sent), 40, len(sent) - 10, len(sent) - len(body)):
            writer.write(sent[:cut])
            await asyncio.sleep(0.01)
            writer.write(sent[cut:])
            status, _, answer = await response(reader)
            assert status == 200, answer
    assert len(core.calls) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_http_1_0_gets_no_chunks(port: int, stream: bool) -> None:
    async with connected(port) as (reader, writer):
        writer.write(post(encoded({**TEXT, "stream": stream}), version="1.0"))
        head, body = (await reader.read()).split(b"\r\n\r\n", 1)
        assert b"chunked" not in head.lower()
        assert b"connection: close" in head
        assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)["object"] == "text_completion"


@pytest.mark.parametrize("method_and_path", ["GET /v1/completions", "OPTIONS /v1/chat/completions", "POST /v1/models"])
async def test_405_names_the_allowed_methods(http: httpx.AsyncClient, method_and_path: str) -> None:
    answer = await http.request(*method_and_path.split())
    assert answer.status_code == 405
    assert answer.headers["allow"] == ("GET, HEAD" if "models" in method_and_path else "POST")


async def test_bodies_in_gzip_are_read_within_bounds(http: httpx.AsyncClient, core: FakeCore) -> None:
    async def status(content: bytes, encoding: str = "gzip") -> tuple[int, str]:
        answer = await http.post("/v1/completions", content=content, headers={"content-encoding": encoding})
        return answer.status_code, answer.text

    packed = gzip.compress(encoded(TEXT))
    assert (await status(packed))[0] == 200
    assert (await status(encoded(TEXT), "identity"))[0] == 200
    assert len(core.calls) == 2
    assert (await status(gzip.compress(b" " * 9_000_000)))[0] == 413
    for bad in (packed[:-9], packed + b"x", encoded(TEXT), b""):
        code, text = await status(bad)
        assert (code, "gzip" in text) == (400, True)
    for unsupported in ("zstd", "br", "gzip, gzip"):
        code, text = await status(packed, unsupported)
        assert (code, "unsupported_encoding" in text) == (415, True)


def test_413_reaches_a_client_that_sends_before_it_reads(port_of_thread: int) -> None:
    body = encoded({**TEXT, "user": "x" * 10_000_000})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port_of_thread}/v1/completions", body, timeout=30)
    with caught.value as error:
        assert error.code == 413
        assert b"body_too_large" in error.read()


def test_a_rejected_key_reaches_a_client_that_sends_before_it_reads(port_of_thread: int) -> None:
    body = encoded({**TEXT, "user": "x" * 6_000_000})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port_of_thread}/v1/unknown", body, timeout=30)
    with caught.value as error:
        assert error.code == 404


@pytest.fixture
def port_of_thread(api: ApiContext) -> object:
    """The API in a thread, for clients that block."""
    import threading

    ready, found = threading.Event(), []
    loop = asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        async with serving(api) as port:
            found.append(port)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait(30)
    yield found[0]
    loop.call_soon_threadsafe(done.set)
    thread.join()
    loop.close()


async def test_time_to_first_token_counts_from_the_first_byte(api: ApiContext, core: FakeCore, port: int) -> None:
    sent = post(encoded(TEXT))
    async with connected(port) as (reader, writer):
        before = time.monotonic()
        writer.write(sent[:10])
        await asyncio.sleep(0.3)
        assert core.calls == []
        writer.write(sent[10:])
        await response(reader)
    request = core.calls[0].request
    assert request.arrived_at - before < 0.25
    assert request.deadline == request.arrived_at + api.request_timeout_s
    assert api.metrics.ttft.labels("completions")._sum.get() >= 0.3


async def test_a_client_that_reads_nothing_is_disconnected(api: ApiContext, core: FakeCore) -> None:
    core.context = 2**20
    core.script = lambda call: [10] * 6_000
    body = {**CHAT, "max_tokens": 6_000, "stream": True, "logprobs": True, "top_logprobs": 20}
    async with serving(api, http_write_timeout_s=0.5) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(post(encoded(body), path="/v1/chat/completions"))
            await eventually(lambda: core.calls and core.calls[0].is_closed)
            count = api.metrics.requests.labels("chat", "cancelled")
            await eventually(lambda: count._value.get() == 1)


async def test_web_pages_of_allowed_origins_may_use_the_api(api: ApiContext) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with (
        serving(api, cors_origins="https://a.example, https://b.example") as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        preflight = await http.options("/v1/chat/completions", headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        answer = await http.post("/v1/chat/completions", json={**CHAT, "n": 0}, headers=headers)
        assert answer.status_code == 400
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        answer = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://c.example"})
        assert "access-control-allow-origin" not in answer.headers


async def test_without_the_setting_there_is_no_cors(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers
