"""Which group gets an instance that can be spared; pure."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.policy.load import GroupLoad
from services.controller.policy.placement import APART_S, CROWDED_S, Gift, State, decide
from shared.groups import GroupSpec, replica_name

CROWDED = GroupLoad(
    window_s=2.5, num_prefill=1, num_decode=1, num_open=20.0, num_waiting=4.0, prefill_busy=1.0, decode_busy=0.9
)
CALM = replace(CROWDED, num_open=1.0, num_waiting=0.0, prefill_busy=0.1, decode_busy=0.2, num_prefill=2, num_decode=2)
BUSY = replace(CALM, prefill_busy=0.6, decode_busy=0.6)
"""Nobody waits, but one instance fewer would be felt."""


def specs(*declared: GroupSpec, **names: int) -> dict[str, GroupSpec]:
    """Groups as they are declared; `names` have so many replicas and nothing else to say."""
    plain = [GroupSpec(name=name) for name in names]
    found = {one.name: one for one in declared}
    for one in plain:
        for number in range(1, names[one.name] + 1):
            name = replica_name(one.name, number)
            found[name] = one.model_copy(update={"name": name})
    return found


def run(
    loads: Mapping[str, GroupLoad],
    declared: Mapping[str, GroupSpec],
    *,
    num_spares: int = 0,
    for_s: float = 60.0,
    step_s: float = 0.5,
) -> list[tuple[float, Gift]]:
    """All gifts, with their times. Nothing comes of them: loads and spares stay."""
    state = State()
    found = []
    for step in range(int(for_s / step_s) + 1):
        gift, state = decide(loads, declared, num_spares, state, step * step_s)
        if gift is not None:
            found.append((step * step_s, gift))
    return found


def first(loads: Mapping[str, GroupLoad], declared: Mapping[str, GroupSpec], num_spares: int = 0) -> Gift | None:
    found = run(loads, declared, num_spares=num_spares, for_s=CROWDED_S)
    return found[0][1] if found else None


def test_a_spare_for_a_group_that_has_been_crowded_for_a_while() -> None:
    [(at, gift)] = run({"chat": CROWDED}, specs(chat=1), num_spares=1, for_s=CROWDED_S)
    assert at == CROWDED_S
    assert gift == Gift("chat", "prefill", "4 requests wait, both roles are busy, and prefill is busiest")


def test_one_after_another_and_apart() -> None:
    found = run({"chat": CROWDED}, specs(chat=1), num_spares=9, for_s=50.0)
    assert [at for at, _ in found] == [CROWDED_S, CROWDED_S + APART_S, CROWDED_S + 2 * APART_S]


def test_a_break_begins_the_wait_again() -> None:
    declared = specs(chat=1)
    _, state = decide({"chat": CROWDED}, declared, 1, State(), 0.0)
    _, state = decide({"chat": CALM}, declared, 1, state, 3.0)
    for now in (4.0, 5.0, 8.5):
        gift, state = decide({"chat": CROWDED}, declared, 1, state, now)
        assert gift is None
    assert decide({"chat": CROWDED}, declared, 1, state, 4.0 + CROWDED_S)[0] is not None


@pytest.mark.parametrize(
    "load",
    [
        replace(CROWDED, num_waiting=0.9),
        replace(CROWDED, prefill_busy=0.6),
        replace(CROWDED, decode_busy=0.6),
    ],
    ids=["nobody waits", "prefill has time", "decode has time"],
)
def test_no_gift_for_a_group_that_is_not_crowded(load: GroupLoad) -> None:
    assert run({"chat": load}, specs(chat=1), num_spares=3) == []


def test_nothing_is_given_where_nothing_can_be_spared() -> None:
    loads = {"chat": CROWDED, "code": BUSY, "mail": replace(CALM, num_prefill=1, num_decode=1)}
    assert run(loads, specs(chat=1, code=1, mail=1)) == []


def test_the_role_that_does_most_with_one_more() -> None:
    """As the model has it, whatever is busiest."""
    measured = replace(CROWDED, step_base_s=0.01, step_row_s=0.001, output_tokens=200.0, prefill_s=0.01)
    gift = first({"chat": measured}, specs(chat=1), 1)
    assert gift is not None
    assert gift.role == "decode"
    assert "both roles are busy, and one decode instance more would do" in gift.reason
    gift = first({"chat": replace(measured, prefill_s=5.0, output_tokens=2.0)}, specs(chat=1), 1)
    assert gift is not None
    assert gift.role == "prefill"


def test_the_role_that_is_busiest_where_costs_are_unknown() -> None:
    gift = first({"chat": replace(CROWDED, prefill_busy=0.8)}, specs(chat=1), 1)
    assert gift is not None
    assert (gift.role, gift.giver) == ("decode", None)


def test_an_instance_of_a_group_that_has_time() -> None:
    gift = first({"chat": CROWDED, "code": BUSY, "mail": CALM}, specs(chat=1, code=1, mail=1))
    assert gift == Gift(
        "chat",
        "prefill",
        "4 requests wait and prefill is busiest, while group mail has time (prefill 10%, decode 20%)",
        giver="mail",
        from_role="prefill",
    )


def test_a_spare_rather_than_an_instance_that_serves() -> None:
    gift = first({"chat": CROWDED, "mail": CALM}, specs(chat=1, mail=1), 1)
    assert gift is not None
    assert gift.giver is None


def test_the_giver_that_would_have_most_time() -> None:
    """After it has given: of many instances, one is less missed."""
    large = replace(CALM, num_prefill=8, num_decode=8, prefill_busy=0.15, decode_busy=0.2)
    gift = first({"chat": CROWDED, "code": CALM, "mail": large}, specs(chat=1, code=1, mail=1))
    assert gift is not None
    assert (gift.giver, gift.from_role) == ("mail", "prefill")


@pytest.mark.parametrize(
    ("load", "from_role"),
    [
        (replace(CALM, num_prefill=1, num_decode=3), "decode"),
        (replace(CALM, num_prefill=3, num_decode=1), "prefill"),
        (replace(CALM, prefill_busy=0.2, decode_busy=0.0), "decode"),
        (CALM, "prefill"),
    ],
)
def test_it_gives_of_the_role_that_has_time_and_keeps_one_of_each(load: GroupLoad, from_role: str) -> None:
    gift = first({"chat": CROWDED, "mail": load}, specs(chat=1, mail=1))
    assert gift is not None
    assert gift.from_role == from_role


@pytest.mark.parametrize(
    "load",
    [
        replace(CALM, num_prefill=1, num_decode=1),
        replace(CALM, num_waiting=2.0),
        replace(CALM, prefill_busy=0.3, decode_busy=0.3),
        replace(CALM, num_prefill=1, num_decode=2, decode_busy=0.25),
    ],
    ids=["one of each", "its own requests wait", "busy without one", "busy without one decode instance"],
)
def test_a_group_that_does_not_give(load: GroupLoad) -> None:
    assert run({"chat": CROWDED, "mail": load}, specs(chat=1, mail=1)) == []


def test_never_fewer_than_the_giver_is_to_have() -> None:
    loads = {"chat": CROWDED, "mail": CALM}
    assert first(loads, specs(GroupSpec(name="mail", min_instances=3), chat=1)) is not None
    assert run(loads, specs(GroupSpec(name="mail", min_instances=4), chat=1)) == []


def test_never_more_than_the_group_is_to_have() -> None:
    declared = specs(GroupSpec(name="chat", max_instances=3), mail=1)
    assert first({"chat": CROWDED, "mail": CALM}, declared) is not None
    full = replace(CROWDED, num_decode=2)
    assert run({"chat": full, "mail": CALM}, declared) == []
    assert run({"chat": full}, declared, num_spares=3) == []


def test_bounds_are_of_all_replicas_together() -> None:
    chat = GroupSpec(name="chat", min_instances=4, max_instances=5)
    declared = specs(chat, chat.model_copy(update={"name": "chat--2"}), mail=1)
    three = replace(CROWDED, num_decode=2)
    assert first({"chat": CROWDED, "chat--2": CROWDED}, declared, 1) is not None
    assert run({"chat": three, "chat--2": CROWDED}, declared, num_spares=1) == []
    calm_three = replace(CALM, num_prefill=1, decode_busy=0.1)
    assert first({"mail": CROWDED, "chat": calm_three, "chat--2": CALM}, declared) is not None
    calm_two = replace(CALM, num_prefill=1, num_decode=1)
    assert first({"mail": CROWDED, "chat": calm_three, "chat--2": calm_two}, declared) is not None
    assert run({"mail": CROWDED, "chat": replace(calm_three, num_decode=3)}, declared) == []


def test_the_largest_share_goes_first_and_then_who_has_waited_longest() -> None:
    small, large = GroupSpec(name="small"), GroupSpec(name="large", share=2.0)
    declared = specs(small, large)
    gift, state = decide({"small": CROWDED, "large": CALM}, declared, 2, State(), 0.0)
    gift, state = decide({"small": CROWDED, "large": CROWDED}, declared, 2, state, 4.0)
    assert gift is None
    gift, state = decide({"small": CROWDED, "large": CROWDED}, declared, 2, state, 9.0)
    assert gift is not None
    assert gift.group == "large"
    gift, state = decide({"small": CROWDED, "large": CROWDED}, declared, 2, state, 9.5)
    assert gift is not None
    assert gift.group == "small"
    assert decide({"small": CROWDED, "large": CROWDED}, declared, 2, state, 10.0)[0] is None
    equal = specs(chat=1, code=1)
    _, state = decide({"chat": CALM, "code": CROWDED}, equal, 1, State(), 0.0)
    _, state = decide({"chat": CROWDED, "code": CROWDED}, equal, 0, state, 1.0)
    gift, _ = decide({"chat": CROWDED, "code": CROWDED}, equal, 1, state, 20.0)
    assert gift is not None
    assert gift.group == "code"


def test_a_giver_is_left_alone_for_a_while() -> None:
    loads = {"chat": CROWDED, "code": CROWDED, "mail": replace(CALM, num_prefill=9, num_decode=9)}
    found = run(loads, specs(chat=1, code=1, mail=1), for_s=APART_S + CROWDED_S)
    assert [(at, gift.group) for at, gift in found] == [(CROWDED_S, "chat"), (CROWDED_S + APART_S, "chat")]


busy = st.floats(0, 1)
counts = st.integers(1, 5)
loads = st.builds(
    replace,
    st.just(CALM),
    num_prefill=counts,
    num_decode=counts,
    num_waiting=st.sampled_from([0.0, 0.5, 5.0]),
    prefill_busy=busy,
    decode_busy=busy,
)
declared_groups = st.builds(
    lambda least, more, share: {"min_instances": least, "max_instances": least + more, "share": share},
    st.integers(2, 5),
    st.integers(0, 4),
    st.floats(0.1, 3),
)


@settings(deadline=None)
@given(given_loads=st.dictionaries(st.sampled_from("abc"), loads, min_size=1), data=st.data())
def test_a_gift_keeps_all_bounds(given_loads: dict[str, GroupLoad], data: st.DataObject) -> None:
    declared = {
        name: GroupSpec.model_validate({"name": name, **data.draw(declared_groups)}) for name in sorted(given_loads)
    }
    num_spares = data.draw(st.integers(0, 2))
    gift = first(given_loads, declared, num_spares)
    if gift is None:
        return
    to = given_loads[gift.group]
    bound = declared[gift.group].max_instances
    assert bound is None or to.num_prefill + to.num_decode < bound
    assert (gift.giver is None) == (gift.from_role is None) == (num_spares > 0)
    if gift.giver is not None:
        giver = given_loads[gift.giver]
        assert gift.giver != gift.group
        assert giver.num_prefill + giver.num_decode > declared[gift.giver].min_instances
        assert (giver.num_prefill if gift.from_role == "prefill" else giver.num_decode) > 1
