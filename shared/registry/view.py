"""Whose heart still beats: records as a reader has seen them over time. Pure: the caller brings records and time."""

from collections.abc import Collection
from dataclasses import dataclass

from shared.messages.records import InstanceRecord, Role


@dataclass(frozen=True, slots=True)
class Seen:
    """A record and when (reader's monotonic seconds) its heartbeat last moved."""

    record: InstanceRecord
    moved_at: float


@dataclass(frozen=True, slots=True)
class View:
    """All instances a reader knows. Heartbeats are compared with what was seen before, so no two clocks are."""

    late_after_s: float
    seen: dict[str, Seen]
    read_at: float = 0.0

    def updated(self, records: Collection[InstanceRecord], now: float) -> "View":
        """The view after one successful reading at `now`.

        The time since the reading before counts as the registry's absence, not the instances', once it is longer than
        lateness itself: then all that are still there get a fresh chance.
        """
        blind = self.read_at > 0 and now - self.read_at > self.late_after_s
        if blind:
            seen = {name: Seen(one.record, now) for name, one in self.seen.items()}
        else:
            present = {record.id for record in records}
            seen = {name: one for name, one in self.seen.items() if name in present or not self._is_over(one, now)}
        for record in records:
            before = seen.get(record.id)
            stood_still = before is not None and before.record.heartbeat == record.heartbeat
            seen[record.id] = Seen(record, before.moved_at if before and stood_still else now)
        return View(self.late_after_s, seen, now)

    def is_late(self, one: Seen) -> bool:
        return self.read_at - one.moved_at > self.late_after_s

    def alive(self) -> dict[str, InstanceRecord]:
        """The records of all instances that are not late, by id."""
        return {name: one.record for name, one in self.seen.items() if not self.is_late(one)}

    def ready(self, role: Role) -> list[InstanceRecord]:
        """The instances of a role that take requests."""
        return [record for record in self.alive().values() if record.role == role and record.state == "ready"]

    def _is_over(self, one: Seen, now: float) -> bool:
        """Whether one that has vanished is not to be missed: it said that it would end, or has been late for long."""
        return one.record.state == "draining" or now - one.moved_at > 5 * self.late_after_s
