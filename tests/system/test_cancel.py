"""A client that goes, at whatever point, leaves nothing behind: no slot, no block, nobody's turn in a line.

The requests would go on for minutes if nobody cancelled them: far longer than the tests wait.
"""

import asyncio
import json
import random
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import running_system
from tests.harness import TIMEOUT_S, System, wait_until
from tests.system.client import (
    Json,
    asking,
    greedy,
    nats_client,
    next_message,
    post,
    prompt_of,
    streaming,
    token_ids,
)
from tests.system.models import ENDLESS, endless_model

LONG_PROMPT = prompt_of(12_000)
"""Many steps of prefill: there is time to see it and to go."""

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system of one slot each, whose model can go on for very long."""
    folder = tmp_path_factory.mktemp("narrow")
    settings = {"prefill_slots": 1, "decode_slots": 1, "max_step_tokens": 16, "kv_pool_bytes": 2**30}
    with running_system(folder, model=endless_model(folder), settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system with as many slots as usual, and that model."""
    folder = tmp_path_factory.mktemp("wide")
    with running_system(folder, model=endless_model(folder), settings={"kv_pool_bytes": 2**31}) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_held(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    running: System = request.getfixturevalue("narrow" if "narrow" in request.fixturenames else "wide")
    running.wait_until_nothing_is_held()
    assert waiting(running) == 0
    assert len(token_ids(post(running.url, greedy("def main():", 8)))) == 8


def waiting(system: System) -> int:
    """How many requests stand in the gateway's line for prefill."""
    return sum(one.waiting_requests for one in system.status().gateways)


def test_while_tokens_stream(narrow: System) -> None:
    with streaming(narrow.url, greedy("x", ENDLESS)) as answer:
        answer.read(10)


def test_before_the_first_token(narrow: System) -> None:
    with asking(narrow.url, greedy(LONG_PROMPT, ENDLESS, stream=True)):
        wait_until(lambda: narrow.slots_used("prefill") == 1)


@pytest.mark.parametrize("stream", [True, False])
def test_in_the_line_for_prefill(narrow: System, stream: bool) -> None:
    with asking(narrow.url, greedy(LONG_PROMPT, ENDLESS)):
        wait_until(lambda: narrow.slots_used("prefill") == 1)
        with asking(narrow.url, greedy("y", ENDLESS, stream=stream)):
            wait_until(lambda: waiting(narrow) == 1)
        wait_until(lambda: waiting(narrow) == 0)


def test_in_the_line_for_decode(narrow: System) -> None:
    with streaming(narrow.url, greedy("x", ENDLESS)) as first:
        first.read(10)
        with streaming(narrow.url, greedy("y", ENDLESS)) as second:
            second.read(1)
            wait_until(lambda: narrow.slots_used("prefill") == 1)
        wait_until(lambda: narrow.slots_used("prefill") == 0)
        assert narrow.slots_used("decode") == 1
        first.read(len(first.token_ids) + 1)


def test_an_answer_that_is_not_streamed(narrow: System) -> None:
    with asking(narrow.url, greedy("x", ENDLESS)):
        wait_until(lambda: narrow.slots_used("decode") == 1)


async def test_by_message(narrow: System) -> None:
    async with nats_client(narrow.nats_url) as client:
        answer = await client.send({"id": "mine", "prompt": "x", "max_tokens": ENDLESS, "ignore_eos": True})
        assert (await next_message(answer))["type"] == "chunk"
        for request_id in ("nobody's", "mine", "mine"):
            cancel = {"id": request_id, "inbox": answer.subject}
            await client.connection.publish("pdserve.v1.cancel", json.dumps(cancel).encode())
        message: Json = {"type": "chunk"}
        while message["type"] == "chunk":
            message = await next_message(answer)
        assert message["type"] == "error"
        assert message["error"]["code"] == "cancelled"  # type: ignore[index]
        await asyncio.to_thread(narrow.wait_until_nothing_is_held)
        assert answer.pending_msgs == 0, "something follows the terminal message"


async def test_an_inbox_that_is_gone(narrow: System) -> None:
    async with nats_client(narrow.nats_url) as client:
        answer = await client.send({"prompt": "x", "max_tokens": ENDLESS, "ignore_eos": True})
        await next_message(answer)
        await answer.unsubscribe()
        await asyncio.to_thread(narrow.wait_until_nothing_is_held)


async def test_many_while_they_are_handed_over(wide: System) -> None:
    """The first tokens come, so decode is being asked, or the KV is about to be fetched, on the wire, or just there."""
    dice = random.Random(3408)

    async def go_after(client: httpx.AsyncClient, prompt: list[int], num_events: int) -> None:
        async with client.stream("POST", "/v1/completions", json=greedy(prompt, ENDLESS, stream=True)) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                num_events -= bool(line)
                if num_events == 0:
                    break

    async with async_client(wide) as client:
        for length in (50, 600, 50, 600, 50, 50, 50):
            async with asyncio.TaskGroup() as tasks:
                for number in range(12):
                    tasks.create_task(go_after(client, prompt_of(length, number), dice.choice([1, 1, 1, 2, 5, 20])))


async def test_a_burst_at_random_moments(wide: System) -> None:
    request = greedy(prompt_of(100), 50)
    expected = token_ids(await asyncio.to_thread(post, wide.url, request))
    dice = random.Random(8408)

    async def go_sometime(client: httpx.AsyncClient) -> None:
        prompt = prompt_of(dice.choice([1, 16, 100, 700, 2000]), dice.randrange(3000))
        request = greedy(prompt, dice.choice([1, 30, ENDLESS]), stream=dice.random() < 0.7)
        patience_s = dice.choice([0.0, dice.uniform(0.0, 0.2), dice.uniform(0.0, 3.0)])
        try:
            async with asyncio.timeout(patience_s):
                response = await client.post("/v1/completions", json=request)
                assert response.status_code == 200
        except TimeoutError:
            pass

    async with async_client(wide) as client, asyncio.TaskGroup() as tasks:
        for _ in range(40):
            tasks.create_task(go_sometime(client))
    await asyncio.to_thread(wide.wait_until_nothing_is_held)
    assert token_ids(await asyncio.to_thread(post, wide.url, request)) == expected


def async_client(system: System) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=system.url, timeout=TIMEOUT_S, trust_env=False, limits=limits)
