"""What a gateway knows of one instance: how many questions it gets, when it is avoided, what it is asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.gateway import instance_client
from services.gateway.instance_client import (
    CAPACITY_FRESH_S,
    HEDGE_MAX_S,
    HEDGE_MIN_S,
    InstanceClient,
    question,
)
from services.gateway.request import Request
from shared.circuit_breaker import (
    BREAKER_FIRST_S,
    BREAKER_MAX_S,
    FAILURE_WINDOW_S,
    MAX_FAILURE_TIMES,
    PROBE_S,
    CircuitBreaker,
)
from shared.errors import NoResponders, PeerUnavailable
from shared.messages.serving import MAX_SECONDS, AskReply, Capacity
from tests.gateway.scripted import ACCEPTED, AMPLE, NO_SLOT, Fleet, Scripted, Work, fleet
from tests.harness import eventually
from tests.registry.test_view import record


def test_a_breaker_waits_longer_after_each_failure_and_not_at_all_after_a_success() -> None:
    breaker = CircuitBreaker()
    assert breaker.allows(0.0)
    now = 100.0
    for pause_s in (BREAKER_FIRST_S, 2 * BREAKER_FIRST_S, 4 * BREAKER_FIRST_S):
        now += 1.0
        breaker.failed(now, now)
        assert not breaker.allows(now + 0.99 * pause_s)
        assert breaker.allows(now + pause_s)
    for _ in range(20):
        now += 1.0
        breaker.failed(now, now)
    assert not breaker.allows(now + 0.99 * BREAKER_MAX_S)
    assert breaker.allows(now + BREAKER_MAX_S)
    breaker.succeeded()
    assert breaker.allows(now)


def test_after_a_failure_one_request_at_a_time_tries() -> None:
    breaker = CircuitBreaker()
    breaker.started(100.0)
    assert breaker.allows(100.0)
    breaker.failed(100.0, 100.0)
    breaker.started(101.0)
    assert not breaker.allows(101.0)
    assert not breaker.allows(101.0 + 0.99 * PROBE_S)
    assert breaker.allows(101.0 + PROBE_S)  # its result never came
    breaker.started(110.0)
    breaker.failed(110.1, 110.1)
    assert breaker.allows(110.1 + 2 * BREAKER_FIRST_S)


def test_failures_are_counted_for_a_minute_and_remembered_within_bounds() -> None:
    breaker = CircuitBreaker()
    for at in (100.0, 130.0, 150.0):
        breaker.failed(at, at)
    breaker.succeeded()
    assert breaker.num_recent_failures(150.0) == 3
    assert breaker.num_recent_failures(100.0 + FAILURE_WINDOW_S) == 2
    for _ in range(3 * MAX_FAILURE_TIMES):
        breaker.failed(200.0, 200.0)
    assert len(breaker.failed_at) <= MAX_FAILURE_TIMES + 1


@asynccontextmanager
async def one_client(nats_url: str, *answers: AskReply | None) -> AsyncIterator[tuple[InstanceClient, Fleet, Scripted]]:
    async with fleet(nats_url) as one:
        instance = await one.add("p", "prefill", *answers)
        yield one.watch.client("p"), one, instance


def made(one: Fleet, num_tokens: int = 3) -> Request:
    request = one.request([1] * num_tokens)
    request.start_attempt()
    return request


async def ask(client: InstanceClient, one: Fleet, timeout_s: float = 30.0) -> AskReply:
    return await client.ask("prefill", question(made(one), record("p"), "g", None, None), timeout_s)


async def under_way(client: InstanceClient, *num_tokens: int) -> list[asyncio.Task[None]]:
    """Questions that have no answer yet, about prompts of so many tokens."""

    async def wait() -> None:
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(wait()) for _ in num_tokens]
    for task, number in zip(tasks, num_tokens, strict=True):
        client.count_question(task, number)
    return tasks


async def test_as_many_questions_at_a_time_as_there_is_known_capacity(nats_url: str) -> None:
    async with one_client(nats_url) as (client, _, _):
        now = client.capacity_at + 2 * CAPACITY_FRESH_S
        assert client.may_be_asked("prefill", now)
        tasks = await under_way(client, 5)
        assert not client.may_be_asked("prefill", now)  # nothing is known
        client.freed(Capacity(slots_free=3, tokens_free=11))
        now = client.capacity_at
        assert client.may_be_asked("prefill", now)
        tasks += await under_way(client, 6)
        assert not client.may_be_asked("prefill", now)  # enough tokens
        assert client.may_be_asked("decode", now)
        tasks += await under_way(client, 1)
        assert not client.may_be_asked("decode", now)  # enough requests
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert client.may_be_asked("prefill", now)


async def test_one_question_goes_to_an_instance_without_known_capacity(nats_url: str) -> None:
    async with one_client(nats_url) as (client, _, _):
        client.freed(Capacity())
        assert client.may_be_asked("prefill", client.capacity_at)


async def test_a_full_instance_is_asked_less_and_less_until_it_has_capacity_again(nats_url: str) -> None:
    async with one_client(nats_url) as (client, _, _):
        pauses = []
        for _ in range(10):
            before = client._full_until
            client.full()
            pauses.append(client._full_s)
            assert client._full_until > before
            assert not client.may_be_asked("prefill", client._full_until - 1e-3)
            assert client.may_be_asked("prefill", client._full_until)
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (instance_client.FULL_FIRST_S, instance_client.FULL_MAX_S)
        client.freed(AMPLE)
        assert client.may_be_asked("prefill", client.freed_at)
        client.full()
        assert client._full_s == instance_client.FULL_FIRST_S


async def test_work_travels_with_the_question_where_acceptance_is_almost_certain(nats_url: str) -> None:
    async with one_client(nats_url) as (client, _, _):
        assert not client.accepts_surely("decode", client.capacity_at + 2 * CAPACITY_FRESH_S)
        client.freed(Capacity(slots_free=2, tokens_free=1, blocks_free=10))
        now = client.capacity_at
        assert client.accepts_surely("prefill", now, 1)
        assert client.accepts_surely("prefill", now, 2)  # nothing else is being computed there
        assert not client.accepts_surely("prefill", now, 1000)  # too few blocks
        assert not client.accepts_surely("decode", now, 1000)
        assert not client.accepts_surely("prefill", now + 2 * CAPACITY_FRESH_S)
        client.freed(Capacity(slots_free=2, tokens_free=1, blocks_free=10, starts_in_s=1.0))
        assert not client.accepts_surely("prefill", client.capacity_at, 2)
        client.freed(Capacity(slots_free=1, tokens_free=1, blocks_free=10))
        assert not client.accepts_surely("prefill", client.capacity_at)
        client.freed(Capacity(slots_free=2, tokens_free=0, blocks_free=10))
        assert not client.accepts_surely("prefill", client.capacity_at)
        assert client.accepts_surely("decode", client.capacity_at)


async def test_a_long_prompt_travels_with_the_question_only_where_there_are_blocks_and_time_for_it(
    nats_url: str,
) -> None:
    async with one_client(nats_url) as (client, _, _):
        client.freed(Capacity(slots_free=2, tokens_free=512, blocks_free=10_000))
        assert client.accepts_surely("prefill", client.capacity_at, 32_000)
        client.freed(Capacity(slots_free=2, tokens_free=512, blocks_free=10_000, starts_in_s=0.1))
        assert client.accepts_surely("prefill", client.capacity_at, 512)
        assert not client.accepts_surely("prefill", client.capacity_at, 32_000)
        assert client.accepts_surely("decode", client.capacity_at, 32_000)
        client.freed(Capacity(slots_free=2, tokens_free=512, blocks_free=1000))
        assert not client.accepts_surely("prefill", client.capacity_at, 32_000)
        assert not client.accepts_surely("decode", client.capacity_at, 32_000)


async def test_each_answer_says_what_capacity_is_left(nats_url: str) -> None:
    left = Capacity(slots_free=7, tokens_free=8, starts_in_s=2.0)
    async with one_client(nats_url, AskReply(accepted=True, capacity=left)) as (client, one, _):
        assert (await ask(client, one)).accepted
        assert client.capacity == left
        assert client.starts_at() == client.capacity_at + 2.0


async def test_an_instance_is_slow_after_a_few_times_its_usual_answer_time(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one_client(nats_url) as (client, _, _):
        assert client.hedge_after_s == HEDGE_MIN_S
        client._answer_s = 0.05
        assert client.hedge_after_s == pytest.approx(instance_client.HEDGE_FACTOR * 0.05)
        client._answer_s = 10.0
        assert client.hedge_after_s == HEDGE_MAX_S


async def test_without_an_answer_it_is_avoided_for_a_while(nats_url: str) -> None:
    async with one_client(nats_url, None) as (client, one, _):
        with pytest.raises(PeerUnavailable, match="No answer"):
            await ask(client, one, timeout_s=0.1)
        assert not client.may_be_asked("prefill", client.breaker.open_until - 1e-3)


async def test_a_rejection_is_no_result_of_a_trial(nats_url: str) -> None:
    async with one_client(nats_url, NO_SLOT, ACCEPTED) as (client, one, _):
        client.breaker.failed(0.0, 0.0)
        assert not (await ask(client, one)).accepted
        assert client.may_be_asked("prefill", client.capacity_at)
        assert (await ask(client, one)).accepted
        assert not client.may_be_asked("prefill", client.capacity_at)  # until what it accepted has succeeded
        client.breaker.succeeded()
        assert client.may_be_asked("prefill", client.capacity_at)


async def test_an_instance_that_is_gone_answers_no_question(nats_url: str) -> None:
    async with one_client(nats_url, None) as (client, one, instance):
        asking = asyncio.create_task(ask(client, one))
        await eventually(lambda: instance.requests)
        client.freed(AMPLE)
        client.lost()
        with pytest.raises(NoResponders):
            await asking
        assert not client.may_be_asked("prefill", client.freed_at)
        assert not client.accepts_surely("prefill", client.freed_at)


async def test_nobody_is_subscribed(nats_url: str) -> None:
    async with one_client(nats_url) as (client, one, instance):
        await instance.vanish()
        with pytest.raises(NoResponders):
            await ask(client, one)


async def test_a_question_that_is_cancelled_waits_no_more(nats_url: str) -> None:
    async with one_client(nats_url, None) as (client, one, instance):
        asking = asyncio.create_task(ask(client, one))
        await eventually(lambda: instance.requests)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        assert not client._replies


async def test_a_question_has_the_facts_and_no_tokens(nats_url: str) -> None:
    async with one_client(nats_url) as (_, one, instance):
        request = made(one, num_tokens=1000)
        request.prefix_keys = (1, 2)
        request.token_ids += [5, 6]
        request.deadline = 1e12  # a client's, which goes beyond what messages may say
        lease = instance.lease(Work("decode", question(request, record("p"), "g", None, None), None), 1001)
        asked = question(request, record("p", epoch=4, fingerprint="w"), "g", lease, None)
        assert (asked.request_id, asked.gateway_id, asked.epoch, asked.fingerprint) == (request.attempt_id, "g", 4, "w")
        assert (asked.num_tokens, asked.num_prompt_tokens, asked.max_tokens) == (1002, 1000, 8)
        assert (asked.prefix_keys, asked.lease, asked.start) == ((1, 2), lease, None)
        assert asked.age_s >= 0.0
        assert asked.expires_in_s == MAX_SECONDS
        request.deadline = 0.0
        assert question(request, record("p"), "g", None, None).expires_in_s == 0.0
        assert len(asked.model_dump_json()) < 1000


def test_failures_of_what_was_under_way_at_the_same_time_are_one_incident() -> None:
    breaker = CircuitBreaker()
    for _ in range(20):
        breaker.failed(100.0, started_at=99.0)
    assert breaker.allows(100.0 + BREAKER_FIRST_S)
    assert breaker.num_recent_failures(100.0) == 20
    breaker.failed(101.0, started_at=100.5)
    assert not breaker.allows(101.0 + BREAKER_FIRST_S)
    assert breaker.allows(101.0 + 2 * BREAKER_FIRST_S)
