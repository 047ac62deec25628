"""Reading and writing the registry. Owns the Redis connection; `view.py` judges heartbeats, `values.py` values."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from shared.addresses import shown
from shared.errors import RegistryUnavailable
from shared.messages.records import GatewayRecord, GroupMap, InstanceRecord
from shared.registry import keys, scripts
from shared.registry.heartbeats import Heartbeat, parse_heartbeat
from shared.registry.values import MAX_TERM_AHEAD_MS, Unusable, checked_id, checked_map, checked_version

COMMAND_TIMEOUT_S = 2.0
RETRY_S = 0.2

AnyRecord = TypeVar("AnyRecord", InstanceRecord, GatewayRecord, Heartbeat)
log = logging.getLogger(__name__)


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
        self.ttl_ms = int(ttl_s * 1000)
        self._unusable = Unusable()

    async def ping(self) -> None:
        await self.run(lambda pipe: pipe.ping())

    async def write_instance(self, record: InstanceRecord) -> None:
        """Writes or renews an instance's record and its heartbeat.

        The record goes first: who sees a heartbeat's `state_version` can read the record that belongs to it.
        """

        def write(pipe: Pipeline) -> None:
            pipe.set(keys.instance(record.id), record.model_dump_json(), px=self.ttl_ms)
            pipe.set(keys.heartbeat(record.id), Heartbeat.of(record).to_json(), px=self.ttl_ms)
            self._join(pipe, keys.INSTANCES, record.id)

        await self.run(write)

    async def write_gateway(self, record: GatewayRecord) -> None:
        """Writes or renews a gateway's record."""

        def write(pipe: Pipeline) -> None:
            pipe.set(keys.gateway(record.id), record.model_dump_json(), px=self.ttl_ms)
            self._join(pipe, keys.GATEWAYS, record.id)

        await self.run(write)

    async def remove_instance(self, record: InstanceRecord) -> None:
        await self._remove([keys.instance(record.id), keys.heartbeat(record.id)], keys.INSTANCES, record.id)

    async def remove_gateway(self, record: GatewayRecord) -> None:
        await self._remove([keys.gateway(record.id)], keys.GATEWAYS, record.id)

    async def instances(self) -> list[InstanceRecord]:
        """Returns the records of all instances, by id."""
        return await self._all(InstanceRecord.model_validate_json, keys.INSTANCES, keys.instance)

    async def members(self, instance_ids: Collection[str]) -> list[InstanceRecord]:
        """Returns the records of these instances, as far as they have one."""
        return await self._read(InstanceRecord.model_validate_json, keys.instance, instance_ids)

    async def heartbeats(self, instance_ids: Collection[str]) -> list[Heartbeat]:
        """Returns the heartbeats of these instances, as far as they have one. Costs little even for hundreds."""
        return await self._read(parse_heartbeat, keys.heartbeat, instance_ids)

    async def gateways(self) -> list[GatewayRecord]:
        """Returns the records of all gateways, by id."""
        return await self._all(GatewayRecord.model_validate_json, keys.GATEWAYS, keys.gateway)

    async def maps(self, names: Collection[str] | None = None) -> list[GroupMap]:
        """Returns the maps of these groups, or of all, by name."""
        if names is None:
            [texts] = await self.run(lambda pipe: pipe.hgetall(keys.MAPS))
        elif names:
            [found] = await self.run(lambda pipe: pipe.hmget(keys.MAPS, list(names)))
            texts = {name: text for name, text in zip(names, found, strict=True) if text is not None}
        else:
            return []
        parsed = [
            self._unusable.parsed(f"the map of group {name}", partial(checked_map, name), texts[name])
            for name in sorted(texts)
        ]
        return [one for one in parsed if one is not None]

    async def map_versions(self) -> dict[str, int]:
        """Returns the version of each group's map."""
        [texts] = await self.run(lambda pipe: pipe.hgetall(keys.MAP_VERSIONS))
        parsed = {
            name: self._unusable.parsed(f"the map version of group {name}", checked_version, text)
            for name, text in texts.items()
        }
        return {name: version for name, version in parsed.items() if version is not None}

    async def lead(self, controller_id: str, for_s: float) -> Lead | None:
        """Becomes the leader, or stays so, for `for_s` more seconds; None while another is.

        Terms are Unix milliseconds of the takeover, and grow even where Redis has lost the last one. A last term that
        no controller can have had does not count.
        """
        now_ms = int(time.time() * 1000)
        arguments = (controller_id, now_ms, int(for_s * 1000), now_ms + MAX_TERM_AHEAD_MS)
        [text] = await self.run(lambda pipe: pipe.eval(scripts.LEAD, 2, keys.LEADER, keys.TERM, *arguments))
        return Lead(controller_id, int(text)) if text else None

    async def resign(self, lead: Lead) -> None:
        """Lets another lead at once."""
        await self.run(lambda pipe: pipe.eval(scripts.RESIGN, 1, keys.LEADER, lead.text))

    async def leader(self) -> str | None:
        """Returns the leading controller's id."""
        [text] = await self.run(lambda pipe: pipe.get(keys.LEADER))
        return str(text).rpartition("|")[0] if text else None

    async def write_map(self, lead: Lead, group: GroupMap) -> bool:
        """Writes a group's map and its version; False, and nothing is written, if `lead` has ended."""
        arguments = (lead.text, group.name, group.model_dump_json(), group.version)
        [done] = await self.run(
            lambda pipe: pipe.eval(scripts.WRITE_MAP, 3, keys.LEADER, keys.MAPS, keys.MAP_VERSIONS, *arguments)
        )
        return bool(done)

    async def remove_map(self, lead: Lead, name: str) -> bool:
        """Removes a group's map and its version; False, and nothing is removed, if `lead` has ended."""
        [done] = await self.run(
            lambda pipe: pipe.eval(scripts.REMOVE_MAP, 3, keys.LEADER, keys.MAPS, keys.MAP_VERSIONS, lead.text, name)
        )
        return bool(done)

    async def run(self, fill: Callable[[Pipeline], object]) -> list:  # type: ignore[type-arg]
        """Runs the commands that `fill` adds, in one round trip, and returns their results."""
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S), self._redis.pipeline(transaction=False) as pipe:
                fill(pipe)
                return await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            raise RegistryUnavailable(f"Redis does not answer: {error!r}") from error

    def _join(self, pipe: Pipeline, key: str, member: str) -> None:
        pipe.sadd(key, member)
        pipe.pexpire(key, self.ttl_ms)

    async def _remove(self, names: list[str], members: str, member: str) -> None:
        def remove(pipe: Pipeline) -> None:
            pipe.delete(*names)
            pipe.srem(members, member)

        await self.run(remove)

    async def _all(
        self, parse: Callable[[str], AnyRecord], members: str, key_of: Callable[[str], str]
    ) -> list[AnyRecord]:
        """Returns the records of a set's members, by id. Members whose record has expired leave the set."""
        [names] = await self.run(lambda pipe: pipe.smembers(members))
        ordered = sorted(names)
        texts = await self._texts(key_of, ordered)
        expired = [name for name, text in zip(ordered, texts, strict=True) if text is None]
        if expired:
            await self.run(lambda pipe: pipe.srem(members, *expired))
        return self._parsed(parse, key_of, zip(ordered, texts, strict=True))

    async def _read(
        self, parse: Callable[[str], AnyRecord], key_of: Callable[[str], str], names: Collection[str]
    ) -> list[AnyRecord]:
        texts = await self._texts(key_of, names)
        return self._parsed(parse, key_of, zip(names, texts, strict=True))

    async def _texts(self, key_of: Callable[[str], str], names: Collection[str]) -> list[str | None]:
        if not names:
            return []
        [texts] = await self.run(lambda pipe: pipe.mget([key_of(name) for name in names]))
        return list(texts)

    def _parsed(
        self,
        parse: Callable[[str], AnyRecord],
        key_of: Callable[[str], str],
        texts: Iterable[tuple[str, str | None]],
    ) -> list[AnyRecord]:
        def parse_own(name: str, text: str) -> AnyRecord:
            record = parse(text)
            checked_id(name, record.id)
            return record

        found = (
            self._unusable.parsed(key_of(name), partial(parse_own, name), text)
            for name, text in texts
            if text is not None
        )
        return [record for record in found if record is not None]


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
            # `run` keeps the time: `wait_for`, which redis would use, swallows cancellations before Python 3.12.
            socket_timeout=None,
            decode_responses=True,
            encoding_errors="replace",  # what is not UTF-8 is not JSON either, and skipped as such
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
