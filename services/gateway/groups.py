"""The groups as this gateway knows them: maps, records and heartbeats, read again and again, kept when Redis is away.

A gateway sends requests to an instance that is in a group's map, under the epoch of its record, ready and alive. Which
instances those are is worked out when a record or a map changes or a heartbeat is late, not for each request.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from services.gateway import routing
from shared.bus.connection import Incoming
from shared.errors import RegistryUnavailable
from shared.groups import DEFAULT, declared_name
from shared.messages.records import ROLES, GroupMap, InstanceRecord, Role
from shared.prefix_affinity import PrefixAffinity
from shared.registry.follower import InstanceFollower, Reading
from shared.registry.heartbeats import Heartbeat
from shared.registry.registry import Registry
from shared.scenario_labels import ScenarioLabels
from shared.settings import GatewaySettings
from shared.telemetry.gateway_metrics import TrafficCounts

READ_EVERY_S = 0.2
MIN_READ_INTERVAL_S = 0.02
"""However often changes are announced."""

log = logging.getLogger(__name__)


class Group:
    """One group: its map, the instances that can be asked, and what this gateway knows about its requests.

    Attributes:
        version: grows whenever the map or the ready instances change.
        on_change: called after each such change.
    """

    def __init__(self, group_map: GroupMap) -> None:
        self.map = group_map
        self.version = 0
        self.on_change: list[Callable[[], None]] = []
        self.counts = TrafficCounts()
        self.affinity = PrefixAffinity()
        self._ready: dict[Role, tuple[InstanceRecord, ...]] = dict.fromkeys(ROLES, ())
        self._by_id: dict[str, InstanceRecord] = {}
        self._decode_limits: dict[str, int] = {}
        """The longest request that decode instances take, by fingerprint."""
        self._fingerprints: dict[Role, frozenset[str]] = {role: frozenset() for role in ROLES}

    @property
    def name(self) -> str:
        return self.map.name

    def ready(self, role: Role) -> tuple[InstanceRecord, ...]:
        """Returns the instances of a role that can be asked. Their load is as of their last change of state."""
        return self._ready[role]

    def find(self, instance_id: str) -> InstanceRecord | None:
        """Returns an instance of either role that can be asked."""
        return self._by_id.get(instance_id)

    def serves(self, fingerprint: str | None = None) -> bool:
        """Returns whether each role has an instance, with these weights if any are given."""
        if fingerprint is None:
            return all(self._ready[role] for role in ROLES)
        return all(fingerprint in self._fingerprints[role] for role in ROLES)

    def suits(self, role: Role, fingerprint: str | None, num_tokens: int, record: InstanceRecord) -> bool:
        """Returns whether an instance can serve a request of `num_tokens` at its end, be it full or not.

        Args:
            fingerprint: the weights that the request has started on; None if any will do.
        """
        if role == "decode":
            return routing.can_decode(fingerprint or record.fingerprint, num_tokens, record)
        return routing.can_prefill(fingerprint, num_tokens, self._decode_limits, record)

    def update(self, group_map: GroupMap, usable: Mapping[str, InstanceRecord]) -> None:
        """Takes the current map, and the records of all live instances of the served model."""
        ready = {role: tuple(_ready_members(group_map, role, usable)) for role in ROLES}
        if group_map == self.map and ready == self._ready:
            return
        self.map, self._ready = group_map, ready
        self._by_id = {record.id: record for role in ROLES for record in ready[role]}
        self._fingerprints = {role: frozenset(record.fingerprint for record in ready[role]) for role in ROLES}
        self._decode_limits = routing.longest_by_fingerprint(ready["decode"])
        self.version += 1
        for notify in self.on_change:
            notify()


def _ready_members(group_map: GroupMap, role: Role, usable: Mapping[str, InstanceRecord]) -> Iterable[InstanceRecord]:
    for member in group_map.of(role):
        record = usable.get(member.instance_id)
        if record is not None and (record.epoch, record.role, record.state) == (member.epoch, role, "ready"):
            yield record


@dataclass(slots=True)
class _Lost:
    """An instance that was found dead before its heartbeat was late, and its heartbeat at that time."""

    heartbeat: Heartbeat
    answers: bool = False

    def is_back(self, now: Heartbeat) -> bool:
        has_changed = now.identity != self.heartbeat.identity
        return now.heartbeat != self.heartbeat.heartbeat and (self.answers or has_changed)


class Groups:
    """Watches the groups of this gateway, the default group among them even before it has a map.

    Args:
        watched: ids of instances that serve open requests: they are watched, in a map or not.
        on_lost: called with the id of each instance whose heartbeat has become late.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        watched: Callable[[], Collection[str]],
        on_lost: Callable[[str], None],
    ) -> None:
        self._model = settings.served_model_name
        self._own_names = settings.watched_group_names
        self._registry = registry
        self._watched = watched
        self._on_lost = on_lost
        self._maps: dict[str, GroupMap] = {}
        """As read last. A group takes its map when it is updated."""
        self._versions: dict[str, int] = {}
        """The versions under which these maps were announced in Redis."""
        self._instances = InstanceFollower(registry, settings.heartbeat_late_s)
        self._lost: dict[str, _Lost] = {}
        self._away = False
        self._read_now = asyncio.Event()
        self.scenario_labels = ScenarioLabels()
        self._default = Group(GroupMap(name=DEFAULT, scenario=DEFAULT, version=0, term=0))
        self._groups = {DEFAULT: self._default}
        self._by_scenario: dict[str, list[Group]] = {}
        self._ready: dict[Role, tuple[InstanceRecord, ...]] = dict.fromkeys(ROLES, ())
        self._max_model_len: int | None = None
        self._index()

    def of(self, scenario: str | None, fingerprint: str | None = None) -> Group:
        """Returns the group for a scenario: of those that can serve it the one with the fewest open requests for each
        instance, or else the default group. If none can serve it now, its own group.

        Args:
            fingerprint: the weights that a request has started on.
        """
        for wanted in (scenario, DEFAULT):
            able = [one for one in self._by_scenario.get(wanted or DEFAULT, ()) if one.serves(fingerprint)]
            if able:
                return min(able, key=_load)
        return min(self._by_scenario.get(scenario or DEFAULT, ()), key=_load, default=self._default)

    def is_served_elsewhere(self, scenario: str | None, fingerprint: str | None, group: Group) -> bool:
        """Returns whether another group than `group` can serve such a request now."""
        if group.serves(fingerprint):
            return False
        other = self.of(scenario, fingerprint)
        return other is not group and other.serves(fingerprint)

    @property
    def finds_scenarios(self) -> bool:
        """Returns whether requests that name no scenario are to be labelled."""
        return self._default.map.finds_scenarios

    @property
    def lost(self) -> Collection[str]:
        """Returns the ids of instances that were marked as lost and are not back yet."""
        return self._lost.keys()

    def named(self, name: str) -> Group | None:
        return self._groups.get(name)

    def all(self) -> Collection[Group]:
        return self._groups.values()

    def ready(self, role: Role) -> tuple[InstanceRecord, ...]:
        """Returns the instances of a role that can be asked, in all groups."""
        return self._ready[role]

    def heartbeat(self, instance_id: str) -> Heartbeat | None:
        """Returns the last heartbeat of a live instance, with its load at that time."""
        return self._instances.alive.get(instance_id)

    def max_model_len(self) -> int | None:
        """Returns the length of the longest request that every live member can take; None while there is none."""
        return self._max_model_len

    def mark_lost(self, instance_id: str) -> None:
        """Stops asking an instance that was found dead, until its heartbeat moves and it answers or has changed."""
        heartbeat = self._instances.alive.get(instance_id)
        if heartbeat is not None and instance_id not in self._lost:
            self._lost[instance_id] = _Lost(heartbeat)
            self._refresh()

    def mark_alive(self, instance_id: str) -> None:
        """Notes that an instance which was marked as lost has answered."""
        lost = self._lost.get(instance_id)
        if lost is not None:
            lost.answers = True
            if self._forgive():
                self._refresh()

    async def watch(self) -> None:
        """Reads forever: often, and at once when a change is announced."""
        while True:
            self._read_now.clear()
            await self.read()
            await asyncio.sleep(MIN_READ_INTERVAL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._read_now.wait()

    async def on_changed(self, incoming: Incoming) -> None:
        """Takes the announcement that Redis has something new. What it is, only Redis says."""
        self._read_now.set()

    async def read(self) -> None:
        """Reads once. Everything stays as it was if Redis is away."""
        try:
            versions = await self._registry.map_versions()
            new = [name for name, version in versions.items() if version != self._versions.get(name)]
            maps = await self._registry.maps([name for name in new if self._is_own(name)])
            reading = await self._instances.read(self._needed(maps))
        except RegistryUnavailable as error:
            if not self._away:
                log.warning("continuing with the instances known so far: %s", error)
            self._away = True
            return
        if self._away:
            log.info("the registry is back")
        self._away = False
        has_new_maps = self._take_maps(versions, maps)
        self._take_instances(reading, has_new_maps=has_new_maps)

    def _is_own(self, name: str) -> bool:
        return not self._own_names or name in self._own_names or declared_name(name) in self._own_names

    def _needed(self, new_maps: Iterable[GroupMap] = ()) -> set[str]:
        """Returns the instances to watch: members, those with open requests, and those whose caches are remembered."""
        maps = [*self._maps.values(), *new_maps]
        needed = {member.instance_id for one in maps for member in one.members} | set(self._watched())
        others = set(self._instances.ids) - needed
        return needed | {one for one in others if any(one in group.affinity for group in self._groups.values())}

    def _take_maps(self, versions: Mapping[str, int], maps: Iterable[GroupMap]) -> bool:
        """Takes new maps, and drops groups without one once they serve nothing. Returns whether anything changed.

        Without a single version, Redis has lost everything: then the known maps stay.
        """
        gone = self._maps.keys() - versions.keys() - {DEFAULT} if versions else set()
        gone = {name for name in gone if self._groups[name].counts.open == 0}
        for name in gone:
            del self._maps[name], self._groups[name]
        self._versions = dict(versions) or self._versions
        new = {one.name: one for one in maps}
        self._maps.update(new)
        for name in new.keys() - self._groups.keys():
            self._groups[name] = Group(new[name].model_copy(update={"members": (), "version": 0}))
        if new or gone:
            self._index()
        return bool(new or gone)

    def _take_instances(self, reading: Reading, *, has_new_maps: bool) -> None:
        """Takes heartbeats and records. Which instances can be asked is known before anybody hears of lost ones."""
        changes = self._instances.take(reading, self._needed(), time.monotonic())
        if self._forgive() or has_new_maps or changes.any:
            self._refresh()
        for instance_id in changes.late | changes.ended | changes.new_weights:
            for group in self._groups.values():
                group.affinity.forget(instance_id)
        for instance_id in changes.ended:
            log.info("instance %s has ended", instance_id)
        for instance_id in changes.late:
            log.warning("instance %s is lost: its heartbeat is late", instance_id)
            self._on_lost(instance_id)

    def _forgive(self) -> bool:
        """Drops the marks of lost instances that are back or have vanished. Returns whether any was dropped."""
        before = len(self._lost)
        for instance_id, lost in list(self._lost.items()):
            heartbeat = self._instances.alive.get(instance_id)
            if instance_id not in self._instances.ids or (heartbeat is not None and lost.is_back(heartbeat)):
                del self._lost[instance_id]
        return len(self._lost) < before

    def _index(self) -> None:
        self._by_scenario = {}
        for name, group in self._groups.items():
            scenario = self._maps.get(name, group.map).scenario
            self._by_scenario.setdefault(scenario, []).append(group)

    def _refresh(self) -> None:
        """Works out anew which instances can be asked."""
        usable = {
            name: record
            for name, record in self._instances.records.items()
            if name in self._instances.alive and name not in self._lost and record.model == self._model
        }
        members = {member.instance_id for one in self._maps.values() for member in one.members}
        lengths = (record.max_model_len for name, record in usable.items() if name in members)
        self._max_model_len = min(lengths, default=None)
        for name, group in list(self._groups.items()):
            group.update(self._maps.get(name, group.map), usable)
        self._ready = {role: tuple(one for group in self.all() for one in group.ready(role)) for role in ROLES}


def _load(group: Group) -> float:
    return group.counts.open / max(1, len(group.map.members))
