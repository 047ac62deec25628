"""In which order a group loads another model; pure."""

from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.controller.policy.membership import Place
from services.controller.policy.upgrade import LAST_PATIENCE_S, Batch, ImpossibleUpgrade, batches
from shared.messages.records import ROLES, InstanceRecord, Role
from tests.controller.world import serving, spare

OLD, NEW = "old", "new"


def members(prefill: str, decode: str) -> list[InstanceRecord]:
    """One instance for each letter: o(ld) or n(ew); they are called p0, p1, ... and d0, d1, ..."""
    return [
        serving(f"{role[0]}{number}", role, model_path=NEW if letter == "n" else OLD)
        for role, letters in zip(ROLES, (prefill, decode), strict=True)
        for number, letter in enumerate(letters)
    ]


def spares(number: int) -> list[InstanceRecord]:
    return [spare(f"s{one}", model_path=OLD) for one in range(number)]


def place(instance_id: str, role: Role | None = None) -> tuple[str, Place]:
    return instance_id, Place("chat", role or ("prefill" if instance_id.startswith("p") else "decode"))


def test_a_new_pair_first_then_the_others_and_the_last_old_decode_instance_has_time() -> None:
    assert batches("chat", members("ooo", "ooo"), [], NEW) == [
        Batch((place("p0"), place("d0"))),
        Batch((place("p1"),)),
        Batch((place("d1"),)),
        Batch((place("p2"),)),
        Batch((place("d2"),), LAST_PATIENCE_S),
    ]


def test_of_two_each_one_goes_first_and_one_last() -> None:
    assert batches("chat", members("oo", "oo"), spares(2), NEW) == [
        Batch((place("p0"), place("d0"))),
        Batch((place("p1"),)),
        Batch((place("d1"),), LAST_PATIENCE_S),
    ]


def test_spares_stand_in_for_a_single_pair() -> None:
    assert batches("chat", members("o", "o"), spares(3), NEW) == [
        Batch((place("s0", "prefill"), place("s1", "decode"))),
        Batch((place("p0"),)),
        Batch((place("d0"),), LAST_PATIENCE_S),
    ]


def test_a_spare_stands_in_where_a_role_has_a_single_instance() -> None:
    assert batches("chat", members("o", "oo"), spares(1), NEW) == [
        Batch((place("s0", "prefill"), place("d0"))),
        Batch((place("p0"),)),
        Batch((place("d1"),), LAST_PATIENCE_S),
    ]


@pytest.mark.parametrize(
    ("prefill", "decode", "num_spares", "role"),
    [("o", "oo", 0, "prefill"), ("oo", "o", 0, "decode"), ("o", "o", 0, "prefill"), ("o", "o", 1, "decode")],
)
def test_without_enough_spares_it_is_refused(prefill: str, decode: str, num_spares: int, role: str) -> None:
    with pytest.raises(ImpossibleUpgrade) as caught:
        batches("chat", members(prefill, decode), spares(num_spares), NEW)
    assert str(caught.value) == (
        f"group chat has a single {role} instance, and there is no spare to stand in for it while it loads: "
        "start another instance (PDSERVE_ROLE=spare), then upgrade again"
    )


def test_members_that_have_the_model_already_are_left_alone() -> None:
    assert batches("chat", members("nn", "n"), [], NEW) == []
    assert batches("chat", members("no", "on"), [], NEW) == [
        Batch((place("p1"),)),
        Batch((place("d0"),), LAST_PATIENCE_S),
    ]
    assert batches("chat", members("no", "oo"), [], NEW) == [
        Batch((place("d0"),)),
        Batch((place("p1"),)),
        Batch((place("d1"),), LAST_PATIENCE_S),
    ]


def test_a_group_that_was_stopped_half_way_goes_on() -> None:
    assert batches("chat", members("noo", "noo"), [], NEW) == [
        Batch((place("p1"),)),
        Batch((place("d1"),)),
        Batch((place("p2"),)),
        Batch((place("d2"),), LAST_PATIENCE_S),
    ]


def test_the_ids_of_a_batch() -> None:
    assert Batch((place("p0"), place("d0"))).instance_ids == ["p0", "d0"]


Models = dict[str, tuple[Role, str]]
"""Role and model of those that serve."""


def moments(start: Models, num_spares: int) -> Iterator[Models]:
    """Who serves at every moment: before, while each instance of a batch loads, and after. What comes next is asked for
    after each batch, and spares go again at the end.
    """
    now, free = dict(start), [one.id for one in spares(num_spares)]
    while plan := batches("chat", records(now), [spare(one, model_path=OLD) for one in free], NEW):
        for instance_id, to in plan[0].places:
            yield dict(now)
            now.pop(instance_id, None)
            yield dict(now)
            now[instance_id] = (to.role, NEW)
            free = [one for one in free if one != instance_id]
    yield dict(now)
    yield {name: found for name, found in now.items() if name in start}


def records(now: Models) -> list[InstanceRecord]:
    """In the order in which they were declared."""
    return [serving(name, role, model_path=model) for name, (role, model) in sorted(now.items())]


def has_a_pair(now: Models) -> bool:
    found = set(now.values())
    return any({("prefill", model), ("decode", model)} <= found for model in (OLD, NEW))


letters = st.text("on", min_size=1, max_size=5)


@settings(deadline=None)
@given(prefill=letters, decode=letters, num_spares=st.integers(0, 2))
def test_there_is_a_pair_of_like_weights_at_every_moment(prefill: str, decode: str, num_spares: int) -> None:
    start: Models = {one.id: (one.role or "prefill", one.model_path) for one in members(prefill, decode)}
    assume(has_a_pair(start))
    try:
        seen = list(moments(start, num_spares))
    except ImpossibleUpgrade:
        assert "o" in (prefill, decode)
        with pytest.raises(ImpossibleUpgrade):  # at once, and not half-way
            batches("chat", records(start), spares(num_spares), NEW)
        return
    assert all(has_a_pair(now) for now in seen)
    assert seen[-1] == {name: (role, NEW) for name, (role, _) in start.items()}


@settings(deadline=None)
@given(prefill=letters, decode=letters)
def test_requests_of_the_last_old_decode_instance_have_time(prefill: str, decode: str) -> None:
    """Nobody else could go on with them; all others of before find another of their weights."""
    try:
        plan = batches("chat", members(prefill, decode), spares(2), NEW)
    except ImpossibleUpgrade:
        raise AssertionError("two spares are enough") from None
    old = {f"d{number}" for number, letter in enumerate(decode) if letter == "o"}
    for batch in plan:
        old -= set(batch.instance_ids)
        takes_the_last = not old and any(to.role == "decode" for _, to in batch.places)
        had_the_last = takes_the_last and any(one.startswith("d") for one in batch.instance_ids)
        assert (batch.patience_s is not None) == had_the_last
