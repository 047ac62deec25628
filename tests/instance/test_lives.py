"""Requests in any order of events, over real roles, engines and small pools: no wrong token, and no block is lost."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from shared.messages.records import Role as RoleName
from tests.engine.models import Served, prompt_of
from tests.instance.world import FOREVER, GATEWAYS, PATIENT_S, Request, World, world

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
CANARY_PROMPT = prompt_of(6)
SMALL = {"prefill_blocks": 14, "decode_blocks": 10}
"""Of 8 tokens: one request of 40 + 30 tokens takes 9 of them."""


@pytest.fixture(scope="module")
def answers(small_blocks: Served) -> list[list[int]]:
    """The greedy continuation of each prompt, and of the canary's."""
    return [small_blocks.greedy(prompt, MAX_TOKENS) for prompt in (*PROMPTS, CANARY_PROMPT)]


def arrive(one: World, answers: list[list[int]], prompt: int, num_tokens: int, *, is_local: bool = False) -> Request:
    return one.arrive(PROMPTS[prompt], answers[prompt][:num_tokens], is_local=is_local)


TOKENS = (1, 2, 9, 17, 25, MAX_TOKENS, MAX_TOKENS)
ORDERS: list[tuple[int, RoleName | None, float]] = [
    *[(1, "decode", 0.0)] * 4,
    *[(2, "decode", 0.0)] * 3,
    *[(0, "prefill", 0.0)] * 2,
    (0, "decode", 0.0),
    (1, "prefill", 0.0),
    (2, "prefill", 0.0),
    (0, "decode", PATIENT_S),
    (1, "prefill", PATIENT_S),
    (2, None, 0.0),
]
"""Which instance is to play what from now on, and for how long requests may end by themselves. A role may follow
itself."""
CALM = [*["arrive"] * 6, *["cancel"] * 2, *["all"] * 12]
CALM += ["start", "start", "start", "step_prefill", "step_decode", "step_third", "transfer", "transfer", "expire"]
FAULTS = ["starts_are_lost", "a_transfer_breaks", "bus_came_back", "deadline", "gateway_is_gone", "drain_third"]
WILD = [*CALM, "arrive", "arrive", "canary", *["order"] * 7, *FAULTS]

Event = tuple[str, int, int | None]
"""What happens, to whom, and how many turns other tasks have after it; None is as many as they want."""


def events(names: list[str]) -> st.SearchStrategy[list[Event]]:
    pause = st.sampled_from([None, None, None, None, None, 0, 1, 2, 3])
    return st.lists(st.tuples(st.sampled_from(names), st.integers(0, 999), pause), min_size=20, max_size=80)


async def happen(one: World, answers: list[list[int]], name: str, number: int) -> None:
    instance = one.instances[number % len(one.instances)]
    if name == "arrive":
        rest, prompt = divmod(number, len(PROMPTS))
        arrive(one, answers, prompt, TOKENS[rest % len(TOKENS)], is_local=rest // len(TOKENS) % 4 == 0)
    elif name == "canary":
        one.arrive(CANARY_PROMPT, answers[-1][:3], is_canary=True)
    elif name == "cancel":
        open_requests = [request for request in one.requests if not request.is_over]
        if open_requests:
            one.cancel(open_requests[number % len(open_requests)])
    elif name == "order":
        which, role, patience_s = ORDERS[number % len(ORDERS)]
        one.instances[which].order(role, patience_s)
    elif name == "bus_came_back":
        instance.bus_came_back()
    elif name == "deadline":
        instance.sweep(FOREVER)
    elif name == "gateway_is_gone":
        one.gateway_is_gone(GATEWAYS[number % len(GATEWAYS)])
    elif name == "drain_third":
        one.drain_third()
    elif name in ("start", "starts_are_lost"):
        getattr(one, name)()
    elif name == "all":
        one.start()
        for what in (one.step_prefill, one.transfer, one.step_decode, one.step_third):
            await what()
    else:
        step: Callable[[], Awaitable[None]] = getattr(one, name)
        await step()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    happens=st.sampled_from([CALM, WILD, WILD]).flatmap(events),
    prefix_cache=st.sampled_from([True, True, True, False]),
    stall_timeout_s=st.sampled_from([PATIENT_S, PATIENT_S, 1e-6]),
    start_apart_every=st.sampled_from([0, 1, 2]),
)
def test_any_order_of_events(
    small_blocks: Served,
    answers: list[list[int]],
    happens: list[Event],
    prefix_cache: bool,
    stall_timeout_s: float,
    start_apart_every: int,
) -> None:
    wishes = {"prefix_cache": prefix_cache, "stall_timeout_s": stall_timeout_s, "drain_timeout_s": 1e-6, **SMALL}

    async def live() -> None:
        async with world(small_blocks, **wishes) as one:
            one.start_apart_every = start_apart_every
            for name, number, pause in happens:
                await happen(one, answers, name, number)
                await one.ask()
                if pause is None:
                    await one.settle()
                else:
                    for _ in range(pause):
                        await asyncio.sleep(0)
                    one.check()
            await one.finish()
            event(f"{min(len(one.preempted), 3)} preempted")
            event(f"{min(sum(any(request.cached) for request in one.requests), 3)} found something in the cache")
            event(f"{min(sum(request.num_moves for request in one.requests), 3)} moved")
            event(f"{min(len(one.hints), 3)} told that there is room")

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
        async with world(small_blocks, prefill_blocks=30, decode_blocks=30, max_step_tokens=200) as one:
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
            one.cancel(first)
            await one.settle()
            assert one.decode.cache.num_cached == 0
            second = one.arrive(PROMPTS[6], answers[6])
            while second.where != "decodes":
                await one.ask()
                await one.step_prefill()
                await one.settle()
            one.holder.release(next(iter(one.holder.leases)))
            await one.transfer()
            assert one.decode.cache.num_cached == 0
            assert (second.attempt, second.where) == (1, "waits for prefill")

    asyncio.run(live())
