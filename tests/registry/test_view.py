"""Whose heart beats, by comparing readings; pure."""

from shared.messages.records import InstanceRecord
from shared.registry.heartbeats import Heartbeat
from shared.registry.view import View


def record(name: str = "p1", heartbeat: int = 1, **changes: object) -> InstanceRecord:
    values: dict[str, object] = {
        "id": name,
        "pid": 1,
        "host": "h",
        "version": "0",
        "started_at": 0.0,
        "heartbeat": heartbeat,
        "role": "prefill",
        "group": "default",
        "epoch": 1,
        "state": "ready",
        "model": "m",
        "fingerprint": "f",
        "max_model_len": 100,
        "kv_host": "h",
        "kv_port": 1,
        "slots_total": 1,
        "slots_used": 0,
        "blocks_total": 1,
        "blocks_free": 1,
    }
    return InstanceRecord.model_validate(values | changes)


def view(*readings: tuple[float, list[InstanceRecord]], late_after_s: float = 2.0) -> View[InstanceRecord]:
    """The view after readings at the given times."""
    seen: View[InstanceRecord] = View(late_after_s, {})
    for now, records in readings:
        seen = seen.updated(records, now)
    return seen


def test_a_heart_that_beats_is_alive() -> None:
    readings = [(float(now), [record(heartbeat=now)]) for now in range(1, 10)]
    assert view(*readings).alive().keys() == {"p1"}


def test_a_record_that_stands_still_is_late_though_it_is_there() -> None:
    readings = [(1.0 + step, [record(heartbeat=7)]) for step in range(4)]
    assert view(*readings[:3]).alive()
    assert not view(*readings).alive()


def test_one_that_vanished_is_late_only_after_a_while_and_then_forgotten() -> None:
    readings: list[tuple[float, list[InstanceRecord]]] = [(1.0, [record()]), (2.0, []), (3.0, [])]
    assert view(*readings).alive()
    assert not view(*readings, (4.0, [])).alive()
    assert "p1" in view(*readings, (4.0, [])).seen
    long_after = [(4.0 + step, list[InstanceRecord]()) for step in range(12)]
    assert not view(*readings, *long_after).seen


def test_one_that_said_that_it_would_end_is_not_missed() -> None:
    ending = record(state="draining")
    assert view((1.0, [ending])).seen
    assert not view((1.0, [ending]), (1.5, [])).seen


def test_it_comes_back_when_its_heart_beats_again() -> None:
    readings = [(1.0 + step, [record(heartbeat=7)]) for step in range(5)]
    assert view(*readings, (6.0, [record(heartbeat=8)])).alive()


def test_the_time_in_which_nothing_could_be_read_speaks_against_nobody() -> None:
    seen = view((1.0, [record()]), (60.0, []))
    assert seen.alive()
    assert view((1.0, [record()]), (60.0, []), (61.0, []), (62.0, [])).alive()
    assert not view((1.0, [record()]), (60.0, []), (61.0, []), (62.0, []), (62.5, [])).alive()


def test_what_a_reader_has_no_use_for_is_dropped() -> None:
    seen = view((1.0, [record("p1"), record("p2")])).without({"p1", "nobody"})
    assert seen.alive().keys() == {"p2"}
    assert seen.read_at == 1.0


def test_heartbeats_are_judged_as_records_are() -> None:
    beats = [Heartbeat.of(record(heartbeat=number)) for number in (1, 2, 2, 2)]
    seen: View[Heartbeat] = View(1.5, {})
    alive = []
    for number, one in enumerate(beats):
        seen = seen.updated([one], float(1 + number))
        alive.append(list(seen.alive()))
    assert alive == [["p1"], ["p1"], ["p1"], []]
