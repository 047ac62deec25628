"""How many replicas: by the clock, and by load without going to and fro."""

from collections.abc import Callable
from dataclasses import replace
from datetime import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.policy.load import GroupLoad
from services.controller.policy.tidal import (
    DEFAULT_BOUNDS,
    Bounds,
    LoadState,
    Replicas,
    busy,
    replicas_at,
    replicas_by_load,
    without_last,
)
from shared.groups import DAY_MIN, GroupSpec, PlanEntry

CHAT = GroupSpec(name="chat")


def clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def planned(*entries: tuple[str, str, int]) -> GroupSpec:
    return GroupSpec(
        name="chat", plan=tuple(PlanEntry(start=start, end=end, replicas=number) for start, end, number in entries)
    )


def load(prefill: float, decode: float, waiting: float = 0.0) -> GroupLoad:
    """One replica of one instance of each role, of which nothing but busy time is known."""
    return GroupLoad(
        window_s=5.0, num_prefill=1, num_decode=1, num_waiting=waiting, prefill_busy=prefill, decode_busy=decode
    )


CROWDED = load(1.0, 0.9, waiting=5.0)
CALM = load(0.2, 0.1)


def run(
    seconds: int,
    loads: Callable[[int], list[GroupLoad]],
    *,
    spec: GroupSpec = CHAT,
    plan: int = 1,
    current: int = 1,
    state: LoadState | None = None,
    step_s: int = 1,
) -> list[Replicas]:
    """The answers of every step, with loads that depend on how many replicas there are."""
    found = [Replicas(current, "", state or LoadState())]
    for now_s in range(0, seconds + 1, step_s):
        last = found[-1]
        found.append(replicas_by_load(spec, plan, last.count, loads(last.count), last.state, float(now_s)))
    return found[1:]


def changes(found: list[Replicas]) -> list[int]:
    return [later.count for earlier, later in pairwise(found) if later.count != earlier.count]


def test_a_plan_by_day_and_by_night() -> None:
    spec = planned(("07:00", "22:00", 3), ("22:00", "07:00", 2))
    found = [replicas_at(spec, time(*at)) for at in ((6, 59, 59), (7, 0), (21, 59, 59), (22, 0), (23, 59), (0, 0))]
    assert found == [2, 3, 3, 2, 2, 2]


def test_outside_of_all_entries_there_is_one() -> None:
    spec = planned(("23:00", "01:00", 0))
    assert [replicas_at(spec, time(hour)) for hour in (22, 23, 0, 1)] == [1, 0, 0, 1]
    assert replicas_at(CHAT, time(12)) == 1


def test_the_whole_day() -> None:
    spec = planned(("00:00", "24:00", 2))
    assert {replicas_at(spec, time(hour, minute)) for hour in range(24) for minute in (0, 59)} == {2}


@settings(deadline=None)
@given(cuts=st.sets(st.integers(0, DAY_MIN - 1), min_size=2, max_size=6), data=st.data())
def test_a_plan_that_covers_the_day_has_one_entry_for_every_minute(cuts: set[int], data: st.DataObject) -> None:
    """Cuts of a circle: the last span goes over midnight, unless it begins there."""
    starts = sorted(cuts)
    numbers = data.draw(st.lists(st.integers(0, 4), min_size=len(starts), max_size=len(starts)))
    ends = [*starts[1:], starts[0]]
    spans = list(zip(starts, ends, numbers, strict=True))
    spec = planned(*data.draw(st.permutations([(clock(start), clock(end), number) for start, end, number in spans])))
    at = data.draw(st.integers(0, DAY_MIN - 1))
    begun = [number for start, _, number in spans if start <= at]
    assert replicas_at(spec, time(at // 60, at % 60)) == (begun[-1] if begun else numbers[-1])


def test_the_plan_is_the_least() -> None:
    found = replicas_by_load(CHAT, 3, 1, [CALM], LoadState(), 0.0)
    assert (found.count, found.reason) == (3, "the plan has 3 now")
    assert changes(run(1000, lambda count: [CALM] * count, plan=3, current=3)) == []
    assert changes(run(1000, lambda count: [CALM] * count, plan=2, current=4)) == [3, 2]


def test_a_group_that_the_plan_scales_out_goes_at_once_and_comes_back() -> None:
    gone = replicas_by_load(CHAT, 0, 2, [CROWDED, CROWDED], LoadState(crowded_since_s=0.0), 100.0)
    assert (gone.count, gone.reason, gone.state) == (0, "the plan has 0 now", LoadState())
    assert replicas_by_load(CHAT, 0, 0, [], gone.state, 101.0).reason == "as before"
    assert replicas_by_load(CHAT, 1, 0, [], gone.state, 102.0).count == 1


def test_one_more_where_requests_keep_waiting_and_both_roles_are_busy() -> None:
    found = run(9, lambda count: [CROWDED])
    assert changes(found) == []
    later = replicas_by_load(CHAT, 1, 1, [CROWDED], found[-1].state, 10.0)
    assert (later.count, later.state) == (2, LoadState())
    assert later.reason == "5 requests wait: prefill 100%, decode 90%"


@pytest.mark.parametrize("calm", [load(1.0, 0.3, waiting=9), load(0.3, 1.0, waiting=9), load(1.0, 1.0, waiting=0.5)])
def test_no_more_where_one_role_has_time_or_nobody_waits(calm: GroupLoad) -> None:
    assert changes(run(60, lambda count: [calm])) == []


def test_a_break_begins_the_wait_again() -> None:
    state = run(9, lambda count: [CROWDED])[-1].state
    state = replicas_by_load(CHAT, 1, 1, [CALM], state, 9.5).state
    assert state == LoadState()
    assert replicas_by_load(CHAT, 1, 1, [CROWDED], state, 10.0).count == 1


def test_no_more_while_one_is_on_its_way() -> None:
    found = run(60, lambda count: [CROWDED])
    assert changes(found) == [2]
    assert found[-1].reason == "requests wait, and a replica is on its way"


def test_never_more_instances_than_the_bound() -> None:
    spec = GroupSpec(name="chat", max_instances=5)
    found = run(60, lambda count: [CROWDED] * count, spec=spec)
    assert changes(found) == [2]
    assert found[-1].reason == "requests wait, but max_instances is 5"


def test_one_fewer_where_the_others_have_time_for_all() -> None:
    found = run(1000, lambda count: [load(0.6 / count, 0.3 / count)] * count, current=4)
    assert changes(found) == [3, 2]
    assert "one fewer has time for all: prefill 20%, decode 10%" in {one.reason for one in found}


def test_a_replica_that_is_not_there_yet_is_the_first_to_go() -> None:
    found = replicas_by_load(CHAT, 1, 3, [CALM, CALM], LoadState(idle_since_s=0.0), 120.0)
    assert found.count == 2
    assert without_last(CHAT, 3, [CALM, CALM]) == busy(CHAT, [CALM, CALM])


def test_never_fewer_instances_than_the_bound() -> None:
    spec = GroupSpec(name="chat", min_instances=5)
    assert changes(run(1000, lambda count: [CALM] * count, spec=spec, current=4)) == [3]


def test_without_loads_nothing_changes() -> None:
    found = run(1000, lambda count: [], current=2, state=LoadState(crowded_since_s=0.0, idle_since_s=0.0))
    assert changes(found) == []
    assert found[-1].state == LoadState()


def test_decode_is_as_busy_as_its_tokens_are_many() -> None:
    measured = replace(
        load(0.5, 1.0),
        num_decode=2,
        decode_slots=10.0,
        step_base_s=0.01,
        step_row_s=0.001,
        done_per_s=5.0,
        output_tokens=100.0,
    )
    assert busy(CHAT, [measured]).decode == pytest.approx(0.5)  # 500 tokens/s of 2 * 10 / 0.02
    assert busy(CHAT, [replace(measured, step_base_s=None)]).decode == 1.0


def test_an_objective_leaves_room_for_fewer_rows() -> None:
    measured = replace(
        load(0.5, 1.0), decode_slots=10.0, step_base_s=0.01, step_row_s=0.001, done_per_s=1.0, output_tokens=100.0
    )
    assert busy(CHAT, [measured]).decode == pytest.approx(0.2)
    assert busy(GroupSpec(name="chat", tpot_ms=15), [measured]).decode == pytest.approx(0.3)  # of 5 / 0.015
    assert busy(GroupSpec(name="chat", tpot_ms=1), [measured]).decode == pytest.approx(1.1)  # one row in any case


def test_a_role_without_instances_has_no_time() -> None:
    assert busy(CHAT, [replace(CALM, num_decode=0)]).decode == float("inf")


@pytest.mark.parametrize(("idle", "low"), [(0.8, 0.7), (0.7, 0.7), (0.0, 0.7), (0.5, 1.1)])
def test_bounds_that_would_go_to_and_fro_are_refused(idle: float, low: float) -> None:
    with pytest.raises(ValueError, match="idle < busy"):
        Bounds(busy=low, idle=idle)


@settings(deadline=None)
@given(prefill=st.floats(0, 8), decode=st.floats(0, 8), current=st.integers(1, 8), plan=st.integers(1, 8))
def test_a_constant_load_moves_the_number_one_way_only(prefill: float, decode: float, current: int, plan: int) -> None:
    """Work is in instances that it would fill; where it is more than there are, requests wait."""

    def loads(count: int) -> list[GroupLoad]:
        each = (prefill / count, decode / count)
        return [load(min(each[0], 1.0), min(each[1], 1.0), waiting=10.0 if max(each) > 1 else 0.0)] * count

    start = max(current, plan)
    counts = [start, *changes(run(1500, loads, plan=plan, current=start, step_s=10))]
    assert counts in (sorted(counts), sorted(counts, reverse=True))
    assert min(counts) >= plan
    if min(prefill, decode) > 1:  # both roles need more than one: it ends where nobody waits, or one role has time
        last = counts[-1]
        assert max(prefill, decode) <= last or min(prefill, decode) / last < DEFAULT_BOUNDS.busy
