"""Which heartbeats are late: what a reader has seen over time. Pure: the caller brings heartbeats and the time."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from shared.messages.records import InstanceState


class Beating(Protocol):
    """An instance's record or heartbeat."""

    @property
    def id(self) -> str: ...
    @property
    def heartbeat(self) -> int: ...
    @property
    def state(self) -> InstanceState: ...


AnyBeating = TypeVar("AnyBeating", bound=Beating)


@dataclass(frozen=True, slots=True)
class Seen(Generic[AnyBeating]):
    """A record and when (reader's monotonic seconds) its heartbeat last moved."""

    record: AnyBeating
    moved_at: float


@dataclass(frozen=True, slots=True)
class View(Generic[AnyBeating]):
    """All instances a reader knows. Heartbeats are compared with earlier ones, so that no two clocks are compared."""

    late_after_s: float
    seen: dict[str, Seen[AnyBeating]]
    read_at: float = 0.0

    def updated(self, records: Collection[AnyBeating], now: float) -> "View[AnyBeating]":
        """Returns the view after one successful reading at `now`.

        If the time since the previous reading is longer than lateness itself, the registry was away, not the
        instances: then all that are known get another chance.
        """
        was_away = self.read_at > 0 and now - self.read_at > self.late_after_s
        if was_away:
            seen = {name: Seen(one.record, now) for name, one in self.seen.items()}
        else:
            present = {record.id for record in records}
            seen = {name: one for name, one in self.seen.items() if name in present or not self._has_ended(one, now)}
        for record in records:
            before = seen.get(record.id)
            has_not_moved = before is not None and before.record.heartbeat == record.heartbeat
            seen[record.id] = Seen(record, before.moved_at if before and has_not_moved else now)
        return View(self.late_after_s, seen, now)

    def without(self, instance_ids: Collection[str]) -> "View[AnyBeating]":
        """Returns the view without instances that the reader has no use for any more."""
        return replace(self, seen={name: one for name, one in self.seen.items() if name not in instance_ids})

    def is_late(self, one: Seen[AnyBeating]) -> bool:
        return self.read_at - one.moved_at > self.late_after_s

    def alive(self) -> dict[str, AnyBeating]:
        """Returns the records of all instances that are not late, by id."""
        return {name: one.record for name, one in self.seen.items() if not self.is_late(one)}

    def _has_ended(self, one: Seen[AnyBeating], now: float) -> bool:
        """Returns whether a vanished instance can be dropped: it said that it would end, or has been late for long."""
        return one.record.state == "draining" or now - one.moved_at > 5 * self.late_after_s
