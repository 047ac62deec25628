"""Requests that together need more KV than the pool has: each goes on where it can, and every token is right."""

import asyncio
import re
from collections.abc import Callable

import httpx

from tests.harness import System
from tests.system.client import greedy, post, prompt_of, streaming, token_ids

NUM_REQUESTS = 6
NUM_TOKENS = 150


def test_a_full_pool_loses_and_changes_nothing(start_system: Callable[..., System]) -> None:
    """A pool of about 200 tokens serves six requests of 170 tokens each, which are accepted for 32 tokens at a time.
    The one that came first is never preempted.
    """
    settings = {"kv_pool_bytes": 2**20, "decode_reserve_tokens": 32, "lease_s": 2.0}
    system = start_system(settings=settings)
    requests = [greedy(prompt_of(20, start=number), NUM_TOKENS) for number in range(NUM_REQUESTS)]
    alone = [token_ids(post(system.url, request)) for request in requests]

    async def others() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
            posts = [client.post(f"{system.url}/v1/completions", json=one) for one in requests[1:]]
            return await asyncio.gather(*posts)

    with streaming(system.url, requests[0]) as first:
        first.read(1)
        answers = asyncio.run(others())
        assert [first.read(), *map(token_ids, answers)] == alone
    preempted = re.findall(r"Request (\S+)\.\d+ has failed here: the KV pool is full", log_of(system))
    assert preempted
    assert first.request_id not in preempted
    system.wait_until_nothing_is_held()


def log_of(system: System) -> str:
    return (system.folder / "decode-0.log").read_text()
