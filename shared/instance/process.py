"""The process of an instance, from its settings to its last heartbeat: load, listen, announce, serve, drain.

connect to NATS and Redis -> load the model -> serve KV -> subscribe -> first heartbeat ("ready") -> serve
SIGTERM: "draining", refuse -> what is held ends or is given up -> out of the registry -> exit
"""

import asyncio
import logging
import os
import secrets
import threading
import time
from contextlib import AsyncExitStack
from typing import Any

from shared import __version__
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.bus.messages import Answer
from shared.engine.decode_graphs import DecodeGraphs
from shared.engine.device import find_device
from shared.engine.engine import Engine
from shared.engine.loader import load_model
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.prefix_cache import PrefixCache
from shared.engine.runner import EngineRunner
from shared.engine.sequence import NewToken
from shared.engine.staging import staging_of
from shared.errors import ModelRefused, RequestError
from shared.instance.outbox import Outbox
from shared.instance.role import InstanceParts, Role, find_role
from shared.kv.holder import KVHolder
from shared.process import Lifetime, heartbeats
from shared.registry import registry
from shared.registry.records import InstanceRecord
from shared.registry.registry import Registry
from shared.settings import InstanceSettings, hostname
from shared.telemetry import tracing

log = logging.getLogger(__name__)


async def serve(settings: InstanceSettings, lifetime: Lifetime) -> None:
    find_device(settings.device)  # before anybody else is bothered
    instance_id = f"{settings.role}-{hostname()}-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        stack.enter_context(tracing.exporting(settings.role, instance_id))
        bus = await stack.enter_async_context(
            connection.connect(settings.nats_url, name=instance_id, timeout_s=settings.connect_timeout_s)
        )
        records = await stack.enter_async_context(
            registry.connect(settings.redis_url, ttl_s=settings.record_ttl_s, timeout_s=settings.connect_timeout_s)
        )
        loaded = await _load(settings, lifetime)
        if loaded is None:
            return
        instance = Instance(settings, instance_id, loaded, lifetime)
        await instance.run(bus, records)


async def _load(settings: InstanceSettings, lifetime: Lifetime) -> LoadedModel | None:
    """The model; None if we are asked to end before it is there. Its thread is then left to die with the process."""
    loop = asyncio.get_running_loop()
    loading: asyncio.Future[LoadedModel] = loop.create_future()

    def work() -> None:
        try:
            result = load_model(
                settings.model,
                dtype=settings.dtype,
                device=str(find_device(settings.device)),
                num_threads=settings.threads or None,
                block_size=settings.block_size,
                quantization=settings.quantization,
                native=settings.native_kernels,
            )
        except Exception as error:  # noqa: BLE001 - the thread's edge: whatever it was, the process ends by it
            loop.call_soon_threadsafe(_settle, loading, error)
        else:
            loop.call_soon_threadsafe(_settle, loading, result)

    threading.Thread(target=work, name="load", daemon=True).start()
    ending = loop.create_task(lifetime.until_ending())
    either: list[asyncio.Future[Any]] = [loading, ending]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    return loading.result() if loading.done() else None


def _settle(loading: "asyncio.Future[LoadedModel]", result: LoadedModel | Exception) -> None:
    if loading.cancelled():
        return
    if isinstance(result, Exception):
        loading.set_exception(result)
    else:
        loading.set_result(result)


class Instance:
    """A loaded model and the role it plays."""

    def __init__(self, settings: InstanceSettings, instance_id: str, loaded: LoadedModel, lifetime: Lifetime) -> None:
        self.settings = settings
        self.instance_id = instance_id
        self.loaded = loaded
        self.lifetime = lifetime
        self.epoch = 1
        self.num_blocks = settings.kv_pool_bytes // loaded.layout.block_bytes
        self.max_model_len = max_model_len(settings, loaded, self.num_blocks)
        self.started_at = time.time()
        self._steps: asyncio.Queue[list[NewToken]] = asyncio.Queue()

    async def run(self, bus: Bus, records: Registry) -> None:
        """Serves until the lifetime ends, then drains."""
        settings = self.settings
        pool = KVPool(self.loaded.layout, self.num_blocks, find_device(settings.device))
        graphs: DecodeGraphs | None = None
        if pool.device.type == "cuda" and settings.role == "decode":
            graphs = await asyncio.to_thread(DecodeGraphs, self.loaded, pool, settings.decode_slots, self.max_model_len)
        engine = Engine(self.loaded, pool, settings.max_step_tokens, graphs)
        holder = KVHolder(
            self.loaded.layout,
            settings.kv_host,
            settings.kv_port,
            settings.stall_timeout_s,
            settings.kv_advertise_host,
        )
        async with (
            holder.serving(),
            EngineRunner(engine, self._steps.put_nowait, self._on_crash) as runner,
            asyncio.TaskGroup() as tasks,
        ):
            self.parts = InstanceParts(
                settings=settings,
                instance_id=self.instance_id,
                epoch=lambda: self.epoch,
                draining=lambda: self.lifetime.ending,
                loaded=self.loaded,
                staging=staging_of(pool),
                cache=PrefixCache(self.num_blocks, settings.block_size, enabled=settings.prefix_cache),
                runner=runner,
                holder=holder,
                outbox=Outbox(bus, self.instance_id),
                tasks=tasks,
            )
            self.role: Role = find_role(settings.role)(self.parts)
            bus.on_reconnect(lambda: self.role.bus_came_back())
            working = [tasks.create_task(self.role.sweep_forever()), tasks.create_task(self._tell_tokens())]
            await bus.subscribe(subjects.instance(self.instance_id, ">"), self._on_message)
            async with heartbeats(
                self.record, records.write_instance, records.remove_instance, settings.heartbeat_s
            ) as beat:
                log.info("ready: %s plays %s, KV at %s:%d", self.instance_id, self.role.verb, holder.host, holder.port)
                await self.lifetime.until_ending()
                await beat()
                await self._drain()
            for task in working:
                task.cancel()
            self.role.close()

    def record(self, heartbeat: int) -> InstanceRecord:
        """This instance's record as of now."""
        return InstanceRecord(
            id=self.instance_id,
            pid=os.getpid(),
            host=hostname(),
            version=__version__,
            started_at=self.started_at,
            heartbeat=heartbeat,
            role=self.settings.role,
            group=self.settings.group,
            epoch=self.epoch,
            state="draining" if self.lifetime.ending else "ready",
            model=self.settings.served_model_name,
            fingerprint=self.loaded.fingerprint,
            max_model_len=self.max_model_len,
            kv_host=self.parts.holder.host,
            kv_port=self.parts.holder.port,
            kv_layout=self.loaded.layout,
            slots_total=self.role.slots_total,
            slots_used=self.role.slots_used,
            blocks_total=self.num_blocks,
            blocks_free=self.parts.cache.num_free,
            blocks_cached=self.parts.cache.num_cached,
            cache_query_tokens=self.parts.cache.num_query_tokens,
            cache_hit_tokens=self.parts.cache.num_hit_tokens,
        )

    async def _on_message(self, incoming: Incoming) -> None:
        verb, key = subjects.verb_and_key(incoming.subject)
        try:
            await self.role.handle(verb, key, incoming)
        except RequestError as error:
            log.warning("refused a message on %s: %s", incoming.subject, error.message)
            await self._refuse(incoming)
        except Exception:
            log.exception("a message on %s met a fault of this program", incoming.subject)
            await self._refuse(incoming)

    async def _refuse(self, incoming: Incoming) -> None:
        if incoming.reply_to:
            await incoming.respond(Answer(accepted=False, reason="invalid"))

    async def _tell_tokens(self) -> None:
        """Passes on what the engine generates, step by step, so that the order of tokens stays."""
        while True:
            await self.role.on_tokens(await self._steps.get())

    def _on_crash(self, error: BaseException) -> None:
        log.error("the engine failed", exc_info=error)
        self.lifetime.fail(f"the engine failed: {error!r}")
        self.role.fail_all("the engine of this instance failed", counts=True)

    async def _drain(self) -> None:
        """Lets what is held end by itself for a while, then gives it up, and waits until nothing is held."""
        await self._until_idle(0.0 if self.lifetime.failed else self.settings.drain_timeout_s)
        self.role.fail_all("this instance is ending", counts=False)
        await self._until_idle(self.settings.stall_timeout_s)

    async def _until_idle(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.role.idle()
        except TimeoutError:
            log.warning("%d requests are still held after %g s", self.role.slots_used, timeout_s)


def max_model_len(settings: InstanceSettings, loaded: LoadedModel, num_blocks: int) -> int:
    """The longest request (tokens) that is served.

    Raises:
        ModelRefused: the wish cannot be met by the model's positions or by the pool.
    """
    wish = settings.max_model_len
    capacity = num_blocks * loaded.layout.block_size
    if wish > loaded.max_position_embeddings:
        raise ModelRefused(
            f"PDSERVE_MAX_MODEL_LEN={wish} is over the {loaded.max_position_embeddings} positions of {settings.model}: "
            "lower it"
        )
    if wish > capacity or capacity < loaded.layout.block_size:
        token_bytes = loaded.layout.block_bytes // loaded.layout.block_size
        raise ModelRefused(
            f"the KV pool holds {capacity} tokens, fewer than one request of {wish or 'any length'}: raise "
            f"PDSERVE_KV_POOL_BYTES (a token takes {token_bytes} bytes) or lower PDSERVE_MAX_MODEL_LEN"
        )
    return wish or min(loaded.max_position_embeddings, capacity)
