"""Follows instances: their heartbeats at every reading, their whole records only when these have changed."""

from collections.abc import Collection
from dataclasses import dataclass

from shared.messages.records import InstanceRecord
from shared.registry.heartbeats import Heartbeat
from shared.registry.registry import Registry
from shared.registry.view import View


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read at one time."""

    heartbeats: list[Heartbeat]
    changed_ids: list[str]
    """The instances whose records had changed."""
    records: list[InstanceRecord]
    """Their records, as far as they can be read."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs from the previous reading.

    Attributes:
        any: whether a record has changed, or an instance is alive that was not, or the reverse.
        late: instances whose heartbeats have become late.
        ended: instances that said that they would end, and have.
        new_weights: instances that serve other weights.
    """

    any: bool
    late: frozenset[str]
    ended: frozenset[str]
    new_weights: frozenset[str]


class InstanceFollower:
    """The instances that a reader needs, as of its last reading.

    Attributes:
        alive: the heartbeats of the instances that are not late, by id.
        records: the records of all instances that are followed, late ones included.
    """

    def __init__(self, registry: Registry, late_after_s: float) -> None:
        self._registry = registry
        self._view: View[Heartbeat] = View(late_after_s, {})
        self.alive: dict[str, Heartbeat] = {}
        self.records: dict[str, InstanceRecord] = {}

    @property
    def ids(self) -> Collection[str]:
        """All instances that are followed. One that vanished is followed for some more seconds."""
        return self._view.seen.keys()

    async def read(self, instance_ids: Collection[str]) -> Reading:
        """Reads from Redis, and changes nothing here.

        Raises:
            RegistryUnavailable: Redis is away.
        """
        heartbeats = await self._registry.heartbeats(sorted(instance_ids))
        changed_ids = [one.id for one in heartbeats if not self._is_known(one)]
        return Reading(heartbeats, changed_ids, await self._registry.members(changed_ids))

    def take(self, reading: Reading, needed_ids: set[str], now: float) -> Changes:
        """Takes a reading of `now` (monotonic seconds). Instances that are not needed any more are dropped."""
        before = self.alive.keys() & needed_ids
        self._view = self._view.updated(reading.heartbeats, now)
        self._view = self._view.without(self._view.seen.keys() - needed_ids)
        was_alive, self.alive = self.alive.keys(), self._view.alive()
        new_weights, has_new_records = self._take_records(reading)
        gone = before - self.alive.keys()
        late = gone & self._view.seen.keys()
        has_changed = has_new_records or was_alive != self.alive.keys()
        return Changes(has_changed, frozenset(late), frozenset(gone - late), frozenset(new_weights))

    def _is_known(self, heartbeat: Heartbeat) -> bool:
        record = self.records.get(heartbeat.id)
        return record is not None and (record.started_at, record.state_version) == heartbeat.identity

    def _take_records(self, reading: Reading) -> tuple[set[str], bool]:
        """Takes new records. One that cannot be read any more is not used, either."""
        found = {one.id: one for one in reading.records}
        new_weights: set[str] = set()
        has_new = False
        for instance_id in reading.changed_ids:
            before, now = self.records.pop(instance_id, None), found.get(instance_id)
            if now is not None:
                self.records[instance_id] = now
            has_new = has_new or before is not now
            if before is not None and now is not None and before.fingerprint != now.fingerprint:
                new_weights.add(instance_id)
        for instance_id in self.records.keys() - self._view.seen.keys():
            del self.records[instance_id]
        return new_weights, has_new
