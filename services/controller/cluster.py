"""The cluster as this controller sees it: records and maps, read from the registry again and again."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.errors import RegistryUnavailable
from shared.messages.records import GatewayRecord, GroupMap, InstanceRecord
from shared.registry.registry import Registry
from shared.registry.view import View

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Cluster:
    """What has been read last. What was known stays while Redis is away."""

    late_after_s: float
    view: View[InstanceRecord] = field(init=False)
    gateways: list[GatewayRecord] = field(default_factory=list)
    maps: dict[str, GroupMap] = field(default_factory=dict)
    present: set[str] = field(default_factory=set)
    """Ids of the instances that have a record, whether their hearts beat or not: who ends in order takes it along."""
    leader: str | None = None
    is_fresh: bool = False
    """Whether the last reading succeeded."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.view = View(self.late_after_s, {})

    @property
    def alive(self) -> dict[str, InstanceRecord]:
        """The instances whose hearts beat, by id."""
        return self.view.alive()

    def map_with(self, instance_id: str) -> GroupMap | None:
        """The map that has an instance."""
        return next((one for one in self.maps.values() if one.member(instance_id) is not None), None)

    async def read(self, registry: Registry) -> None:
        """Reads once."""
        try:
            records = await registry.instances()
            gateways = await registry.gateways()
            maps = await registry.maps()
            leader = await registry.leader()
        except RegistryUnavailable as error:
            if self.is_fresh:
                log.warning("going on with what is known: %s", error)
            self.is_fresh = False
            return
        self.is_fresh = True
        before = self.alive
        self.view = self.view.updated(records, time.monotonic())
        self.present = {one.id for one in records}
        self.gateways, self.leader = gateways, leader
        for one in maps:
            known = self.maps.get(one.name)
            if known is None or one.version > known.version:
                self.maps[one.name] = one
        _log_changes(before, self.alive)
        self._changed.set()
        self._changed = asyncio.Event()

    async def forget_old_maps(self, registry: Registry) -> None:
        """Whoever begins to lead goes by what is written, and by what it knows only if Redis has lost everything."""
        written = {one.name: one for one in await registry.maps()}
        if written:
            self.maps = written

    async def until(self, reached: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until it is so, after each reading; whether it came to be in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not reached():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


def _log_changes(before: dict[str, InstanceRecord], after: dict[str, InstanceRecord]) -> None:
    for name in after.keys() - before.keys():
        log.info("%s is there", name)
    for name in before.keys() - after.keys():
        log.warning("%s is gone or late", name)
