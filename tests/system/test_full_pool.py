"""Requests that together need more KV than the pool has: each goes on where it can, and every token is right."""

import asyncio
from collections.abc import Callable

import httpx

from tests.harness import System
from tests.system.client import greedy, post, prompt_of, token_ids

NUM_REQUESTS = 6
NUM_TOKENS = 150


def test_a_full_pool_loses_and_changes_nothing(start_system: Callable[..., System]) -> None:
    """A pool of about 200 tokens serves six requests of 170 tokens each, which are accepted for 32 tokens at a time."""
    system = start_system(settings={"kv_pool_bytes": 2**20, "decode_reserve_tokens": 32, "lease_s": 2.0})
    requests = [greedy(prompt_of(20, start=number), NUM_TOKENS) for number in range(NUM_REQUESTS)]
    alone = [token_ids(post(system.url, request)) for request in requests]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
            return await asyncio.gather(*(client.post(f"{system.url}/v1/completions", json=one) for one in requests))

    assert [token_ids(answer) for answer in asyncio.run(together())] == alone
    assert "the KV pool is full" in (system.folder / "decode-0.log").read_text()
    system.wait_until_nothing_is_held()
