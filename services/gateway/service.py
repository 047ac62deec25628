"""The gateway's process: connect, listen on the bus, serve HTTP, beat its heart, drain."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager

import uvicorn

from services.gateway import policy
from services.gateway.api import ApiContext, FirstToken
from services.gateway.generator import Generator
from services.gateway.groups import Group, Groups
from services.gateway.telemetry import GatewayMetrics
from services.gateway.nats_api import NatsApi
from services.gateway.openai.app import create_app
from services.gateway.streams import Streams
from shared import __version__
from shared.addresses import advertised
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import RequestError, SettingsInvalid
from shared.messages.generate_api import Priority
from shared.messages.records import GatewayRecord
from shared.messages.serving import OutputToken, SlotFreed
from shared.process import Lifetime, heartbeats
from shared.registry import registry
from shared.registry.registry import Registry
from shared.sampling import SamplingParams
from shared.settings import GatewaySettings, hostname
from shared.telemetry import tracing
from shared.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


async def serve(settings: GatewaySettings, lifetime: Lifetime) -> None:
    gateway_id = f"gateway-{hostname()}-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        stack.enter_context(tracing.exporting("gateway", gateway_id))
        tokenizer = await asyncio.to_thread(Tokenizer.load, settings.model)
        bus = await stack.enter_async_context(
            connection.connect(settings.nats_url, name=gateway_id, timeout_s=settings.connect_timeout_s)
        )
        records = await stack.enter_async_context(
            registry.connect(settings.redis_url, ttl_s=settings.record_ttl_s, timeout_s=settings.connect_timeout_s)
        )
        await Gateway(settings, gateway_id, tokenizer, bus, records).run(lifetime)


class Gateway:
    """A gateway and its parts; also the `Core` that its APIs speak to."""

    def __init__(
        self, settings: GatewaySettings, gateway_id: str, tokenizer: Tokenizer, bus: Bus, records: Registry
    ) -> None:
        self._settings = settings
        self._id = gateway_id
        self._tokenizer = tokenizer
        self._bus = bus
        self._records = records
        self._started_at = time.time()
        self._streams = Streams(bus, gateway_id)
        self._groups = Groups(settings, records, bus, self._streams.num_open, self._streams.lose)
        self._generator = Generator(
            settings,
            bus,
            self._streams,
            self._groups.of,
            lambda: self._groups.scenarios if self._groups.finds_scenarios else None,
        )
        self._metrics = GatewayMetrics()
        self._api = ApiContext(
            core=self,
            tokenizer=tokenizer,
            served_model_name=settings.served_model_name,
            metrics=self._metrics,
            api_keys=settings.api_key_set,
            max_body_bytes=settings.max_body_bytes,
            request_timeout_s=settings.request_timeout_s,
        )

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        deadline: float,
        scenario: str | None = None,
        priority: Priority = "interactive",
    ) -> AsyncGenerator[OutputToken, None]:
        tokens = self._generator.generate(
            prompt_token_ids,
            sampling,
            request_id=request_id,
            deadline=deadline,
            scenario=scenario,
            priority=priority,
        )
        async with aclosing(tokens):
            async for token in tokens:
                if isinstance(token, FirstToken):
                    self._metrics.count_cached(token.scenario, len(prompt_token_ids), token.num_cached_tokens)
                yield token

    def max_model_len(self) -> int:
        return self._groups.max_model_len() or self._tokenizer.max_model_len

    def not_ready(self) -> str | None:
        if not self._bus.connected:
            return "the connection to NATS is lost"
        prefills, decoders = self._groups.ready("prefill"), self._groups.ready("decode")
        missing = [role for role, found in (("prefill", prefills), ("decode", decoders)) if not found]
        if missing:
            return f"no {' and no '.join(missing)} instance of {self._settings.served_model_name} is ready"
        if not any(self._can_serve(group) for group in self._groups.all()):
            return "no decode instance has the weights, dtype and KV layout of a prefill instance of its group"
        return None

    def _can_serve(self, group: Group) -> bool:
        decoders = group.ready("decode")
        return any(policy.can_prefill(None, 0, decoders, one) for one in group.ready("prefill"))

    async def run(self, lifetime: Lifetime) -> None:
        """Serves until the lifetime ends, then drains."""
        settings = self._settings
        await self._groups.read()
        async with asyncio.TaskGroup() as tasks:
            nats_api = NatsApi(self._api, self._bus, self._id, tasks)
            self._nats_api = nats_api
            self._bus.on_reconnect(self._streams.bus_came_back)
            watching = tasks.create_task(self._groups.watch())
            await self._bus.subscribe(subjects.gateway(self._id, ">"), self._on_message)
            await self._bus.subscribe(subjects.map_of("*"), self._groups.on_map)
            await self._bus.subscribe(subjects.CHANGED, self._groups.on_changed)
            await nats_api.subscribe()
            server = _Server(_uvicorn_config(settings, self._api))
            serving = tasks.create_task(_serve_http(server, settings, lifetime))
            async with heartbeats(
                self.record, self._records.write_gateway, self._records.remove_gateway, settings.heartbeat_s
            ):
                log.info("ready: %s serves HTTP at %s:%d", self._id, settings.http_host, settings.http_port)
                await lifetime.until_ending()
                server.should_exit = True
                await nats_api.drain(settings.drain_timeout_s)
                await serving
            watching.cancel()

    def record(self, heartbeat: int) -> GatewayRecord:
        """This gateway's record as of now."""
        return GatewayRecord(
            id=self._id,
            pid=os.getpid(),
            host=hostname(),
            version=__version__,
            started_at=self._started_at,
            heartbeat=heartbeat,
            address=f"http://{advertised(self._settings.http_host)}:{self._settings.http_port}",
            open_requests=len(self._streams),
            waiting_requests=sum(group.prefill_line.num_waiting for group in self._groups.all()),
            traffic={group.name: group.traffic() for group in self._groups.all()},
            labels=self._groups.scenarios.traffic(),
        )

    def _on_free(self, free: SlotFreed) -> None:
        group = self._groups.named(free.group)
        if group is not None:
            group.line(free.role).hint()

    async def _on_message(self, incoming: Incoming) -> None:
        verb, key = subjects.verb_and_key(incoming.subject)
        try:
            if verb == "slot_freed":
                self._on_free(incoming.parse(SlotFreed))
            elif verb == "gone" and incoming.nobody_listens:
                self._nats_api.nobody_heard(key)
            else:
                await self._streams.on_message(verb, incoming)
        except RequestError as error:
            log.error("cannot read a message on %s: %s", incoming.subject, error.message)


class _Server(uvicorn.Server):
    """uvicorn, whose signals are ours (`Lifetime`)."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(settings: GatewaySettings, api: ApiContext) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(api),
        host=settings.http_host,
        port=settings.http_port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.drain_timeout_s)),
    )


async def _serve_http(server: _Server, settings: GatewaySettings, lifetime: Lifetime) -> None:
    try:
        await server.serve()
    except SystemExit as error:  # uvicorn's way to say that it cannot listen
        raise SettingsInvalid(
            f"{settings.http_host}:{settings.http_port} cannot be used: set PDSERVE_HTTP_HOST and PDSERVE_HTTP_PORT"
        ) from error
    lifetime.end()
