"""Who leads, with a real Valkey between them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import redis

from pdserve.servers import Servers
from services.controller.leadership import RENEWALS, Leadership
from shared.registry import keys, registry
from shared.registry.registry import Lead, Registry
from tests.harness import eventually

LONG_S = 60.0


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Registry]:
    async with registry.connect(url, ttl_s=5.0, timeout_s=5.0) as records:
        yield records


@asynccontextmanager
async def holding(one: Leadership) -> AsyncIterator[None]:
    """It takes and renews the lease meanwhile."""
    task = asyncio.create_task(one.hold_forever())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def leading(one: Leadership) -> Lead:
    await one.renew()
    assert one.lead is not None
    return one.lead


def renewing(one: Leadership) -> Callable[[], Awaitable[bool]]:
    """Tries once, and says whether it leads now."""

    async def renew() -> bool:
        await one.renew()
        return one.lead is not None

    return renew


async def test_nobody_leads_before_asking(redis_url: str) -> None:
    async with connected(redis_url) as records:
        assert Leadership(records, "one", LONG_S).lead is None
        assert await records.leader() is None


async def test_of_two_one_leads_and_stays_the_leader(redis_url: str) -> None:
    async with connected(redis_url) as records:
        one, two = Leadership(records, "one", LONG_S), Leadership(records, "two", LONG_S)
        lead = await leading(one)
        await two.renew()
        assert two.lead is None
        assert await leading(one) == lead
        assert await records.leader() == "one"


async def test_whoever_resigns_lets_the_other_lead_at_once(redis_url: str) -> None:
    async with connected(redis_url) as records:
        one, two = Leadership(records, "one", LONG_S), Leadership(records, "two", LONG_S)
        first = await leading(one)
        await two.resign()  # who does not lead cannot end another's lead
        assert await leading(one) == first
        await one.resign()
        assert one.lead is None
        assert (await leading(two)).term > first.term
        await one.resign()
        await one.renew()
        assert one.lead is None
        assert await records.leader() == "two"


async def test_a_lease_that_is_not_renewed_runs_out_and_never_do_two_lead(redis_url: str) -> None:
    async with connected(redis_url) as records:
        one, two = Leadership(records, "one", 1.0), Leadership(records, "two", LONG_S)
        first = await leading(one)

        async def takes_over() -> bool:
            await two.renew()
            assert one.lead is None or two.lead is None
            return two.lead is not None

        await eventually(takes_over)
        assert one.lead is None
        assert (await leading(two)).term > first.term
        await one.renew()
        assert one.lead is None


async def test_who_holds_the_lease_renews_it_well_before_its_end(redis_url: str) -> None:
    assert RENEWALS >= 3
    async with connected(redis_url) as records:
        one = Leadership(records, "one", 1.0)
        async with holding(one):
            await eventually(lambda: one.lead is not None)
            with redis.Redis.from_url(redis_url) as client:
                for _ in range(3):
                    client.pexpire(keys.LEADER, 100_000)
                    await eventually(lambda: 0 < client.pttl(keys.LEADER) <= 1000)


async def test_the_one_in_waiting_takes_over_by_itself(redis_url: str) -> None:
    async with connected(redis_url) as records:
        one, two = Leadership(records, "one", 1.0), Leadership(records, "two", 1.0)
        await leading(one)
        async with holding(two):
            async with holding(one):
                await eventually(lambda: one.lead is not None)
                assert two.lead is None
            await eventually(lambda: two.lead is not None)
            assert one.lead is None


async def test_another_that_leads_ends_it(redis_url: str) -> None:
    """As after a pause in which the lease has run out."""
    async with connected(redis_url) as records:
        one, two = Leadership(records, "one", LONG_S), Leadership(records, "two", LONG_S)
        await leading(one)
        with redis.Redis.from_url(redis_url) as client:
            client.delete(keys.LEADER)
        await leading(two)
        await one.renew()
        assert one.lead is None


async def test_a_lease_that_redis_has_lost_is_another_term(redis_url: str) -> None:
    """What was written under the old one may be lost too: the leader takes over from itself."""
    async with connected(redis_url) as records:
        one = Leadership(records, "one", LONG_S)
        first = await leading(one)
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        await eventually(lambda: int(time.time() * 1000) > first.term)  # terms are milliseconds
        assert (await leading(one)).term > first.term


async def test_its_own_clock_ends_it_while_redis_is_away(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(servers.start_redis()) as records:
        one = Leadership(records, "one", 1.0)
        await leading(one)
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        await one.renew()
        assert "the lease cannot be renewed" in caplog.text
        await eventually(lambda: one.lead is None)
        await one.resign()
        assert "the lease will run out by itself" in caplog.text
        servers.start_redis()
        await eventually(renewing(one))


async def test_redis_that_is_away_for_less_than_the_lease_ends_nothing(servers: Servers) -> None:
    async with connected(servers.start_redis()) as records:
        one = Leadership(records, "one", LONG_S)
        lead = await leading(one)
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        await one.renew()
        assert one.lead == lead
