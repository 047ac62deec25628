"""Replicas by the plan of the day and by load, and instances for crowded groups; with a clock of its own."""

from dataclasses import replace
from datetime import UTC, datetime, tzinfo

import pytest

from services.controller import scaling
from services.controller.decisions import Decisions
from services.controller.policy.load import GroupLoad
from services.controller.scaling import Scaling
from shared.groups import GroupSpec, PlanEntry

CHAT = GroupSpec(name="chat", scenario="talk", prefill=1, decode=2)
DAILY = GroupSpec(
    name="daily",
    plan=(PlanEntry(start="07:00", end="22:00", replicas=3), PlanEntry(start="23:00", end="24:00", replicas=0)),
)
CROWDED = GroupLoad(window_s=2.5, num_prefill=1, num_decode=2, num_waiting=9.0, prefill_busy=1.0, decode_busy=1.0)
CALM = replace(CROWDED, num_waiting=0.0, prefill_busy=0.1, decode_busy=0.1)


class Clock:
    """The time of day (UTC) for `datetime.now`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
        monkeypatch.setattr(scaling, "datetime", self)

    def now(self, zone: tzinfo) -> datetime:
        assert zone is UTC
        return self.at

    def set(self, hour: int, minute: int = 0) -> None:
        self.at = self.at.replace(hour=hour, minute=minute)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def make(*declared: GroupSpec) -> Scaling:
    return Scaling({one.name: one for one in declared}, Decisions())


def said(one: Scaling) -> list[tuple[str, str, str]]:
    return [(status.group, status.what, status.outcome) for status in one.decisions.status()]


def run(one: Scaling, loads: dict[str, GroupLoad], *, num_spares: int, start: float, for_s: int) -> None:
    for second in range(for_s + 1):
        one.follow(loads, num_spares, start + second)


def test_at_first_there_is_one_replica_of_each() -> None:
    assert make(CHAT, DAILY).specs() == {"chat": CHAT, "daily": DAILY}


def test_replicas_follow_the_plan_of_the_day(clock: Clock) -> None:
    one = make(CHAT, DAILY)
    one.follow({}, 0, 0.0)
    assert list(one.specs()) == ["chat", "daily", "daily--2", "daily--3"]
    second = one.specs()["daily--2"]
    assert (second.name, second.scenario) == ("daily--2", "daily")
    clock.set(21, 59)
    one.follow({}, 0, 1.0)
    assert len(one.specs()) == 4
    clock.set(23)
    one.follow({}, 0, 2.0)
    assert list(one.specs()) == ["chat"]
    clock.set(0)
    one.follow({}, 0, 3.0)
    assert list(one.specs()) == ["chat", "daily"]
    assert said(one) == [
        ("daily", "3 replicas in place of 1", "begun"),
        ("daily", "0 replicas in place of 3", "begun"),
        ("daily", "1 replicas in place of 0", "begun"),
    ]
    assert one.decisions.status()[0].why == "the plan has 3 now"


def test_after_the_plans_peak_replicas_go_once_they_have_time(clock: Clock) -> None:
    """And not at once: the plan says how many there are at least."""
    one = make(DAILY)
    one.follow({}, 0, 0.0)
    clock.set(22)
    calm = replace(CALM, num_decode=1)
    loads = dict.fromkeys(one.specs(), calm)
    run(one, loads, num_spares=0, start=1.0, for_s=119)
    assert len(one.specs()) == 3
    run(one, loads, num_spares=0, start=121.0, for_s=0)
    assert list(one.specs()) == ["daily", "daily--2"]
    run(one, loads, num_spares=0, start=122.0, for_s=400)
    assert list(one.specs()) == ["daily"]


def test_load_that_persists_adds_a_replica_where_spares_are_enough(clock: Clock) -> None:
    one = make(CHAT)
    run(one, {"chat": CROWDED}, num_spares=3, start=0.0, for_s=9)
    assert list(one.specs()) == ["chat"]
    run(one, {"chat": CROWDED}, num_spares=3, start=10.0, for_s=0)
    assert one.specs() == {"chat": CHAT, "chat--2": CHAT.model_copy(update={"name": "chat--2"})}
    assert said(one) == [("chat", "2 replicas in place of 1", "begun")]
    run(one, {"chat": CROWDED}, num_spares=0, start=11.0, for_s=60)
    assert len(one.specs()) == 2  # it is on its way


def test_without_enough_spares_there_is_no_replica(clock: Clock) -> None:
    one = make(CHAT)
    run(one, {"chat": CROWDED}, num_spares=2, start=0.0, for_s=60)
    assert (list(one.specs()), said(one)) == (["chat"], [])


def test_a_replica_with_nothing_to_do_goes(clock: Clock) -> None:
    one = make(CHAT)
    one.take_over({"chat", "chat--2"})
    run(one, {"chat": CALM, "chat--2": CALM}, num_spares=0, start=0.0, for_s=120)
    assert list(one.specs()) == ["chat"]


def test_a_new_leader_goes_on_with_the_replicas_that_it_finds() -> None:
    one = make(CHAT, DAILY)
    one.take_over({"chat", "chat--2", "chat--3", "gone", "gone--2", "chatter"})
    assert list(one.specs()) == ["chat", "chat--2", "chat--3", "daily"]


def test_a_new_leader_has_seen_no_crowd_yet(clock: Clock) -> None:
    one = make(CHAT)
    run(one, {"chat": CROWDED}, num_spares=3, start=0.0, for_s=9)
    one.take_over({"chat"})
    run(one, {"chat": CROWDED}, num_spares=3, start=10.0, for_s=9)
    assert list(one.specs()) == ["chat"]


def test_a_group_that_is_declared_once_more_begins_with_one_replica(clock: Clock) -> None:
    one = make(CHAT)
    one.take_over({"chat", "chat--2"})
    del one.declared["chat"]
    one.follow({}, 0, 0.0)
    assert one.specs() == {}
    one.declared["chat"] = CHAT
    assert list(one.specs()) == ["chat"]


def test_a_crowded_group_is_given_a_spare() -> None:
    one = make(CHAT)
    loads = {"chat": CROWDED, "gone": CROWDED}
    assert one.gift(loads, one.specs(), 1, 0.0) is None
    gift = one.gift(loads, one.specs(), 1, 5.0)
    assert gift is not None
    assert (gift.group, gift.giver) == ("chat", None)
    assert one.gift(loads, one.specs(), 1, 5.25) is None
