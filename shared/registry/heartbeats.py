"""Heartbeats: the small part of an instance's record that gateways read several times a second."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from shared.messages.records import InstanceRecord, InstanceState

Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One heartbeat of an instance, and its load at that time.

    Attributes:
        heartbeat: grows with every renewal.
        started_at: Unix seconds; another value means another process.
        state_version: grows with every change after which the whole record is worth reading.
        prefill_token_s: measured seconds of prefill for each uncomputed token; 0 until something was measured.
        prefill_pair_s: measured seconds for each pair of tokens that attend to each other, in addition.
    """

    id: str
    heartbeat: Count
    started_at: Figure
    state_version: Count
    state: InstanceState
    slots_total: Count
    slots_used: Count
    blocks_total: Count
    blocks_free: Count
    prefill_token_s: Figure = 0.0
    prefill_pair_s: Figure = 0.0

    @property
    def identity(self) -> tuple[float, int]:
        """Returns what changes whenever the whole record is worth reading: start time and state version."""
        return (self.started_at, self.state_version)

    @classmethod
    def of(cls, record: InstanceRecord) -> "Heartbeat":
        """Returns the heartbeat that belongs to a record."""
        return cls(
            record.id,
            record.heartbeat,
            record.started_at,
            record.state_version,
            record.state,
            record.slots_total,
            record.slots_used,
            record.blocks_total,
            record.blocks_free,
            record.prefill_token_s,
            record.prefill_pair_s,
        )

    def to_json(self) -> bytes:
        return _ADAPTER.dump_json(self)


def parse_heartbeat(text: str) -> Heartbeat:
    """Raises pydantic's ValidationError."""
    return _ADAPTER.validate_json(text)


_ADAPTER: TypeAdapter[Heartbeat] = TypeAdapter(Heartbeat)
