"""Reading and writing the registry. Holds the Redis connection; what the records mean is `view.py`'s."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from shared.addresses import shown
from shared.errors import RegistryUnavailable
from shared.messages.records import GatewayRecord, GroupMap, InstanceRecord
from shared.registry import keys

COMMAND_TIMEOUT_S = 2.0
RETRY_S = 0.2

AnyRecord = TypeVar("AnyRecord", bound=BaseModel)
log = logging.getLogger(__name__)


_LEAD = """
local held = redis.call('GET', KEYS[1])
local mine = ARGV[1] .. '|'
if held and string.sub(held, 1, #mine) ~= mine then return false end
local term = held and tonumber(string.sub(held, #mine + 1))
if not term then
    term = math.max(tonumber(ARGV[2]), tonumber(redis.call('GET', KEYS[2]) or 0) + 1)
    redis.call('SET', KEYS[2], string.format('%.0f', term))
end
redis.call('SET', KEYS[1], mine .. string.format('%.0f', term), 'PX', ARGV[3])
return string.format('%.0f', term)
"""
_RESIGN = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_WRITE_MAP = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
"""
_REMOVE_MAP = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
return 1
"""


@dataclass(frozen=True, slots=True)
class Lead:
    """A controller's leadership: no two have the same term, and later ones have higher terms."""

    controller_id: str
    term: int

    @property
    def text(self) -> str:
        return f"{self.controller_id}|{self.term}"


class Registry:
    """The registry over one pool of Redis connections. Every method raises `RegistryUnavailable` when Redis is away."""

    def __init__(self, redis: Redis, ttl_s: float) -> None:
        self._redis = redis
        self._ttl_ms = int(ttl_s * 1000)

    async def ping(self) -> None:
        await self._run(lambda pipe: pipe.ping())

    async def write_instance(self, record: InstanceRecord) -> None:
        """Writes or renews an instance's record."""

        def write(pipe: Pipeline) -> None:
            pipe.set(keys.instance(record.id), record.model_dump_json(), px=self._ttl_ms)
            self._join(pipe, keys.INSTANCES, record.id)

        await self._run(write)

    async def write_gateway(self, record: GatewayRecord) -> None:
        """Writes or renews a gateway's record."""

        def write(pipe: Pipeline) -> None:
            pipe.set(keys.gateway(record.id), record.model_dump_json(), px=self._ttl_ms)
            self._join(pipe, keys.GATEWAYS, record.id)

        await self._run(write)

    async def remove_instance(self, record: InstanceRecord) -> None:
        await self._remove(keys.instance(record.id), keys.INSTANCES, record.id)

    async def remove_gateway(self, record: GatewayRecord) -> None:
        await self._remove(keys.gateway(record.id), keys.GATEWAYS, record.id)

    async def instances(self) -> list[InstanceRecord]:
        """The records of all instances, by id."""
        return await self._records(InstanceRecord, keys.INSTANCES, keys.instance)

    async def members(self, instance_ids: Collection[str]) -> list[InstanceRecord]:
        """The records of these instances, as far as they have one."""
        if not instance_ids:
            return []
        [texts] = await self._run(lambda pipe: pipe.mget([keys.instance(one) for one in instance_ids]))
        return [record for text in texts if text is not None and (record := _parse(InstanceRecord, text)) is not None]

    async def gateways(self) -> list[GatewayRecord]:
        """The records of all gateways, by id."""
        return await self._records(GatewayRecord, keys.GATEWAYS, keys.gateway)

    async def maps(self) -> list[GroupMap]:
        """The maps of all groups, by name."""
        [texts] = await self._run(lambda pipe: pipe.hgetall(keys.MAPS))
        found = [_parse(GroupMap, texts[name]) for name in sorted(texts)]
        return [one for one in found if one is not None]

    async def lead(self, controller_id: str, for_s: float) -> Lead | None:
        """Becomes the leader, or stays so, for `for_s` more seconds; None while another is.

        Terms are Unix milliseconds of the takeover, and grow even where Redis has lost the last one.
        """
        term = int(time.time() * 1000)
        arguments = (controller_id, term, int(for_s * 1000))
        [text] = await self._run(lambda pipe: pipe.eval(_LEAD, 2, keys.LEADER, keys.TERM, *arguments))
        return Lead(controller_id, int(text)) if text else None

    async def resign(self, lead: Lead) -> None:
        """Lets another lead at once."""
        await self._run(lambda pipe: pipe.eval(_RESIGN, 1, keys.LEADER, lead.text))

    async def leader(self) -> str | None:
        """The leading controller's id."""
        [text] = await self._run(lambda pipe: pipe.get(keys.LEADER))
        return str(text).rpartition("|")[0] if text else None

    async def write_map(self, lead: Lead, group: GroupMap) -> bool:
        """Writes a group's map; False, and nothing is written, if `lead` is over."""
        text = group.model_dump_json()
        [done] = await self._run(
            lambda pipe: pipe.eval(_WRITE_MAP, 2, keys.LEADER, keys.MAPS, lead.text, group.name, text)
        )
        return bool(done)

    async def remove_map(self, lead: Lead, name: str) -> bool:
        """Forgets a group; likewise."""
        [done] = await self._run(lambda pipe: pipe.eval(_REMOVE_MAP, 2, keys.LEADER, keys.MAPS, lead.text, name))
        return bool(done)

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
