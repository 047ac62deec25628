"""Records in a real Valkey: written, renewed, read, run out, and what happens while it is away."""

import asyncio
import random

import pytest
import redis

from pdserve.servers import Servers
from shared.errors import RegistryUnavailable
from shared.registry import keys, registry
from shared.registry.records import GatewayRecord
from shared.registry.registry import Registry
from tests.harness import eventually
from tests.registry.test_view import record

GATEWAY = GatewayRecord(
    id="g1",
    pid=1,
    host="h",
    version="0",
    started_at=0,
    address="a",
    group="default",
    open_requests=0,
    waiting_requests=0,
)


async def test_what_is_written_is_read(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("b"))
        await records.write_instance(record("a", group="chat"))
        await records.write_instance(record("b", heartbeat=2))
        await records.write_gateway(GATEWAY)
        assert await records.groups() == ["chat", "default"]
        assert await records.instances("default") == [record("b", heartbeat=2)]
        assert await records.instances("nobody") == []
        assert await records.gateways() == [GATEWAY]
        await records.remove_instance(record("b"))
        await records.remove_gateway(GATEWAY)
        assert await records.instances("default") == []
        assert await records.gateways() == []


async def test_what_is_not_renewed_runs_out(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=0.2, timeout_s=5.0) as records:
        await records.write_instance(record("a"))

        async def gone() -> bool:
            return await records.groups() == [] and await records.instances("default") == []

        await eventually(gone)


async def test_a_record_that_cannot_be_read_is_passed_over(redis_url: str) -> None:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("a"))
        await records.write_instance(record("b"))
        with redis.Redis.from_url(redis_url) as client:
            client.set(keys.instance("a"), '{"id": "a"}', px=5000)
        assert [one.id for one in await records.instances("default")] == ["b"]


async def test_it_is_there_again_after_a_restart(servers: Servers) -> None:
    async with registry.connect(servers.start_redis(), ttl_s=5.0, timeout_s=5.0) as records:
        await records.write_instance(record("a"))
        servers.processes["redis"].kill()
        servers.processes["redis"].wait()
        with pytest.raises(RegistryUnavailable):
            await records.instances("default")
        servers.start_redis()
        await records.write_instance(record("a", heartbeat=2))
        assert [one.heartbeat for one in await records.instances("default")] == [2]


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "unix:///nowhere/redis.sock"])
async def test_one_that_is_not_there_is_named(url: str) -> None:
    with pytest.raises(RegistryUnavailable, match="set PDSERVE_REDIS_URL"):
        async with registry.connect(url, ttl_s=5.0, timeout_s=0.3):
            pass


async def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(RegistryUnavailable, match="no Redis URL"):
        async with registry.connect("localhost:6379", ttl_s=5.0, timeout_s=0.3):
            pass


async def test_a_writer_can_be_cancelled_at_any_moment(redis_url: str) -> None:
    """Or a process that ends would wait for its heart for ever."""
    dice = random.Random(0)

    async def write_for_ever(records: Registry) -> None:
        while True:
            await records.write_gateway(GATEWAY)

    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=5.0) as records:
        for _ in range(300):
            writing = asyncio.create_task(write_for_ever(records))
            await asyncio.sleep(dice.uniform(0.0, 0.003))
            writing.cancel()
            await asyncio.wait([writing], timeout=5.0)
            assert writing.cancelled()
