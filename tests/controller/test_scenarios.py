"""Which automatic scenario earns a group, and which falls back; pure."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.controller.policy.scenarios import Costs, Decision, Instances, LabelLoad, Rules, State, decide

CHAT = LabelLoad(requests_per_s=10.0, prompt_tokens=400, output_tokens=200)
LONG = LabelLoad(requests_per_s=4.0, prompt_tokens=4000, output_tokens=100)
"""Work: 18 000 of 32 000 a second."""
LABEL = "auto-long-in"
SIX = Instances(default=6)
Changes = list[tuple[float, Decision]]


def run(
    labels: dict[str, LabelLoad],
    others: LabelLoad = CHAT,
    *,
    state: State | None = None,
    instances: Instances = SIX,
    start: float = 0.0,
    for_s: float = 300.0,
    rules: Rules | None = None,
) -> tuple[State, Changes]:
    """Decide each second under the same load; instances do not change."""
    state = state or State()
    changes: Changes = []
    for second in range(int(for_s) + 1):
        state, decision = decide(labels, others, instances, state, start + second, rules or Rules())
        if decision is not None:
            changes.append((start + second, decision))
    return state, changes


def test_a_large_scenario_that_differs_earns_a_group_after_30_s() -> None:
    state, [(at, decision)] = run({LABEL: LONG})
    assert at == 30
    assert decision == Decision(
        "found",
        LABEL,
        "auto-long-in has had at least 25% of the work for 30 s (now 56%, 4.0 requests/s), and it has 40.00 prompt "
        "tokens for each output token, the others 2.00: it gets a group of its own, with 2 of 4 instances that can be "
        "given",
    )
    assert state == State(frozenset({LABEL}), {}, changed_at=30)


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (replace(LONG, requests_per_s=1.0), "22 % of the work"),
        (replace(LONG, prompt_tokens=1200, output_tokens=210), "a ratio of 5.7 where the others' is 2"),
        (replace(LONG, prompt_tokens=8 * 4000, requests_per_s=0.4), "too few requests to say"),
        (replace(LONG, requests_per_s=200.0), "there is hardly anything beside it"),
    ],
)
def test_one_that_lacks_something_does_not(load: LabelLoad, why: str) -> None:
    assert run({LABEL: load})[1] == [], why


def test_work_counts_not_requests() -> None:
    """It has 2 % of the requests and 31 % of the work; the other way round it earns nothing."""
    rare = LabelLoad(requests_per_s=1.0, prompt_tokens=8000, output_tokens=1000)
    light = replace(CHAT, requests_per_s=50.0, prompt_tokens=100, output_tokens=100)
    state, _ = run({"auto-rare": rare}, light)
    assert state.groups == {"auto-rare"}
    assert run({"auto-light": light}, replace(rare, requests_per_s=20.0))[1] == []


def test_what_tokens_cost_is_part_of_work() -> None:
    label = {LABEL: LabelLoad(5.0, 1000, 50)}
    assert decide(label, CHAT, SIX, State(), 0.0)[0].due_since == {LABEL: 0.0}
    assert decide(label, CHAT, SIX, State(), 0.0, costs=Costs(0.001, 0.02))[0].due_since == {}


def test_a_common_prefix_is_enough_of_a_difference() -> None:
    state, [(_, decision)] = run({"auto-prefix-00000000": replace(CHAT, shared_prefix_tokens=512)})
    assert "its prompts begin with the same 512 tokens" in decision.reason
    assert state.groups == {"auto-prefix-00000000"}
    assert run({"auto-prefix-00000000": replace(CHAT, shared_prefix_tokens=128)})[1] == []


def test_long_outputs_differ_as_long_prompts_do() -> None:
    state, _ = run({"auto-long-out": LabelLoad(2.0, 50, 1500)})
    assert state.groups == {"auto-long-out"}


@pytest.mark.parametrize(
    ("instances", "founds"),
    [
        (Instances(3), False),
        (Instances(4), True),
        (Instances(2, spare=1), False),
        (Instances(2, spare=2), True),
        (Instances(1, spare=2), False),
        (Instances(0, spare=4), True),
    ],
)
def test_the_default_group_keeps_two_instances(instances: Instances, founds: bool) -> None:
    assert bool(run({LABEL: LONG}, instances=instances)[1]) == founds


def test_it_is_founded_at_once_when_instances_come_later() -> None:
    state, changes = run({LABEL: LONG}, instances=Instances(3), for_s=100)
    assert changes == []
    _, decision = decide({LABEL: LONG}, CHAT, Instances(3, spare=1), state, 101)
    assert decision is not None
    assert "for 101 s" in decision.reason


def test_a_dip_starts_the_30_s_anew() -> None:
    state, _ = run({LABEL: LONG}, for_s=29)
    state, _ = run({LABEL: replace(LONG, requests_per_s=1.0)}, state=state, start=30, for_s=0)
    assert state.due_since == {}
    _, [(at, _)] = run({LABEL: LONG}, state=state, start=31)
    assert at == 61


def test_the_largest_is_first_and_the_next_has_to_wait() -> None:
    labels = {"auto-long-out": LabelLoad(5.0, 50, 1500), LABEL: replace(LONG, requests_per_s=8.0)}
    state, changes = run(labels, replace(CHAT, requests_per_s=20))
    assert [(at, decision.label) for at, decision in changes] == [(30, "auto-long-out"), (60, LABEL)]
    assert state.groups == labels.keys()


def test_it_falls_back_after_60_s_under_5_per_cent() -> None:
    state = State(groups=frozenset({LABEL}))
    state, [(at, decision)] = run({LABEL: replace(LONG, requests_per_s=0.1)}, state=state)
    assert at == 60
    assert decision == Decision(
        "dissolve",
        LABEL,
        "auto-long-in has had less than 5% of the work for 60 s (now 3.1%, 0.1 requests/s): it goes back to the "
        "default group",
    )
    assert state == State(frozenset(), {}, changed_at=60)


def test_one_that_is_not_seen_any_more_falls_back() -> None:
    _, [(at, decision)] = run({}, state=State(groups=frozenset({LABEL})))
    assert (at, decision.action, decision.label) == (60, "dissolve", LABEL)


def test_between_the_shares_nothing_changes() -> None:
    """A tenth of the work: too little to earn a group, enough to keep it."""
    load = replace(LONG, requests_per_s=0.4)
    assert run({LABEL: load})[1] == []
    assert run({LABEL: load}, state=State(groups=frozenset({LABEL})))[1] == []


def test_groups_that_nobody_needs_go_before_new_ones_come() -> None:
    state = State(groups=frozenset({"auto-long-out"}), due_since={"auto-long-out": 0.0, LABEL: 0.0})
    _, decision = decide({LABEL: LONG}, CHAT, SIX, state, 100.0)
    assert decision is not None
    assert decision.label == "auto-long-out"


def test_the_groups_that_others_have_are_not_compared_with() -> None:
    """Beside it the default group has only what is just like it: it gains nothing by going."""
    alike = LabelLoad(10.0, 3000, 100)
    labels = {LABEL: LONG, "auto-balanced": CHAT}
    assert run(labels, alike, state=State(groups=frozenset({"auto-balanced"})))[1] == []
    assert run({LABEL: LONG}, CHAT)[1] != []


def test_without_work_nothing_changes() -> None:
    state = State(groups=frozenset({LABEL}), due_since={LABEL: 0.0})
    idle = LabelLoad()
    state, changes = run({LABEL: idle}, idle, state=state, start=59)
    assert changes == []
    assert state == State(groups=frozenset({LABEL}))


LOADS = st.builds(
    LabelLoad,
    st.floats(0, 100),
    st.floats(0, 10_000),
    st.floats(0, 10_000),
    st.sampled_from([0, 256, 2048]),
)


@given(
    steps=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(["auto-a", "auto-b", "auto-c"]), LOADS),
            LOADS,
            st.integers(1, 40),
        ),
        max_size=40,
    ),
    num_instances=st.integers(0, 10),
)
def test_whatever_comes_the_books_balance_and_changes_are_rare(
    steps: list[tuple[dict[str, LabelLoad], LabelLoad, int]], num_instances: int
) -> None:
    rules = Rules()
    state, now, default = State(), 0.0, num_instances
    changed_at: list[float] = []
    for labels, others, passed_s in steps:
        before, now = state, now + passed_s
        state, decision = decide(labels, others, Instances(default), before, now, rules)
        assert all(since <= now for since in state.due_since.values())
        if decision is None:
            assert state.groups == before.groups
            continue
        changed_at.append(now)
        founds = decision.action == "found"
        assert before.groups ^ state.groups == {decision.label}
        assert (decision.label in state.groups) == founds
        default += -rules.group_instances if founds else rules.group_instances
        assert decision.label in decision.reason
        assert decision.label not in state.due_since
        if founds:
            assert default >= rules.default_instances
    assert all(later - earlier >= rules.settle_s for earlier, later in pairwise(changed_at))


def test_nothing_that_was_passed_in_is_changed() -> None:
    labels = {LABEL: LONG}
    state = State(groups=frozenset({"auto-b"}), due_since={LABEL: 0.0})
    first, second = (decide(labels, CHAT, SIX, state, 50.0) for _ in range(2))
    assert first == second
    assert (labels, state.due_since) == ({LABEL: LONG}, {LABEL: 0.0})
    with pytest.raises(TypeError):
        first[0].due_since["auto-c"] = 1.0  # type: ignore[index]
