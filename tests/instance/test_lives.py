"""Requests in any order of events, over real roles, engines and small pools: no wrong token, and no block is lost."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.engine.models import Served, prompt_of
from tests.instance.world import World, world

MAX_TOKENS = 30
PREFIX = prompt_of(26)
PROMPTS = [
    PREFIX[:9],
    PREFIX,
    [*PREFIX, *prompt_of(7, seed=1)],
    [*PREFIX, *prompt_of(7, seed=2)],
    [*PREFIX[:17], *prompt_of(20, seed=3)],
    prompt_of(24, seed=4),
    prompt_of(40, seed=5),
]
SMALL = {"prefill_blocks": 14, "decode_blocks": 10}
"""Of 8 tokens: one request of 40 + 30 tokens takes 9 of them."""


@pytest.fixture(scope="module")
def answers(small_blocks: Served) -> list[list[int]]:
    """The greedy continuation of each prompt."""
    return [small_blocks.greedy(prompt, MAX_TOKENS) for prompt in PROMPTS]


def arrive(one: World, answers: list[list[int]], prompt: int, num_tokens: int) -> None:
    one.arrive(PROMPTS[prompt], answers[prompt][:num_tokens])


ARRIVAL = st.tuples(
    st.just("arrive"), st.integers(0, len(PROMPTS) - 1), st.sampled_from([1, 2, 9, 17, 25, MAX_TOKENS, MAX_TOKENS])
)
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0))
GOES_ON = st.sampled_from(["all", "all", "all", "step_prefill", "step_decode", "transfer", "expire"]).map(
    lambda name: (name, 0, 0)
)
EVENTS = st.lists(st.one_of(ARRIVAL, ARRIVAL, CANCEL, *[GOES_ON] * 5), min_size=20, max_size=80)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(events=EVENTS, prefix_cache=st.sampled_from([True, True, True, False]))
def test_any_order_of_events(
    small_blocks: Served, answers: list[list[int]], events: list[tuple[str, int, int]], prefix_cache: bool
) -> None:
    async def live() -> None:
        async with world(small_blocks, prefix_cache=prefix_cache, **SMALL) as one:
            for name, first, second in events:
                open_requests = [request for request in one.requests if not request.is_over]
                if name == "arrive":
                    arrive(one, answers, first, second)
                elif name == "cancel":
                    if open_requests:
                        await one.cancel(open_requests[first % len(open_requests)])
                elif name == "all":
                    for what in (one.step_prefill, one.transfer, one.step_decode):
                        await what()
                else:
                    step: Callable[[], Awaitable[None]] = getattr(one, name)
                    await step()
                await one.ask()
                await one.settle()
            await one.finish()
            event(f"{min(len(one.preempted), 3)} preempted")
            event(f"{min(sum(any(request.cached) for request in one.requests), 3)} found something in the cache")

    asyncio.run(live())


def test_all_at_once(small_blocks: Served, answers: list[list[int]]) -> None:
    """Far more than the pool holds: some are given up, and the oldest never is."""

    async def live() -> None:
        async with world(small_blocks, **SMALL) as one:
            for number in range(12):
                arrive(one, answers, number % len(PROMPTS), MAX_TOKENS)
            await one.finish()
            assert one.preempted
            assert "r0" not in one.preempted
            assert all(request.where == "done" for request in one.requests)

    asyncio.run(live())


def test_what_decode_has_is_not_fetched_again(small_blocks: Served, answers: list[list[int]]) -> None:
    """The second turn of a conversation: prompt and answer of the first are there already."""
    block_bytes = small_blocks.loaded.layout.block_bytes

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=20, decode_blocks=20) as one:
            one.arrive(PROMPTS[5], answers[5][:20])
            await one.finish()
            assert one.fetcher.num_bytes == 3 * block_bytes
            turn = [*PROMPTS[5], *answers[5][:20], *prompt_of(6, seed=9)]
            second = one.arrive(turn, small_blocks.greedy(turn, 10))
            await one.finish()
            assert second.cached == [24], "prefill has the prompt; what was generated is elsewhere"
            assert one.fetcher.num_bytes == (3 + 2) * block_bytes, "5 of 7 blocks were here: 43 tokens of KV"
            third = one.arrive(PROMPTS[5], answers[5][:20])
            await one.finish()
            assert third.cached == [16]
            assert one.fetcher.num_bytes == (3 + 2) * block_bytes, "all were here"

    asyncio.run(live())


def test_who_comes_together_follows_the_first(small_blocks: Served, answers: list[list[int]]) -> None:
    """Three prompts with 26 tokens in common, all before the first step."""

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=30, decode_blocks=30) as one:
            requests = [one.arrive(PROMPTS[number], answers[number][:2]) for number in (1, 2, 3)]
            await one.ask()
            await one.finish()
            assert [request.cached for request in requests] == [[0], [24], [24]]

    asyncio.run(live())


def test_what_a_request_has_on_decode_is_shared_while_it_goes_on(
    small_blocks: Served, answers: list[list[int]]
) -> None:
    """Its prompt once that has come, and what it has generated each time that it grows."""
    block_bytes = small_blocks.loaded.layout.block_bytes

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=30, decode_blocks=30) as one:

            async def fetched(prompt: list[int], num_tokens: int) -> int:
                """How many blocks are fetched for this prompt."""
                before = one.fetcher.num_bytes
                request = one.arrive(prompt, small_blocks.greedy(prompt, num_tokens))
                while request.where != "decodes" or one.fetcher.waiting:
                    await one.ask()
                    await one.step_prefill()
                    await one.transfer()
                return (one.fetcher.num_bytes - before) // block_bytes

            assert await fetched(PROMPTS[6], MAX_TOKENS) == 5
            assert await fetched(PROMPTS[6], 2) == 0
            while len(one.requests[0].tokens) < 20:
                await one.step_decode()
                await one.settle()
            assert one.requests[0].where == "decodes"
            assert await fetched([*PROMPTS[6], *answers[6][:18]], 2) == 8 - 7

    asyncio.run(live())


def test_a_transfer_that_breaks_leaves_nothing_behind(small_blocks: Served, answers: list[list[int]]) -> None:
    """Neither cancelled nor failed transfers make blocks that others find."""

    async def live() -> None:
        async with world(small_blocks, prefill_blocks=20, decode_blocks=20) as one:
            first = one.arrive(PROMPTS[6], answers[6])
            while first.where != "decodes":
                await one.ask()
                await one.step_prefill()
                await one.settle()
            await one.cancel(first)
            await one.settle()
            assert one.decode.parts.cache.num_cached == 0
            second = one.arrive(PROMPTS[6], answers[6])
            while second.where != "decodes":
                await one.ask()
                await one.step_prefill()
                await one.settle()
            one.holder.release(next(iter(one.holder.leases)))
            await one.transfer()
            assert one.decode.parts.cache.num_cached == 0
            assert (second.attempt, second.where) == (1, "waits for prefill")

    asyncio.run(live())
