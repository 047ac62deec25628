"""What an instance computes with, whichever role it plays: a loaded model, its KV pool, its engine, its KV server."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from shared.engine.device import find_device
from shared.engine.engine import AnyEngine, Engine
from shared.engine.graphs.decode_graphs import DecodeGraphs
from shared.engine.loading.loader import load_model
from shared.engine.mock import MockEngine, MockModel, MockStaging, mock_model, mock_num_blocks
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.prefix_cache import PrefixCache
from shared.engine.runner import EngineRunner
from shared.engine.sequence import FailedSequence, NewToken
from shared.engine.staging import Staging, staging_of
from shared.errors import ModelRefused
from shared.instance.latency_estimate import LatencyEstimate
from shared.kv.holder import KVHolder
from shared.messages.records import Role
from shared.process import Lifetime
from shared.settings import InstanceSettings

Loaded = LoadedModel | MockModel


@dataclass(slots=True)
class Body:
    """A model and all that it needs. The pool, its cache and the leases outlive changes of role."""

    settings: InstanceSettings
    model_path: str
    loaded: Loaded
    max_model_len: int
    engine: AnyEngine
    pool: KVPool
    staging: Staging
    cache: PrefixCache
    runner: EngineRunner
    holder: KVHolder
    latency: LatencyEstimate = field(default_factory=LatencyEstimate)
    _steps: "asyncio.Queue[list[NewToken]]" = field(default_factory=asyncio.Queue)

    async def tell_tokens(self, tell: Callable[[list[NewToken]], Any]) -> None:
        """Passes on what the engine generates, step by step, so that the order of tokens stays; for ever."""
        while True:
            tokens = await self._steps.get()
            try:
                await tell(tokens)
            finally:
                self._steps.task_done()

    async def told(self) -> None:
        """Returns once everything that the engine has given was passed on."""
        await self._steps.join()

    async def prepare(self, role: Role) -> None:
        """Makes ready what one role alone needs. The engine has no work meanwhile."""
        engine = self.engine
        if role != "decode" or not isinstance(engine, Engine) or engine.pool.device.type != "cuda":
            return
        if not engine.has_graphs:
            assert isinstance(self.loaded, LoadedModel)
            slots = self.settings.decode_slots
            engine.use_graphs(await asyncio.to_thread(DecodeGraphs, self.loaded, self.pool, slots, self.max_model_len))


@asynccontextmanager
async def open_body(
    settings: InstanceSettings,
    model_path: str,
    loaded: Loaded,
    on_crash: Callable[[BaseException], None],
    on_prefill_step: Callable[[], None] = lambda: None,
    on_failed: Callable[[list[FailedSequence]], None] = lambda failed: None,
) -> AsyncIterator[Body]:
    """The body of an instance, until the block ends. The callbacks are those of `EngineRunner`.

    Raises:
        ModelRefused: the pool does not hold a request of the model.
    """
    is_mock = isinstance(loaded, MockModel)
    num_blocks = (
        mock_num_blocks(loaded.layout, settings.kv_pool_bytes)
        if is_mock
        else settings.kv_pool_bytes // loaded.layout.block_bytes
    )
    longest = max_model_len(settings, loaded, num_blocks)
    pool = KVPool(loaded.layout, num_blocks, "cpu" if is_mock else find_device(settings.device))
    engine: AnyEngine
    staging: Staging
    if isinstance(loaded, MockModel):
        engine, staging = MockEngine(loaded, pool, settings.max_step_tokens), MockStaging(pool, loaded.times)
    else:
        engine, staging = Engine(loaded, pool, settings.max_step_tokens), staging_of(pool)
    engine.share = settings.engine_share
    holder = KVHolder(
        loaded.layout, settings.kv_host, settings.kv_port, settings.stall_timeout_s, settings.kv_advertise_host
    )
    steps: asyncio.Queue[list[NewToken]] = asyncio.Queue()
    runner = EngineRunner(engine, steps.put_nowait, on_crash, on_prefill_step, on_failed)
    async with holder.serving(), runner:
        yield Body(
            settings=settings,
            model_path=model_path,
            loaded=loaded,
            max_model_len=longest,
            engine=engine,
            pool=pool,
            staging=staging,
            cache=PrefixCache(num_blocks, settings.block_size, enabled=settings.prefix_cache),
            runner=runner,
            holder=holder,
            _steps=steps,
        )


async def load(settings: InstanceSettings, model_path: str, lifetime: Lifetime) -> Loaded | None:
    """The model; None if we are asked to end before it is there. Its thread is then left to die with the process.

    Raises:
        ModelRefused: it cannot be served.
    """
    if settings.engine == "mock":
        return await asyncio.to_thread(mock_model, settings.mock_times, settings.block_size, name=model_path)
    loop = asyncio.get_running_loop()
    loading: asyncio.Future[LoadedModel] = loop.create_future()

    def work() -> None:
        try:
            result = load_model(
                model_path,
                dtype=settings.dtype,
                device=str(find_device(settings.device)),
                num_threads=settings.threads or None,
                block_size=settings.block_size,
                quantization=settings.quantization,
                native=settings.native_kernels,
            )
        except Exception as error:  # noqa: BLE001 - the thread's edge: whatever it was, its owner learns of it
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


def max_model_len(settings: InstanceSettings, loaded: Loaded, num_blocks: int) -> int:
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
