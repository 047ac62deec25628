"""Requests with an Idempotency-Key: retries join, at this gateway or another one, and what fails is computed again."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import httpx
import pytest
from openai import AsyncOpenAI

from services.gateway.api import ApiContext
from services.gateway.openai import idempotency
from services.gateway.openai.idempotency import Answer
from shared.errors import InstanceFailed, NoInstance, RegistryUnavailable, SlowClient
from shared.messages.records import GatewayRecord
from shared.registry import registry
from shared.registry.idempotency import RedisIdempotencyIndex
from tests.gateway.openai.conftest import MODEL, serving
from tests.gateway.openai.fake_core import FakeCore
from tests.harness import eventually, free_port

PATH = "/v1/completions"
TEXT = {"model": MODEL, "prompt": "Hi", "max_tokens": 9}
KEY = {"idempotency-key": "key 1"}


@dataclass
class Index:
    """One gateway's view of an index that all share."""

    address: str
    claims: dict[str, str] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    is_away: bool = False

    async def claim(self, key_hash: str, *, instead_of: str | None = None) -> str | None:
        if self.is_away:
            raise RegistryUnavailable("away")
        address = self.claims.get(key_hash, self.address)
        if address in (self.address, instead_of) or address in self.dead:
            self.claims[key_hash] = self.address
            return None
        return address

    async def release(self, key_hash: str) -> None:
        if self.is_away:
            raise RegistryUnavailable("away")
        if self.claims.get(key_hash) == self.address:
            del self.claims[key_hash]


@asynccontextmanager
async def streaming(http: httpx.AsyncClient, **fields: object) -> AsyncIterator[AsyncIterator[str]]:
    async with http.stream("POST", PATH, json={**TEXT, "stream": True, **fields}, headers=KEY, timeout=30) as response:
        assert response.status_code == 200
        yield response.aiter_lines()


async def texts_of(lines: AsyncIterator[str]) -> list[str]:
    """Events of a stream, with their ids, to the end."""
    return [line async for line in lines if line.startswith("data: ")]


async def test_a_retry_gets_the_finished_answer(http: httpx.AsyncClient, core: FakeCore) -> None:
    for stream in (False, True):
        core.calls.clear()
        headers = {"idempotency-key": f"key {stream}"}
        answers = [await http.post(PATH, json={**TEXT, "stream": stream}, headers=headers) for _ in range(3)]
        assert len(core.calls) == 1
        assert len({answer.text for answer in answers}) == 1
        assert len({answer.headers["content-type"] for answer in answers}) == 1
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3


async def test_the_openai_client_can_retry(client: AsyncOpenAI, core: FakeCore) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answers = [
        await client.chat.completions.create(model=MODEL, messages=messages, extra_headers=KEY)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert len(core.calls) == 1


async def test_a_retry_joins_the_running_answer_from_its_beginning(http: httpx.AsyncClient, core: FakeCore) -> None:
    gate = asyncio.Event()
    core.script = lambda call: [10, 11, gate, 12, 13]
    async with streaming(http) as first, streaming(http) as second:
        beginnings = [[line async for line in _take(lines, 2)] for lines in (first, second)]
        assert beginnings[0] == beginnings[1]
        gate.set()
        ends = [await texts_of(lines) for lines in (first, second)]
    assert ends[0] == ends[1]
    assert ends[0][-1] == "data: [DONE]"
    assert len(core.calls) == 1


async def _take(lines: AsyncIterator[str], number: int) -> AsyncIterator[str]:
    while number:
        line = await anext(lines)
        if line.startswith("data: "):
            number -= 1
            yield line


async def test_a_client_that_goes_can_come_back(
    http: httpx.AsyncClient, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    core.script = lambda call: [10, gate, 11, 12]
    async with streaming(http) as lines:
        [first] = [line async for line in _take(lines, 1)]
    gate.set()
    answer = await http.post(PATH, json={**TEXT, "stream": True}, headers=KEY)
    assert first in answer.text
    assert "[DONE]" in answer.text
    assert len(core.calls) == 1


async def test_an_answer_that_nobody_follows_is_cancelled_after_a_while(
    http: httpx.AsyncClient, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "GRACE_S", 0.05)
    core.script = lambda call: [10, asyncio.Event(), 11]
    async with streaming(http) as lines:
        [line async for line in _take(lines, 1)]
    await eventually(lambda: core.calls[0].is_closed)
    core.script = lambda call: [10, 11]
    assert (await http.post(PATH, json=TEXT, headers=KEY)).status_code == 200
    assert len(core.calls) == 2


async def test_answers_that_nobody_follows_are_few(
    http: httpx.AsyncClient, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "MAX_UNFOLLOWED", 2)
    core.script = lambda call: [10, asyncio.Event(), 11]
    for number in range(4):
        headers = {"idempotency-key": f"{number}"}
        async with http.stream("POST", PATH, json={**TEXT, "stream": True}, headers=headers) as response:
            [line async for line in _take(response.aiter_lines(), 1)]
        await eventually(lambda number=number: core.calls[max(0, number - 2)].is_closed == (number >= 2))
    assert [call.is_closed for call in core.calls] == [True, True, False, False]


async def test_another_request_with_the_same_key_is_rejected(http: httpx.AsyncClient, core: FakeCore) -> None:
    assert (await http.post(PATH, json=TEXT, headers=KEY)).status_code == 200
    for path, body, headers in [
        (PATH, {**TEXT, "prompt": "Ho"}, KEY),
        (PATH, TEXT, {**KEY, "x-priority": "batch"}),
        ("/v1/chat/completions", TEXT, KEY),
    ]:
        answer = await http.post(path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
    answer = await http.post(PATH, json={**TEXT, "prompt": "Ho"}, headers={**KEY, "authorization": "Bearer other"})
    assert answer.status_code == 200
    for bad in ("", "x" * 256):
        answer = await http.post(PATH, json=TEXT, headers={"idempotency-key": bad})
        assert (answer.status_code, "Idempotency-Key" in answer.text) == (400, True)


async def test_what_failed_is_computed_again(
    http: httpx.AsyncClient, core: FakeCore, caplog: pytest.LogCaptureFixture
) -> None:
    for steps, status in [
        ([NoInstance("nobody", retry_after_s=1.0)], 503),
        ([10, InstanceFailed("broken")], 500),
        ([10, RuntimeError("a secret")], 500),
    ]:
        core.script = lambda call, steps=steps: steps
        answer = await http.post(PATH, json=TEXT, headers=KEY)
        assert answer.status_code == status
        assert "secret" not in answer.text
    core.script = lambda call: [10, InstanceFailed("broken on the way")]
    answer = await http.post(PATH, json={**TEXT, "stream": True}, headers=KEY)
    assert "broken on the way" in answer.text
    assert (await http.post(PATH, json={**TEXT, "max_tokens": 0}, headers=KEY)).status_code == 400
    core.script = lambda call: [10, 11]
    assert (await http.post(PATH, json=TEXT, headers=KEY)).status_code == 200


async def test_kept_answers_are_bounded(
    http: httpx.AsyncClient, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "MAX_KEPT_ANSWERS", 2)
    for number in (0, 1, 2, 0):
        await http.post(PATH, json=TEXT, headers={"idempotency-key": f"{number}"})
    assert len(core.calls) == 4
    await http.post(PATH, json=TEXT, headers={"idempotency-key": "2"})
    assert len(core.calls) == 4
    monkeypatch.setattr(idempotency, "MAX_KEPT_BYTES", 1)
    for _ in range(2):
        await http.post(PATH, json=TEXT, headers={"idempotency-key": "3"})
        await http.post(PATH, json=TEXT, headers={"idempotency-key": "4"})
    assert len(core.calls) == 8


async def test_an_answer_that_is_too_large_is_not_kept_and_a_slow_client_ends() -> None:
    answer = Answer("key", b"")
    await answer.send({"type": "http.response.start", "status": 200, "headers": []})
    size = idempotency.MAX_ANSWER_BYTES // 2
    received: list[int] = []

    async def read(message: dict[str, object]) -> None:
        received.append(len(message.get("body", b"")))  # type: ignore[arg-type]

    async def read_slowly(message: dict[str, object]) -> None:
        await asyncio.sleep(0)
        if message["type"] == "http.response.body":
            await is_over.wait()

    is_over = asyncio.Event()
    slow = asyncio.create_task(answer.replay(read_slowly))  # type: ignore[arg-type]
    quick = asyncio.create_task(answer.replay(read))  # type: ignore[arg-type]
    for number in range(8):
        await answer.send({"type": "http.response.body", "body": bytes(size), "more_body": number < 7})
        await asyncio.sleep(0.01)
    is_over.set()
    await quick
    assert sum(received) == 8 * size
    assert not answer.is_joinable
    assert answer.num_bytes <= 3 * size
    with pytest.raises(SlowClient):
        await slow


@asynccontextmanager
async def two_gateways(
    api: ApiContext, core: FakeCore
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, Index, Index]]:
    """Two gateways with cores of their own: `core` is the first one's."""
    claims: dict[str, str] = {}
    ports = [free_port(), free_port()]
    first, second = (Index(f"http://127.0.0.1:{port}", claims) for port in ports)
    other = replace(api, core=FakeCore(script=lambda call: [20, 21]))
    async with (
        serving(api, first, http_port=ports[0]),
        serving(other, second, http_port=ports[1]),
        httpx.AsyncClient(base_url=first.address, trust_env=False) as http_1,
        httpx.AsyncClient(base_url=second.address, trust_env=False) as http_2,
    ):
        yield http_1, http_2, first, second


async def test_another_gateway_has_the_answer(api: ApiContext, core: FakeCore) -> None:
    gate = asyncio.Event()
    core.script = lambda call: [10, gate, 11, 12]
    async with two_gateways(api, core) as (http_1, http_2, _, _):
        async with streaming(http_1) as lines:
            [first] = [line async for line in _take(lines, 1)]
        async with streaming(http_2) as lines:
            assert [line async for line in _take(lines, 1)] == [first]
            gate.set()
            events = await texts_of(lines)
        assert events[-1] == "data: [DONE]"
        assert len(core.calls) == 1
        conflict = await http_2.post(PATH, json={**TEXT, "prompt": "Ho"}, headers={"idempotency-key": "key 1"})
        assert conflict.status_code == 409


async def test_a_conflict_at_another_gateway_is_passed_on(api: ApiContext, core: FakeCore) -> None:
    async with two_gateways(api, core) as (http_1, http_2, _, _):
        assert (await http_1.post(PATH, json=TEXT, headers=KEY)).status_code == 200
        for _ in range(2):
            answer = await http_2.post(PATH, json={**TEXT, "prompt": "Ho"}, headers=KEY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert (await http_2.post(PATH, json=TEXT, headers=KEY)).status_code == 200
        assert len(core.calls) == 1


@pytest.mark.parametrize("is_known_dead", [True, False])
async def test_a_dead_gateways_answer_is_computed_again(api: ApiContext, core: FakeCore, is_known_dead: bool) -> None:
    index = Index("http://127.0.0.1:1")
    gone = f"http://127.0.0.1:{free_port()}"
    async with (
        serving(api, index) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        await http.post(PATH, json=TEXT, headers=KEY)
        [key_hash] = index.claims
    index.claims[key_hash] = gone
    if is_known_dead:
        index.dead.add(gone)
    async with (
        serving(api, index) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        assert (await http.post(PATH, json=TEXT, headers=KEY)).status_code == 200
    assert index.claims[key_hash] == index.address
    assert len(core.calls) == 2


@pytest.mark.parametrize("num_sent", [0, 1])
async def test_a_gateway_that_dies_while_its_answer_is_fetched(
    api: ApiContext, core: FakeCore, num_sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first byte, the answer is computed here; after that, the client hears that it has to ask again."""
    monkeypatch.setattr(idempotency, "CHECK_S", 0.05)
    core.script = lambda call: [*[10] * num_sent, asyncio.Event(), 11]
    async with two_gateways(api, core) as (http_1, http_2, first, second):
        asking = asyncio.create_task(http_1.post(PATH, json={**TEXT, "stream": True}, headers=KEY))
        await eventually(lambda: core.calls and core.calls[0].num_given == num_sent)
        retrying = asyncio.create_task(http_2.post(PATH, json={**TEXT, "stream": True}, headers=KEY))
        await asyncio.sleep(0.3)
        assert not retrying.done()
        second.dead.add(first.address)
        answer = await retrying
        asking.cancel()
    if num_sent:
        assert "send the request again with the same key" in answer.text
    else:
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_gateways_find_each_others_answers_in_redis(api: ApiContext, core: FakeCore, redis_url: str) -> None:
    ports = [free_port(), free_port()]
    other_core = FakeCore(script=lambda call: [20, 21])
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=10.0) as records:
        indexes = []
        for port in ports:
            address = f"http://127.0.0.1:{port}"
            await records.write_gateway(record_of(f"gateway-{port}", address))
            indexes.append(RedisIdempotencyIndex(records, f"gateway-{port}", address, ttl_s=600.0))
        async with (
            serving(api, indexes[0], http_port=ports[0]),
            serving(replace(api, core=other_core), indexes[1], http_port=ports[1]),
            httpx.AsyncClient(trust_env=False) as http,
        ):
            urls = [f"http://127.0.0.1:{port}{PATH}" for port in ports]
            first, second = [await http.post(url, json=TEXT, headers=KEY) for url in urls]
            assert first.text == second.text
            assert (len(core.calls), other_core.calls) == (1, [])
            await http.post(urls[0], json=TEXT, headers={"idempotency-key": "key 2"})
            await records.remove_gateway(record_of(f"gateway-{ports[0]}", urls[0]))
            answer = await http.post(urls[1], json=TEXT, headers={"idempotency-key": "key 2"})
            assert answer.status_code == 200
            assert len(other_core.calls) == 1


async def test_a_retry_after_a_restart_on_the_same_port_is_computed_again(
    api: ApiContext, core: FakeCore, redis_url: str
) -> None:
    """The record of the process that was killed is still there, under the address of this one."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    async with registry.connect(redis_url, ttl_s=60.0, timeout_s=10.0) as records:
        for gateway_id in ("killed", "restarted"):
            await records.write_gateway(record_of(gateway_id, address))
        before, now = (
            RedisIdempotencyIndex(records, gateway_id, address, ttl_s=600.0) for gateway_id in ("killed", "restarted")
        )
        async with serving(api, before, http_port=port), httpx.AsyncClient(trust_env=False) as http:
            assert (await http.post(address + PATH, json=TEXT, headers=KEY)).status_code == 200
        async with serving(api, now, http_port=port), httpx.AsyncClient(trust_env=False, timeout=10) as http:
            assert (await http.post(address + PATH, json=TEXT, headers=KEY)).status_code == 200
    assert len(core.calls) == 2


def record_of(gateway_id: str, address: str) -> GatewayRecord:
    return GatewayRecord(
        id=gateway_id,
        pid=1,
        host="here",
        version="1",
        started_at=0.0,
        heartbeat=1,
        address=address,
        open_requests=0,
        waiting_requests=0,
    )


async def test_without_the_index_answers_are_computed_here(api: ApiContext, core: FakeCore) -> None:
    index = Index("http://127.0.0.1:1", is_away=True)
    async with (
        serving(api, index) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        for _ in range(2):
            assert (await http.post(PATH, json=TEXT, headers=KEY)).status_code == 200
        core.script = lambda call: [NoInstance("nobody")]
        assert (await http.post(PATH, json=TEXT, headers={"idempotency-key": "2"})).status_code == 503
    assert len(core.calls) == 2


async def test_a_client_is_told_that_the_gateway_ends(api: ApiContext, core: FakeCore) -> None:
    core.script = lambda call: [10, asyncio.Event(), 12]
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        async with serving(api) as port:
            url = f"http://127.0.0.1:{port}{PATH}"
            asking = asyncio.create_task(client.post(url, content=json.dumps(TEXT), headers=KEY))
            await eventually(lambda: core.calls and core.calls[0].num_given == 1)
        answer = await asking
    assert core.calls[0].is_closed
    assert (answer.status_code, "This gateway is ending" in answer.text) == (503, True)
