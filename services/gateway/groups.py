"""The groups as this gateway knows them: maps and members, read again and again, kept when Redis is away.

A gateway sends requests to an instance that is in a group's map, under the epoch of its record, ready and alive.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from services.gateway.prefix_affinity import Affinity
from services.gateway.costs import Costs
from services.gateway.line import Line
from services.gateway.scenarios import Scenarios
from services.gateway.traffic import Counts
from shared.bus.connection import Bus, Incoming
from shared.errors import RegistryUnavailable, RequestError
from shared.messages.records import ROLES, GroupMap, InstanceRecord, Role, Traffic
from shared.registry.registry import Registry
from shared.registry.view import View
from shared.settings import GatewaySettings

READ_EVERY_S = 0.2
DEFAULT = "default"

log = logging.getLogger(__name__)


class Group:
    """One group: who can be asked, and who waits for them."""

    def __init__(
        self,
        group_map: GroupMap,
        bus: Bus,
        alive: Callable[[], Mapping[str, InstanceRecord]],
        num_open: Callable[[], Mapping[str, int]],
        settings: GatewaySettings,
    ) -> None:
        self.map = group_map
        self._alive = alive
        self._model = settings.served_model_name
        self.counts = Counts()
        self.costs = Costs()
        self.affinity = Affinity()
        self.prefill_line = Line(bus, "prefill", self.ready, num_open, settings)
        self.decode_line = Line(bus, "decode", self.ready, num_open, settings)

    @property
    def name(self) -> str:
        return self.map.name

    def ready(self, role: Role) -> list[InstanceRecord]:
        """The instances of a role that can be asked."""
        alive = self._alive()
        found = [(member, alive.get(member.instance_id)) for member in self.map.of(role)]
        return [
            record
            for member, record in found
            if record is not None
            and (record.epoch, record.role, record.state) == (member.epoch, role, "ready")
            and record.model == self._model
        ]

    def serves(self, fingerprint: str | None = None) -> bool:
        """Whether each role has an instance, of these weights if any are asked for."""
        return all(any(fingerprint in (None, one.fingerprint) for one in self.ready(role)) for role in ROLES)

    def line(self, role: Role) -> Line:
        return self.prefill_line if role == "prefill" else self.decode_line

    def hint(self) -> None:
        """Slots may be free."""
        self.prefill_line.hint()
        self.decode_line.hint()

    def traffic(self) -> Traffic:
        return self.counts.snapshot(self.prefill_line.num_waiting, self.decode_line.num_waiting)


class Groups:
    """Watches all groups. `on_lost` hears the id of each instance whose heartbeat has become late.

    Args:
        num_open: this gateway's open streams by instance: those instances are watched, in a map or not.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        bus: Bus,
        num_open: Callable[[], Mapping[str, int]],
        on_lost: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._bus = bus
        self._num_open = num_open
        self._on_lost = on_lost
        self._groups: dict[str, Group] = {}
        self._view = View(settings.heartbeat_late_s, {})
        self._alive: dict[str, InstanceRecord] = {}
        self._away = False
        self._read_now = asyncio.Event()
        self.scenarios = Scenarios()
        self._default = self._make(GroupMap(name=DEFAULT, scenario=DEFAULT, version=0, term=0))

    def of(self, scenario: str | None, fingerprint: str | None = None) -> Group:
        """The group for a scenario: of those that serve it the one with the fewest requests for each instance, or
        else the default one. Where nobody can serve it now, it waits for its own.

        Args:
            fingerprint: the weights that a request has begun with.
        """
        groups = self._groups.values()
        for wanted in (scenario, DEFAULT):
            able = [one for one in groups if one.map.scenario == wanted and one.serves(fingerprint)]
            if able:
                return min(able, key=_crowd)
        return min((one for one in groups if one.map.scenario == scenario), key=_crowd, default=self._default)

    @property
    def finds_scenarios(self) -> bool:
        """Whether requests that name no scenario are to be labelled."""
        return self._default.map.finds_scenarios

    def named(self, name: str) -> Group | None:
        return self._groups.get(name)

    def all(self) -> Iterable[Group]:
        return self._groups.values()

    def max_model_len(self) -> int | None:
        """The longest request that every live member can take; None while there is none."""
        members = {member.instance_id for group in self._groups.values() for member in group.map.members}
        model = self._settings.served_model_name
        alive = (record for record in self._alive.values() if record.id in members and record.model == model)
        return min((record.max_model_len for record in alive), default=None)

    def ready(self, role: Role) -> list[InstanceRecord]:
        """The instances of a role in all groups."""
        return [record for group in self._groups.values() for record in group.ready(role)]

    async def watch(self) -> None:
        """Reads for ever: often, and at once when a map is announced."""
        while True:
            self._read_now.clear()
            await self.read()
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._read_now.wait()

    async def on_map(self, incoming: Incoming) -> None:
        """A map is announced."""
        try:
            self._take(incoming.parse(GroupMap))
        except RequestError as error:
            log.error("cannot read a map: %s", error.message)
            return
        self._read_now.set()

    async def on_changed(self, incoming: Incoming) -> None:
        self._read_now.set()

    async def read(self) -> None:
        """Reads once; a registry that is away leaves everything as it was."""
        try:
            maps = await self._registry.maps()
            members = {member.instance_id for one in maps for member in one.members}
            for known in self._groups.values():
                members |= {member.instance_id for member in known.map.members}
            # One that has left its map is not lost for that, and has a record for as long as it lives.
            records = await self._registry.members(sorted(members | self._alive.keys() | self._num_open().keys()))
        except RegistryUnavailable as error:
            if not self._away:
                log.warning("going on with the instances known so far: %s", error)
            self._away = True
            return
        if self._away:
            log.info("the registry is back")
        self._away = False
        for one in maps:
            self._take(one)
        if maps:
            self._drop({one.name for one in maps})
        self._update(records)

    def _update(self, records: list[InstanceRecord]) -> None:
        before = self._alive
        self._view = self._view.updated(records, time.monotonic())
        self._alive = self._view.alive()
        if {one.id: one.state for one in before.values()} != {one.id: one.state for one in self._alive.values()}:
            for group in self._groups.values():
                group.hint()
        for gone in before.keys() - self._alive.keys():
            for group in self._groups.values():
                group.affinity.forget(gone)
            if gone in self._view.seen:
                log.warning("instance %s is lost: its heartbeat is late", gone)
                self._on_lost(gone)
            else:
                log.info("instance %s has ended, and given up what it held", gone)

    def _take(self, new: GroupMap) -> None:
        known = self._groups.get(new.name)
        if known is None:
            self._groups[new.name] = self._make(new)
        elif new.version > known.map.version:
            known.map = new
            known.hint()

    def _make(self, group_map: GroupMap) -> Group:
        if group_map.name == DEFAULT and group_map.version > 0:
            self._default.map = group_map
            return self._default
        return Group(group_map, self._bus, lambda: self._alive, self._num_open, self._settings)

    def _drop(self, names: set[str]) -> None:
        """Forgets groups that are no more, once nothing of theirs is open."""
        for name in [name for name in self._groups if name not in names]:
            if self._groups[name].counts.open == 0:
                del self._groups[name]


def _crowd(group: Group) -> float:
    return group.counts.open / max(1, len(group.map.members))
