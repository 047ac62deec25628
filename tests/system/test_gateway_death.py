"""A gateway dies at once, and nobody waits for it: clients of the NATS API hear of it from another gateway, clients of
the HTTP API send their request again with the same Idempotency-Key, and instances release what it used.
"""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from nats.aio.subscription import Subscription

from tests.conftest import running_system
from tests.harness import TIMEOUT_S, System, wait_until
from tests.system.client import Json, nats_client, next_message, prompt_of
from tests.system.models import ENDLESS, endless_model

NUM_SLOTS = 2
NUM_REQUESTS = 8
"""More than there are slots: the others wait in the gateway."""

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("death")
    settings = {"prefill_slots": NUM_SLOTS, "decode_slots": NUM_SLOTS, "kv_pool_bytes": 2**30, "native_kernels": False}
    with running_system(folder, model=endless_model(folder), settings=settings, num_gateways=2) as running:
        yield running


@pytest.fixture
def system(shared: System) -> Iterator[System]:
    yield shared
    for child in shared.children:
        if child.exit_code() is not None:
            child.start()
    shared.wait_until_ready()
    shared.wait_until_nothing_is_held()


def kill(system: System, number: int) -> None:
    """Ends a gateway as `kill -9` does."""
    gateway = system.gateways[number]
    gateway.kill()
    wait_until(lambda: gateway.exit_code() is not None)


async def ends(answers: list[Subscription]) -> list[Json]:
    """The terminal message of each answer; nothing follows it."""

    async def end(answer: Subscription) -> Json:
        while (message := await next_message(answer))["type"] == "chunk":
            pass
        return message

    found = await asyncio.gather(*(end(answer) for answer in answers))
    assert all(answer.pending_msgs == 0 for answer in answers), "something follows a terminal message"
    return found


def waiting(system: System) -> int:
    return sum(one.waiting_requests for one in system.status().gateways)


@pytest.mark.parametrize("is_restarted", [False, True], ids=["another gateway", "restarted"])
async def test_clients_of_the_nats_api_get_an_error(system: System, is_restarted: bool) -> None:
    """Some streams are open, and some requests wait for a slot: each gets one terminal message, and none waits."""
    kill(system, 1)  # so that the other one serves all of the following
    async with nats_client(system.nats_url) as client:
        request: Json = {"prompt": "x", "max_tokens": ENDLESS, "ignore_eos": True, "timeout_s": TIMEOUT_S}
        answers = [await client.send({**request, "id": f"open-{number}"}) for number in range(NUM_REQUESTS)]
        for answer in answers[:NUM_SLOTS]:
            assert (await next_message(answer))["type"] == "chunk"
        await asyncio.to_thread(wait_until, lambda: waiting(system) >= NUM_REQUESTS - 2 * NUM_SLOTS)
        if not is_restarted:
            system.gateways[1].start()
            await asyncio.to_thread(system.wait_until_ready)
        await asyncio.to_thread(kill, system, 0)
        if is_restarted:
            system.gateways[0].start()
        found = await ends(answers)
        assert [message["type"] for message in found] == ["error"] * NUM_REQUESTS
        assert [message["index"] for message in found] == [-1] * NUM_REQUESTS
        assert {message["id"] for message in found} == {f"open-{number}" for number in range(NUM_REQUESTS)}
        assert {message["error"]["code"] for message in found} == {"internal_error"}  # type: ignore[index]
        await asyncio.to_thread(system.wait_until_nothing_is_held)
        assert all(answer.pending_msgs == 0 for answer in answers), "something follows a terminal message"
        again = await client.answer({**request, "id": "open-0", "max_tokens": 3})
        assert again[-1]["type"] == "done"


async def test_clients_of_the_other_gateway_notice_nothing(system: System) -> None:
    async with nats_client(system.nats_url) as client:
        fields: Json = {"prompt_token_ids": prompt_of(40), "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        kill(system, 0)
        answer = await client.send(fields)
        assert (await next_message(answer))["type"] == "chunk"
        system.gateways[0].start()
        await asyncio.to_thread(system.wait_until_ready)
        await asyncio.to_thread(kill, system, 0)
        [end] = await ends([answer])
        assert end["type"] == "done"
        assert end["usage"]["completion_tokens"] == 300  # type: ignore[index]


@pytest.mark.parametrize("num_tokens", [1, 40])
async def test_what_a_dead_gateway_used_is_released(system: System, num_tokens: int) -> None:
    """Its clients are clients of the HTTP API, of which no other gateway knows."""
    body = completion(max_tokens=ENDLESS, prompt=prompt_of(4000), stream=True)

    async def stream_until_death() -> None:
        async with (
            httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as http,
            http.stream("POST", f"{system.url}/v1/completions", json=body) as response,
        ):
            lines = response.aiter_lines()
            for _ in range(num_tokens):
                await anext(lines)
            await asyncio.to_thread(kill, system, 0)
            async for _ in lines:
                pass

    with pytest.raises(httpx.TransportError):
        await stream_until_death()
    await asyncio.to_thread(system.wait_until_nothing_is_held)


async def test_a_retry_at_another_gateway_joins_the_running_answer(system: System) -> None:
    """Sampling is random, so equal tokens are the same answer."""
    body = completion(max_tokens=300, temperature=1.0)
    headers = {"Idempotency-Key": "joined"}
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as http:

        async def ask(number: int) -> Json:
            response = await http.post(f"{system.url_of(number)}/v1/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
            answer: Json = response.json()
            return answer

        first = asyncio.create_task(ask(0))
        await asyncio.to_thread(wait_until, lambda: system.slots_used("decode") == 1)
        second = await ask(1)
        assert not await asyncio.to_thread(lambda: system.slots_used("decode") > 1)
        assert second == await first
        assert await ask(1) == second, "a finished answer is kept"


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.9, "seed": 7}], ids=["greedy", "seed"])
async def test_a_retry_after_the_gateways_death_gives_the_same(system: System, fields: Json) -> None:
    body = completion(max_tokens=300, **fields)
    headers = {"Idempotency-Key": f"dead {fields}"}
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as http:
        expected = await token_ids(http, system.url_of(1), body, {})
        asking = asyncio.create_task(token_ids(http, system.url, body, headers))
        await asyncio.to_thread(wait_until, lambda: system.slots_used("decode") == 1)
        await asyncio.to_thread(kill, system, 0)
        with pytest.raises(httpx.TransportError):
            await asking
        assert await token_ids(http, system.url_of(1), body, headers) == expected


def completion(**fields: object) -> Json:
    return {"model": "demo", "prompt": prompt_of(40), "ignore_eos": True, "return_token_ids": True, **fields}


async def token_ids(http: httpx.AsyncClient, url: str, body: Json, headers: dict[str, str]) -> list[int]:
    response = await http.post(f"{url}/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    found: list[int] = response.json()["choices"][0]["token_ids"]
    return found
