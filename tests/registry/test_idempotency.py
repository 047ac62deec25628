"""Which gateway has the answer of a key: the first that claims it, as long as it lives."""

from collections.abc import AsyncIterator

import pytest

from shared.messages.records import GatewayRecord
from shared.registry import registry
from shared.registry.idempotency import RedisIdempotencyIndex
from shared.registry.registry import Registry


@pytest.fixture
async def records(redis_url: str) -> AsyncIterator[Registry]:
    async with registry.connect(redis_url, ttl_s=5.0, timeout_s=10.0) as records:
        yield records


def record_of(gateway_id: str) -> GatewayRecord:
    return GatewayRecord(
        id=gateway_id,
        pid=1,
        host="here",
        version="1",
        started_at=0.0,
        heartbeat=1,
        address=f"http://{gateway_id}",
        open_requests=0,
        waiting_requests=0,
    )


def index_of(records: Registry, gateway_id: str) -> RedisIdempotencyIndex:
    return RedisIdempotencyIndex(records, gateway_id, f"http://{gateway_id}", ttl_s=60.0)


async def test_the_first_live_gateway_has_a_key(records: Registry) -> None:
    await records.write_gateway(record_of("a"))
    a, b = index_of(records, "a"), index_of(records, "b")
    assert await a.claim("key") is None
    assert await a.claim("key") is None
    assert await b.claim("key") == "http://a"
    assert await b.claim("other key") is None
    await b.release("key")
    assert await b.claim("key") == "http://a"
    await a.release("key")
    assert await b.claim("key") is None


async def test_a_dead_gateways_key_is_claimed(records: Registry) -> None:
    await records.write_gateway(record_of("a"))
    a, b = index_of(records, "a"), index_of(records, "b")
    await a.claim("key")
    await records.remove_gateway(record_of("a"))
    assert await b.claim("key") is None
    await records.write_gateway(record_of("b"))
    assert await a.claim("key") == "http://b"


async def test_an_unreachable_gateways_key_is_claimed(records: Registry) -> None:
    for gateway_id in ("a", "b"):
        await records.write_gateway(record_of(gateway_id))
    a, b, c = index_of(records, "a"), index_of(records, "b"), index_of(records, "c")
    await a.claim("key")
    assert await b.claim("key", instead_of="http://a") is None
    assert await c.claim("key", instead_of="http://a") == "http://b"


async def test_a_gateway_that_was_restarted_at_its_address_has_the_keys_of_the_process_before(
    records: Registry,
) -> None:
    """The record of that process still lives, and its address is this gateway's own: it must not wait for itself."""
    await records.write_gateway(record_of("killed"))
    killed = index_of(records, "killed")
    assert await killed.claim("key") is None
    restarted = RedisIdempotencyIndex(records, "restarted", "http://killed", ttl_s=60.0)
    await records.write_gateway(record_of("restarted").model_copy(update={"address": "http://killed"}))
    assert await restarted.claim("key") is None
    await restarted.release("key")
    assert await index_of(records, "c").claim("key") is None, "the claim was the restarted gateway's own"
