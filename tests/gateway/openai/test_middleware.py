"""Keys, sizes, failures, clients that go, and what can be seen from outside."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
from openai import (
    APIError,
    AsyncOpenAI,
    AuthenticationError,
    InternalServerError,
    RateLimitError,
)
from starlette.types import Message, Receive, Scope, Send

from services.gateway.api import ApiContext
from services.gateway.openai.middleware import ApiMiddleware
from shared.errors import DeadlineExceeded, InstanceFailed, NoInstance, Overloaded
from tests.gateway.openai.conftest import MODEL, serving
from tests.gateway.openai.fake_core import FakeCore
from tests.harness import eventually

USER = [{"role": "user", "content": "Hi"}]
CHAT = {"model": MODEL, "messages": USER}


async def test_a_key_is_asked_for_and_compared(locked: int) -> None:
    url = f"http://127.0.0.1:{locked}"
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="first key", max_retries=0) as client:
        await client.chat.completions.create(model=MODEL, messages=USER)
    for key in ("first", "third key"):
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(AuthenticationError) as caught:
                await client.models.list()
            assert caught.value.code == "invalid_api_key"
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        for header, status in [
            ("Bearer zweiter Schlüssel", 200),
            ("bearer first key", 200),
            ("Bearer schlüssel", 401),
            ("Bearer", 401),
            ("Basic first key", 401),
        ]:
            response = await http.get("/v1/models", headers={"authorization": header.encode()})
            assert response.status_code == status
        response = await http.get("/v1/models")
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await http.get(path)).status_code == 200


async def test_a_body_that_is_too_large_is_rejected(http: httpx.AsyncClient, core: FakeCore) -> None:
    body = json.dumps({**CHAT, "user": "x" * 10_000_000}).encode()
    response = await http.post("/v1/chat/completions", content=body)
    assert response.status_code == 413
    assert "8388608 bytes" in response.json()["error"]["message"]

    async def in_pieces():  # type: ignore[no-untyped-def]
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    response = await http.post("/v1/chat/completions", content=in_pieces())
    assert response.status_code == 413
    assert core.calls == []


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(
    client: AsyncOpenAI, core: FakeCore, stream: bool
) -> None:
    for error, kind in [
        (Overloaded("full", retry_after_s=1.5), RateLimitError),
        (NoInstance("nobody"), InternalServerError),
        (DeadlineExceeded("late"), InternalServerError),
        (InstanceFailed("broken"), InternalServerError),
    ]:
        core.script = lambda call, error=error: [error]
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model=MODEL, messages=USER, stream=stream)
        assert caught.value.status_code == error.status
        assert caught.value.code == error.code
        assert caught.value.response.headers.get("retry-after") == ("2" if error.retry_after_s else None)


async def test_a_fault_of_the_program_is_told_without_its_details(
    client: AsyncOpenAI, core: FakeCore, caplog: pytest.LogCaptureFixture
) -> None:
    core.script = lambda call: [RuntimeError("a secret")]
    with pytest.raises(InternalServerError) as caught:
        await client.chat.completions.create(model=MODEL, messages=USER)
    assert "secret" not in str(caught.value)
    assert caught.value.code == "internal_error"
    assert "secret" in caplog.text


@pytest.mark.parametrize("error", [InstanceFailed("broken on the way"), RuntimeError("a secret")])
async def test_an_error_after_the_first_token_ends_the_stream(
    client: AsyncOpenAI, http: httpx.AsyncClient, core: FakeCore, error: Exception
) -> None:
    core.script = lambda call: [10, error]
    stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    chunks = aiter(stream)
    await anext(chunks)
    with pytest.raises(APIError) as caught:
        await anext(chunks)
    assert "secret" not in str(caught.value)
    response = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert '{"error":{"message":' in response.text
    assert "[DONE]" not in response.text


async def test_a_choice_that_fails_ends_the_others(client: AsyncOpenAI, core: FakeCore) -> None:
    never = asyncio.Event()
    core.script = lambda call: [10, InstanceFailed("broken")] if call.request_id.endswith("-1") else [10, never, 11]
    with pytest.raises(InternalServerError, match="broken"):
        await client.chat.completions.create(model=MODEL, messages=USER, n=3)
    assert [call.is_closed for call in core.calls] == [True] * 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", [[], [10, 11]])
async def test_a_client_that_goes_cancels_its_request(
    port: int, api: ApiContext, core: FakeCore, stream: bool, given: list[int]
) -> None:
    never = asyncio.Event()
    core.script = lambda call: [*given, never, 12]
    body = json.dumps({**CHAT, "stream": stream, "n": 2}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await eventually(lambda: [call.num_given for call in core.calls] == [len(given)] * 2)
    if stream and given:
        await reader.readuntil(b"data: ")
    assert not any(call.is_closed for call in core.calls)
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: all(call.is_closed for call in core.calls))
    count = api.metrics.requests.labels("chat", "cancelled")
    await eventually(lambda: count._value.get() == 1)


async def test_a_request_has_a_deadline(api: ApiContext, core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.openai.handler.GRACE_S", 0.05)
    core.script = lambda call: [asyncio.Event()]
    async with (
        serving(replace(api, request_timeout_s=0.05)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 504
    assert core.calls[0].is_closed


async def test_the_model_is_listed(client: AsyncOpenAI) -> None:
    [model] = (await client.models.list()).data
    assert model.id == MODEL
    assert (await client.models.retrieve(MODEL)) == model
    assert model.model_extra == {"max_model_len": 4096}


async def test_readiness_says_the_reason(http: httpx.AsyncClient, core: FakeCore) -> None:
    assert (await http.get("/health/ready")).status_code == 200
    core.reason = "no decode instance"
    response = await http.get("/health/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "no decode instance")
    assert (await http.get("/health/live")).status_code == 200


async def test_metrics_count_outcomes_and_tokens(http: httpx.AsyncClient) -> None:
    await http.post("/v1/chat/completions", json=CHAT)
    await http.post("/v1/chat/completions", json={**CHAT, "n": 0})
    lines = (await http.get("/metrics")).text.splitlines()
    assert 'pdserve_requests_total{code="ok",endpoint="chat"} 1.0' in lines
    assert 'pdserve_requests_total{code="invalid_request",endpoint="chat"} 1.0' in lines
    assert 'pdserve_requests_in_flight{endpoint="chat"} 0.0' in lines
    assert "pdserve_generated_tokens_total 3.0" in lines
    for name, count in [("ttft", 1), ("itl", 2), ("tpot", 1), ("e2e", 1)]:
        assert f'pdserve_{name}_seconds_count{{endpoint="chat"}} {count}.0' in lines


async def test_a_span_continues_the_clients_trace(api: ApiContext, core: FakeCore) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import get_current_span

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    inside = []
    core.script = lambda call: inside.append(get_current_span().get_span_context()) or [10]  # type: ignore[func-returns-value]
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with (
        serving(replace(api, tracer=provider.get_tracer("test"))) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        await http.post("/v1/chat/completions", json=CHAT, headers={"traceparent": f"00-{trace_id}-{span_id}-01"})
        core.script = lambda call: [NoInstance("nobody")]
        await http.post("/v1/chat/completions", json=CHAT)
    first, second = exporter.get_finished_spans()
    assert first.parent is not None
    assert f"{first.context.trace_id:032x}" == trace_id
    assert f"{first.parent.span_id:016x}" == span_id
    assert inside == [first.context]
    assert dict(first.attributes or {}) == {
        "pdserve.request.id": core.calls[0].request_id,
        "pdserve.model": MODEL,
        "pdserve.num_prompt_tokens": len(core.calls[0].prompt_token_ids),
        "pdserve.num_output_tokens": 1,
        "pdserve.finish_reasons": ("length",),
    }
    assert not second.status.is_ok
    provider.shutdown()


async def test_a_failure_after_the_end_of_a_response_sends_nothing_more(
    api: ApiContext, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all", "more_body": False})
        raise RuntimeError("as the test wants it")

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/health/live", "headers": []}
    await ApiMiddleware(app, api)(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["body"] == b"all"
    assert "as the test wants it" in caplog.text
