"""The controller's loop: read the registry, compare heartbeats, say what changed, answer `pdserve status`."""

import asyncio
import logging
import secrets
import time
from contextlib import AsyncExitStack

from services.controller.status import status
from shared.bus import connection, subjects
from shared.bus.connection import Incoming
from shared.errors import RegistryUnavailable
from shared.process import Lifetime
from shared.registry import registry
from shared.registry.records import GatewayRecord
from shared.registry.registry import Registry
from shared.registry.view import View
from shared.settings import ControllerSettings, hostname
from shared.telemetry import tracing

READ_EVERY_S = 0.25

log = logging.getLogger(__name__)


async def serve(settings: ControllerSettings, lifetime: Lifetime) -> None:
    controller_id = f"controller-{hostname()}-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        stack.enter_context(tracing.exporting("controller", controller_id))
        bus = await stack.enter_async_context(
            connection.connect(settings.nats_url, name=controller_id, timeout_s=settings.connect_timeout_s)
        )
        records = await stack.enter_async_context(
            registry.connect(settings.redis_url, ttl_s=settings.record_ttl_s, timeout_s=settings.connect_timeout_s)
        )
        controller = Controller(controller_id, records, settings.heartbeat_late_s)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        await bus.subscribe(subjects.STATUS, controller.on_status, queue=subjects.CONTROLLERS)
        watching = tasks.create_task(controller.watch())
        log.info("ready: %s", controller_id)
        await lifetime.until_ending()
        watching.cancel()


class Controller:
    """What the controller knows."""

    def __init__(self, controller_id: str, records: Registry, late_after_s: float) -> None:
        self._id = controller_id
        self._records = records
        self._late_after_s = late_after_s
        self._groups: dict[str, View] = {}
        self._gateways: list[GatewayRecord] = []

    async def watch(self) -> None:
        """Reads for ever; what was known stays while Redis is away."""
        while True:
            try:
                await self.read()
            except RegistryUnavailable as error:
                log.warning("going on with what is known: %s", error)
            await asyncio.sleep(READ_EVERY_S)

    async def read(self) -> None:
        """Reads the registry once."""
        for name in {*await self._records.groups(), *self._groups}:
            before = self._groups.get(name, View(self._late_after_s, {}))
            after = before.updated(await self._records.instances(name), time.monotonic())
            _log_changes(name, before, after)
            self._groups[name] = after
        self._groups = {name: view for name, view in self._groups.items() if view.seen}
        self._gateways = await self._records.gateways()

    async def on_status(self, incoming: Incoming) -> None:
        if incoming.reply_to:
            await incoming.respond(status(self._id, self._groups, self._gateways))


def _log_changes(group: str, before: View, after: View) -> None:
    for name in after.alive().keys() - before.alive().keys():
        log.info("group %s: %s is there, as %s", group, name, after.seen[name].record.role)
    for name in before.alive().keys() - after.alive().keys():
        if name in after.seen:
            log.warning("group %s: %s is late", group, name)
        else:
            log.info("group %s: %s has ended", group, name)
