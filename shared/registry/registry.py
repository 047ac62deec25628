"""Reading and writing the registry. Holds the Redis connection; what the records mean is `view.py`'s."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from shared.addresses import shown
from shared.errors import RegistryUnavailable
from shared.registry import keys
from shared.registry.records import GatewayRecord, InstanceRecord, Record

COMMAND_TIMEOUT_S = 2.0
RETRY_S = 0.2

AnyRecord = TypeVar("AnyRecord", bound=Record)
log = logging.getLogger(__name__)


class Registry:
    """The registry over one pool of Redis connections. Every method raises `RegistryUnavailable` when Redis is away."""

    def __init__(self, redis: Redis, ttl_s: float) -> None:
        self._redis = redis
        self._ttl_ms = int(ttl_s * 1000)

    async def ping(self) -> None:
        await self._run(lambda pipe: pipe.ping())

    async def write_instance(self, record: InstanceRecord) -> None:
        """Writes or renews an instance's record and its membership of its group."""

        def write(pipe: Pipeline) -> None:
            pipe.set(keys.instance(record.id), record.model_dump_json(), px=self._ttl_ms)
            self._join(pipe, keys.group(record.group), record.id)
            self._join(pipe, keys.GROUPS, record.group)

        await self._run(write)

    async def write_gateway(self, record: GatewayRecord) -> None:
        """Writes or renews a gateway's record."""

        def write(pipe: Pipeline) -> None:
            pipe.set(keys.gateway(record.id), record.model_dump_json(), px=self._ttl_ms)
            self._join(pipe, keys.GATEWAYS, record.id)

        await self._run(write)

    async def remove_instance(self, record: InstanceRecord) -> None:
        await self._remove(keys.instance(record.id), keys.group(record.group), record.id)

    async def remove_gateway(self, record: GatewayRecord) -> None:
        await self._remove(keys.gateway(record.id), keys.GATEWAYS, record.id)

    async def groups(self) -> list[str]:
        """The names of all groups that have had a member lately."""
        [names] = await self._run(lambda pipe: pipe.smembers(keys.GROUPS))
        return sorted(names)

    async def instances(self, group: str) -> list[InstanceRecord]:
        """The records of a group's instances, by id."""
        return await self._records(InstanceRecord, keys.group(group), keys.instance)

    async def gateways(self) -> list[GatewayRecord]:
        """The records of all gateways, by id."""
        return await self._records(GatewayRecord, keys.GATEWAYS, keys.gateway)

    def _join(self, pipe: Pipeline, key: str, member: str) -> None:
        pipe.sadd(key, member)
        pipe.pexpire(key, self._ttl_ms)

    async def _remove(self, name: str, members: str, member: str) -> None:
        def remove(pipe: Pipeline) -> None:
            pipe.delete(name)
            pipe.srem(members, member)

        await self._run(remove)

    async def _records(self, kind: type[AnyRecord], members: str, key_of: Callable[[str], str]) -> list[AnyRecord]:
        """The records of a set's members. Members whose record has run out leave the set: no clock is compared."""
        [names] = await self._run(lambda pipe: pipe.smembers(members))
        if not names:
            return []
        ordered = sorted(names)
        [texts] = await self._run(lambda pipe: pipe.mget([key_of(name) for name in ordered]))
        gone = [name for name, text in zip(ordered, texts, strict=True) if text is None]
        if gone:
            await self._run(lambda pipe: pipe.srem(members, *gone))
        return [record for text in texts if text is not None and (record := _parse(kind, text)) is not None]

    async def _run(self, fill: Callable[[Pipeline], object]) -> list:  # type: ignore[type-arg]
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S), self._redis.pipeline(transaction=False) as pipe:
                fill(pipe)
                return await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            raise RegistryUnavailable(f"Redis does not answer: {error!r}") from error


@asynccontextmanager
async def connect(url: str, *, ttl_s: float, timeout_s: float) -> AsyncIterator[Registry]:
    """Connects to Redis at `url`; waits up to `timeout_s` for the server to be there.

    Raises:
        RegistryUnavailable: it is not there, or the URL is none.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=8,
            timeout=COMMAND_TIMEOUT_S,
            # `_run` keeps the time: `wait_for`, which redis would use, swallows cancellations before Python 3.12.
            socket_timeout=None,
            decode_responses=True,
        )
    except ValueError as error:
        raise RegistryUnavailable(
            f"{shown(url)!r} is no Redis URL ({error}): set PDSERVE_REDIS_URL, e.g. redis://host:6379"
        ) from error
    redis = Redis(connection_pool=pool)
    registry = Registry(redis, ttl_s)
    try:
        await _wait_for(registry, url, timeout_s)
        yield registry
    finally:
        await redis.aclose()
        await pool.disconnect()


async def _wait_for(registry: Registry, url: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while True:
        try:
            return await registry.ping()
        except RegistryUnavailable as error:
            if time.monotonic() >= end:
                raise RegistryUnavailable(
                    f"no Redis answers at {shown(url)} ({error.__cause__}): start one there or set PDSERVE_REDIS_URL"
                ) from error
            await asyncio.sleep(RETRY_S)


def _parse(kind: type[AnyRecord], text: str) -> AnyRecord | None:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        log.warning("passed over a record that this version cannot read: %s", error)
        return None
