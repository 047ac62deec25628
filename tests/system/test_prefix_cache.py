"""What requests have in common is computed once, sent once, and shows in usage and metrics."""

import re

import httpx
import pytest
from openai import OpenAI

from tests.harness import System, wait_until
from tests.system.client import greedy, nats_client, post, prompt_of, token_ids

QUESTION = [{"role": "user", "content": "Which of these words is about caches of prefixes? " * 4}]


def cached_tokens(answer: httpx.Response) -> int:
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def metric(system: System, name: str) -> float:
    page = httpx.get(f"{system.url}/metrics", trust_env=False).text
    found = re.search(rf'^pdserve_prefix_cache_{name}_tokens_total{{scenario="default"}} (\S+)$', page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def hit_tokens(system: System, role: str) -> int:
    return sum(one.cache_hit_tokens for one in system.live() if one.role == role)


def test_a_request_that_comes_again_finds_its_prompt(system: System) -> None:
    request = greedy(prompt_of(100, start=1701), 10)
    queries, hits = metric(system, "query"), metric(system, "hit")
    first = post(system.url, request)
    again = post(system.url, request)
    assert token_ids(again) == token_ids(first)
    assert (cached_tokens(first), cached_tokens(again)) == (0, 96)
    assert (metric(system, "query") - queries, metric(system, "hit") - hits) == (200, 96)
    system.wait_until_nothing_is_held()
    assert all(one.blocks_cached > 0 for one in system.live())


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_reads_cached_tokens(system: System, stream: bool) -> None:
    with OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        wishes = {"model": "demo", "messages": QUESTION, "max_tokens": 3, "temperature": 0}
        whole = client.chat.completions.create(**wishes)  # type: ignore[call-overload]
        if stream:
            usage = {"stream": True, "stream_options": {"include_usage": True}}
            *_, again = client.chat.completions.create(**wishes, **usage)  # type: ignore[call-overload]
        else:
            again = client.chat.completions.create(**wishes)  # type: ignore[call-overload]
    assert again.usage.prompt_tokens == whole.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens == (whole.usage.prompt_tokens - 1) // 16 * 16 > 0


async def test_over_nats(system: System) -> None:
    request = {"prompt_token_ids": prompt_of(50, start=1601), "max_tokens": 3, "temperature": 0}
    async with nats_client(system.nats_url) as client:
        usages = [(await client.answer(request))[-1]["usage"] for _ in range(2)]
    assert [usage["cached_tokens"] for usage in usages] == [0, 48]  # type: ignore[index]


def test_the_second_turn_of_a_conversation_is_not_sent_again(system: System) -> None:
    """Decode has the first turn with its answer, of which prefill has but the prompt."""
    prompt = prompt_of(40, start=1501)
    answer = token_ids(post(system.url, greedy(prompt, 30)))
    system.wait_until_nothing_is_held()  # for longer than the status is behind
    before = hit_tokens(system, "decode")
    turn = greedy([*prompt, *answer, *prompt_of(10, start=1401)], 20)
    second = post(system.url, turn)
    assert cached_tokens(second) == 32
    wait_until(lambda: hit_tokens(system, "decode") - before == 64)
    assert token_ids(post(system.url, turn)) == token_ids(second)
