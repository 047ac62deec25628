"""The gateway's process: connect, serve HTTP and NATS, watch instances and gateways, drain."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager

import uvicorn

from services.gateway import routing
from services.gateway.api import ApiContext
from services.gateway.dispatcher import Dispatcher
from services.gateway.events import EventRouter
from services.gateway.groups import Group, Groups
from services.gateway.instance_watch import Instances
from services.gateway.nats_api import NatsApi
from services.gateway.openai.app import http_server_config
from services.gateway.openai.idempotency import idempotent_answers
from services.gateway.request import Request
from shared import __version__
from shared.addresses import advertised
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.dead_gateways import GatewayDeaths
from shared.errors import RegistryUnavailable, RequestError, SettingsInvalid
from shared.messages.records import GatewayRecord
from shared.messages.serving import SlotFreed
from shared.process import Lifetime, heartbeats
from shared.registry import registry
from shared.registry.idempotency import RedisIdempotencyIndex
from shared.registry.open_answers import OpenAnswers
from shared.registry.registry import Registry
from shared.settings import GatewaySettings, hostname
from shared.telemetry import tracing
from shared.telemetry.gateway_metrics import GatewayMetrics
from shared.text.tokenizer import Tokenizer

TIDY_EVERY_S = 10.0

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
        self._address = f"http://{advertised(settings.http_host)}:{settings.http_port}"
        self._started_at = time.time()
        self._metrics = GatewayMetrics()
        self._router = EventRouter(bus, gateway_id)
        self._groups = Groups(settings, records, self._router.participants, self._heartbeat_lost)
        self._instances = Instances(bus, self._router, self._instance_lost, self._groups.mark_alive)
        self._dispatcher = Dispatcher(settings, self._router, self._instances, self._groups, self._metrics)
        self._open_answers = OpenAnswers(records, gateway_id)
        self._deaths = GatewayDeaths(bus, records, self._open_answers, gateway_id, heartbeat_s=settings.heartbeat_s)
        self._api = ApiContext(
            core=self,
            tokenizer=tokenizer,
            served_model_name=settings.served_model_name,
            metrics=self._metrics,
            api_keys=settings.api_key_set,
            max_body_bytes=settings.max_body_bytes,
            request_timeout_s=settings.request_timeout_s,
        )
        self._nats_api = NatsApi(self._api, bus, gateway_id, self._open_answers)

    def serving(self, requests: Sequence[Request]) -> AbstractAsyncContextManager[None]:
        return self._dispatcher.serving(requests)

    def finish(self, request: Request) -> None:
        self._dispatcher.finish(request)

    def max_model_len(self) -> int:
        return self._groups.max_model_len() or self._tokenizer.max_model_len

    def not_ready(self) -> str | None:
        if not self._bus.connected:
            return "the connection to NATS is lost"
        prefills, decoders = self._groups.ready("prefill"), self._groups.ready("decode")
        missing = [role for role, found in (("prefill", prefills), ("decode", decoders)) if not found]
        if missing:
            return f"no {' and no '.join(missing)} instance of {self._settings.served_model_name} is ready"
        if not any(_can_serve(group) for group in self._groups.all()):
            return "no decode instance has the weights, dtype and KV layout of a prefill instance of its group"
        return None

    async def run(self, lifetime: Lifetime) -> None:
        """Serves until the lifetime ends, then drains."""
        settings = self._settings
        await self._groups.read()
        keep_s = settings.request_timeout_s + settings.idempotency_ttl_s
        index = RedisIdempotencyIndex(self._records, self._id, self._address, ttl_s=keep_s)
        async with idempotent_answers(settings.idempotency_ttl_s, index) as answers, asyncio.TaskGroup() as tasks:
            self._bus.on_reconnect(self._router.bus_reconnected)
            watching = [
                tasks.create_task(self._groups.watch()),
                tasks.create_task(self._instances.watch()),
                tasks.create_task(self._open_answers.run()),
                tasks.create_task(self._deaths.watch()),
                tasks.create_task(self._tidy()),
            ]
            await self._bus.subscribe(subjects.gateway(self._id, ">"), self._on_message)
            await self._bus.subscribe(subjects.CHANGED, self._groups.on_changed)
            await self._nats_api.subscribe()
            server = _Server(http_server_config(self._api, settings, answers))
            serving = tasks.create_task(_serve_http(server, settings, lifetime))
            async with heartbeats(
                self.record, self._records.write_gateway, self._records.remove_gateway, settings.heartbeat_s
            ):
                log.info("ready: %s serves HTTP at %s:%d", self._id, settings.http_host, settings.http_port)
                await lifetime.until_ending()
                server.should_exit = True
                await self._nats_api.drain(settings.drain_timeout_s)
                await serving
            for task in watching:
                task.cancel()
        try:
            await self._open_answers.close()
        except RegistryUnavailable as error:
            log.warning("the list of open answers could not be removed and will expire: %s", error)

    def record(self, heartbeat: int) -> GatewayRecord:
        """Returns this gateway's record as of now."""
        failures, link_failures = self._instances.failures()
        queues = {group.name: (group, self._dispatcher.queues(group)) for group in self._groups.all()}
        return GatewayRecord(
            id=self._id,
            pid=os.getpid(),
            host=hostname(),
            version=__version__,
            started_at=self._started_at,
            heartbeat=heartbeat,
            address=self._address,
            open_requests=len(self._router),
            waiting_requests=sum(waiting.prefill.num_waiting for _, waiting in queues.values()),
            traffic={
                name: group.counts.snapshot(waiting.prefill.num_waiting, waiting.decode.num_waiting)
                for name, (group, waiting) in queues.items()
            },
            labels=self._groups.scenario_labels.traffic(),
            failures=failures,
            link_failures=link_failures,
        )

    async def _on_message(self, incoming: Incoming) -> None:
        verb, key = subjects.verb_and_key(incoming.subject)
        try:
            if verb == "slot_freed":
                self._on_slot_freed(incoming.parse(SlotFreed))
            elif verb == "gone" and incoming.is_no_responders:
                self._nats_api.on_no_responders(key)
            else:
                await self._router.on_message(verb, incoming)
        except RequestError as error:
            log.error("skipping a malformed message on %s: %s", incoming.subject, error.message)

    def _on_slot_freed(self, freed: SlotFreed) -> None:
        group = self._groups.named(freed.group)
        if group is not None:
            self._dispatcher.queues(group).of(freed.role).slot_freed(freed.instance_id, freed.capacity)

    def _heartbeat_lost(self, instance_id: str) -> None:
        self._instances.lose(instance_id, "is lost: its heartbeat is late")

    def _instance_lost(self, instance_id: str) -> None:
        self._metrics.count_lost_instance()
        self._groups.mark_lost(instance_id)

    async def _tidy(self) -> None:
        """Drops what is known of instances that are gone, again and again."""
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            self._dispatcher.tidy()
            self._instances.keep({member.instance_id for group in self._groups.all() for member in group.map.members})


def _can_serve(group: Group) -> bool:
    limits = routing.longest_by_fingerprint(group.ready("decode"))
    return any(routing.can_prefill(None, 1, limits, one) for one in group.ready("prefill"))


class _Server(uvicorn.Server):
    """uvicorn, whose signals are ours (`Lifetime`)."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve_http(server: _Server, settings: GatewaySettings, lifetime: Lifetime) -> None:
    try:
        await server.serve()
    except SystemExit as error:  # uvicorn's way to say that it cannot listen
        raise SettingsInvalid(
            f"{settings.http_host}:{settings.http_port} cannot be used: set PDSERVE_HTTP_HOST and PDSERVE_HTTP_PORT"
        ) from error
    lifetime.end()
