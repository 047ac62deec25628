"""The instances as this gateway knows them: read from the registry again and again, kept when Redis is away."""

import asyncio
import logging
import time
from collections.abc import Callable

from shared.errors import RegistryUnavailable
from shared.registry.records import InstanceRecord, Role
from shared.registry.registry import Registry
from shared.registry.view import View

READ_EVERY_S = 0.2

log = logging.getLogger(__name__)


class Instances:
    """Watches one group's instances of one model. `on_lost` hears the id of each whose heartbeat has become late."""

    def __init__(
        self, registry: Registry, group: str, model: str, late_after_s: float, on_lost: Callable[[str], None]
    ) -> None:
        self._registry = registry
        self._group = group
        self._model = model
        self._on_lost = on_lost
        self._view = View(late_after_s, {})
        self._away = False

    def ready(self, role: Role) -> list[InstanceRecord]:
        return self._view.ready(role)

    def max_model_len(self) -> int | None:
        """The longest request that every live instance can take; None while there is none."""
        return min((record.max_model_len for record in self._view.alive().values()), default=None)

    async def watch(self) -> None:
        """Reads for ever."""
        while True:
            await self.read()
            await asyncio.sleep(READ_EVERY_S)

    async def read(self) -> None:
        """Reads once; a registry that is away leaves everything as it was."""
        try:
            members = await self._registry.instances(self._group)
        except RegistryUnavailable as error:
            if not self._away:
                log.warning("going on with the instances known so far: %s", error)
            self._away = True
            return
        if self._away:
            log.info("the registry is back")
        self._away = False
        records = [one for one in members if one.model == self._model]
        before = self._view.alive()
        self._view = self._view.updated(records, time.monotonic())
        for gone in before.keys() - self._view.alive().keys():
            if gone in self._view.seen:
                log.warning("instance %s is lost: its heartbeat is late", gone)
                self._on_lost(gone)
            else:
                log.info("instance %s has ended, and given up what it held", gone)
