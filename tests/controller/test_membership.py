"""Who should be in which group; pure."""

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.policy.membership import (
    Admit,
    Assign,
    Place,
    Release,
    Remove,
    Situation,
    Step,
    num_lacking,
    place_of,
    steps,
)
from shared.groups import GroupSpec
from shared.messages.records import ROLES, GroupMap, InstanceRecord, Role
from tests.controller.world import map_of, newcomer, serving, spare

CHAT_PREFILL, CHAT_DECODE = Place("chat", "prefill"), Place("chat", "decode")
CHAT = GroupSpec(name="chat")
CODE = GroupSpec(name="code", prefill=1, decode=3)


def situation(
    alive: Iterable[InstanceRecord],
    *maps: GroupMap,
    specs: Iterable[GroupSpec] = (CHAT,),
    coming: dict[str, Place] | None = None,
    kept_out: Collection[str] = (),
    vacant: tuple[Place, ...] = (),
) -> Situation:
    return Situation(
        alive={one.id: one for one in alive},
        maps={one.name: one for one in maps},
        specs={one.name: one for one in specs},
        coming=coming or {},
        kept_out=kept_out,
        vacant=vacant,
    )


def test_where_all_is_well_nothing_is_done() -> None:
    members = [serving("p1", "prefill"), serving("d1", "decode")]
    assert steps(situation([*members, spare("s1")], map_of("chat", *members))) == []


@pytest.mark.parametrize("role", ROLES)
def test_a_newcomer_joins_by_its_wish(role: Role) -> None:
    """Whatever is lacking, and be there enough of its kind."""
    members = [serving("p1", "prefill"), serving("d1", "decode")]
    found = steps(situation([*members, newcomer("n1", role)], map_of("chat", *members)))
    assert found == [Assign("n1", Place("chat", role), "it is its wish")]


def test_a_newcomer_takes_a_vacant_place_of_its_group() -> None:
    vacant = (Place("code", "prefill"), CHAT_DECODE)
    [step] = steps(situation([newcomer("n1", "prefill")], map_of("chat"), vacant=vacant))
    assert step == Assign("n1", CHAT_DECODE, "a decode instance of the group was lost")


def test_a_vacant_place_is_not_taken_where_its_own_wish_is_vacant_too() -> None:
    [step] = steps(situation([newcomer("n1", "prefill")], map_of("chat"), vacant=(CHAT_DECODE, CHAT_PREFILL)))
    assert step == Assign("n1", CHAT_PREFILL, "it is its wish")


def test_of_two_newcomers_one_takes_the_vacant_place() -> None:
    newcomers = [newcomer("n1", "prefill", started_at=1.0), newcomer("n2", "prefill", started_at=2.0)]
    found = steps(situation(newcomers, map_of("chat"), vacant=(CHAT_DECODE,)))
    assert [step.place for step in found if isinstance(step, Assign)] == [CHAT_DECODE, CHAT_PREFILL]


def test_a_wish_counts_once() -> None:
    """One that was something already is a spare as any other."""
    members = [serving("p1", "prefill"), serving("d1", "decode")]
    again = newcomer("n1", "prefill", epoch=3)
    assert steps(situation([*members, again], map_of("chat", *members))) == []


def test_a_wish_for_a_group_that_is_not_there_now_has_to_wait() -> None:
    """The plan of the day may have it at no replicas."""
    wishing = newcomer("n1", "decode", preferred_group="night")
    assert steps(situation([wishing], map_of("chat", serving("p1", "prefill"), serving("d1", "decode")))) == [
        Remove("p1", "it is gone"),
        Remove("d1", "it is gone"),
        Assign("n1", CHAT_PREFILL, "the group lacks 1 prefill"),
    ]
    members = [serving("p1", "prefill"), serving("d1", "decode")]
    assert steps(situation([wishing, *members], map_of("chat", *members))) == []


def test_spares_fill_what_is_lacking_the_oldest_first_and_where_it_is_most() -> None:
    spares = [spare(f"s{number}", started_at=10.0 - number) for number in range(7)]
    found = steps(situation(spares, map_of("chat"), map_of("code"), specs=(CHAT, CODE)))
    assert [(step.instance_id, step.place, step.reason) for step in found if isinstance(step, Assign)] == [
        ("s6", Place("code", "decode"), "the group lacks 3 decode"),
        ("s5", Place("code", "decode"), "the group lacks 2 decode"),
        ("s4", CHAT_PREFILL, "the group lacks 1 prefill"),
        ("s3", CHAT_DECODE, "the group lacks 1 decode"),
        ("s2", Place("code", "prefill"), "the group lacks 1 prefill"),
        ("s1", Place("code", "decode"), "the group lacks 1 decode"),
    ]
    assert len(found) == 6


def test_a_place_to_which_somebody_is_on_the_way_is_not_lacking() -> None:
    found = steps(situation([spare("s1"), spare("s2")], map_of("chat"), coming={"s2": CHAT_PREFILL}))
    assert found == [Assign("s1", CHAT_DECODE, "the group lacks 1 decode")]


def test_a_ratio_that_has_changed_lacks_nobody() -> None:
    """What is declared is the ratio to begin with: a spare is for a group that has fewer instances."""
    members = [serving("p1", "prefill"), serving("p2", "prefill"), serving("d1", "decode")]
    spec = GroupSpec(name="chat", prefill=1, decode=2)
    assert steps(situation([*members, spare("s1")], map_of("chat", *members), specs=[spec])) == []
    assert steps(situation([*members[:2], spare("s1")], map_of("chat", *members), specs=[spec])) == [
        Remove("d1", "it is gone"),
        Assign("s1", CHAT_DECODE, "the group lacks 2 decode"),
    ]


def test_a_role_that_nobody_plays_is_lacking_in_any_case() -> None:
    members = [serving("p1", "prefill"), serving("p2", "prefill")]
    assert steps(situation([*members, spare("s1")], map_of("chat", *members))) == [
        Assign("s1", CHAT_DECODE, "the group lacks 1 decode")
    ]


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (None, "it is gone"),
        ({"state": "draining"}, "it is draining"),
        ({"state": "changing", "role": None, "group": None}, "it is changing"),
        ({"epoch": 2}, "it is decode of epoch 2 now"),
        ({"role": "prefill"}, "it is prefill of epoch 1 now"),
        ({"group": "code"}, "it is decode of epoch 1 now"),
    ],
)
def test_a_member_that_is_something_else_leaves(now: dict[str, object] | None, reason: str) -> None:
    """Whose heart is late is not among those alive."""
    member = serving("d1", "decode")
    alive = [] if now is None else [member.model_copy(update=now)]
    assert Remove("d1", reason) in steps(situation(alive, map_of("chat", member), specs=(CHAT, CODE)))


def test_members_of_a_group_that_is_no_more_leave_and_become_spares() -> None:
    members = [serving("p1", "prefill"), serving("d1", "decode")]
    assert steps(situation(members, map_of("chat", *members), specs=[])) == [
        Remove("p1", "its group is no more"),
        Remove("d1", "its group is no more"),
        Release("d1", CHAT_DECODE),
        Release("p1", CHAT_PREFILL),
    ]


def test_they_go_where_they_are_needed_instead() -> None:
    members = [serving("p1", "prefill", group="code"), serving("d1", "decode", group="code")]
    found = steps(situation(members, map_of("code", *members), map_of("chat")))
    assert [step for step in found if not isinstance(step, Remove)] == [
        Assign("d1", CHAT_PREFILL, "the group lacks 1 prefill"),
        Assign("p1", CHAT_DECODE, "the group lacks 1 decode"),
    ]


def test_one_that_plays_a_role_and_is_in_no_map_is_admitted() -> None:
    """As a new leader finds it: its canary decides."""
    assert steps(situation([serving("p1", "prefill")], map_of("chat"))) == [Admit("p1")]


def test_one_that_changed_under_another_leader_leaves_and_is_admitted_as_what_it_is() -> None:
    before = serving("p1", "prefill")
    now = before.model_copy(update={"role": "decode", "epoch": 2})
    assert steps(situation([now], map_of("chat", before))) == [
        Remove("p1", "it is decode of epoch 2 now"),
        Admit("p1"),
    ]


@pytest.mark.parametrize("state", ["changing", "draining"])
def test_one_that_is_on_another_way_is_left_alone(state: str) -> None:
    assert steps(situation([spare("s1", state=state)], map_of("chat"))) == []


def test_who_is_coming_is_left_alone() -> None:
    members = [serving("p1", "prefill"), serving("d1", "decode", state="changing")]
    alive = [*members, spare("s1"), serving("n1", "decode"), newcomer("n2", "decode")]
    coming = dict.fromkeys(("d1", "s1", "n1", "n2"), CHAT_DECODE)
    assert steps(situation(alive, map_of("chat", *members), coming=coming)) == []


def test_who_is_kept_out_stays_a_spare() -> None:
    alive = [spare("s1"), newcomer("n1", "decode"), serving("d1", "decode", group="gone")]
    assert steps(situation(alive, map_of("chat"), kept_out={"s1", "n1", "d1"})) == []


def test_where_an_instance_is() -> None:
    assert place_of(serving("p1", "prefill")) == CHAT_PREFILL
    assert place_of(spare("s1")) is None


def test_how_many_places_are_lacking() -> None:
    members = [serving("p1", "prefill"), serving("p2", "prefill")]
    maps = (map_of("chat", *members), map_of("code"))
    assert num_lacking(situation([], *maps, specs=())) == 0
    assert num_lacking(situation([], *maps)) == 0  # of another ratio, but as many as declared
    assert num_lacking(situation([], *maps, specs=(CHAT, CODE))) == 4
    assert num_lacking(situation([], *maps, specs=(CODE,), coming={"s1": Place("code", "decode")})) == 3
    assert num_lacking(situation([], *maps, specs=(CHAT,), coming={"p2": Place("code", "decode")})) == 1
    assert num_lacking(situation([], *maps, specs=(CHAT, CODE), coming={"p2": CHAT_DECODE})) == 4
    assert num_lacking(situation([], specs=(CHAT,))) == 2


groups = st.sampled_from(["chat", "code", "gone"])
places = st.builds(Place, groups, st.sampled_from(ROLES))
states = st.sampled_from(["spare", "changing", "ready", "draining"])


@st.composite
def any_record(draw: st.DrawFn, name: str) -> InstanceRecord:
    """Of one that keeps the rules of records: only who is ready (or leaves) has a place, and newcomers have none."""
    state = draw(states)
    has_place = state == "ready" or (state == "draining" and draw(st.booleans()))
    place = draw(places) if has_place else None
    wish = draw(st.none() | places)
    return spare(
        name,
        state=state,
        role=place.role if place else None,
        group=place.group if place else None,
        epoch=draw(st.integers(1, 2)) if place else draw(st.integers(0, 2)),
        preferred_role=wish.role if wish else None,
        preferred_group=wish.group if wish else None,
        started_at=float(draw(st.integers(0, 3))),
    )


@st.composite
def any_situation(draw: st.DrawFn) -> Situation:
    """Maps know instances as they are, as they were, and some that are gone; each is in one map at most."""
    names = [f"i{number}" for number in range(draw(st.integers(0, 8)))]
    records = [draw(any_record(name)) for name in names]
    members: dict[str, list[InstanceRecord]] = {"chat": [], "code": [], "gone": []}
    for one in records:
        if draw(st.booleans()):
            as_is = one.role is not None and draw(st.booleans())
            place = Place(one.group or "", one.role or "prefill") if as_is else draw(places)
            epoch = one.epoch if as_is else draw(st.integers(1, 2))
            members[place.group].append(serving(one.id, place.role, group=place.group, epoch=epoch))
    alive = [one for one in records if draw(st.integers(0, 4))]
    return situation(
        alive,
        *(map_of(name, *found) for name, found in members.items()),
        specs=[one for one in (CHAT, CODE) if draw(st.integers(0, 4))],
        coming={name: draw(places) for name in names if not draw(st.integers(0, 3))},
        kept_out={name for name in names if not draw(st.integers(0, 3))},
        vacant=tuple(draw(st.lists(places, max_size=3))),
    )


def serves_rightly(given: Situation) -> set[str]:
    """The members that are, in their records, what the map says."""
    return {
        one.instance_id
        for group in given.maps.values()
        for one in group.members
        if (record := given.alive.get(one.instance_id)) is not None
        and record.state == "ready"
        and (record.group, record.role, record.epoch) == (group.name, one.role, one.epoch)
        and group.name in given.specs
    }


def others(found: Iterable[Step]) -> list[Admit | Assign | Release]:
    return [step for step in found if not isinstance(step, Remove)]


@settings(max_examples=300, deadline=None)
@given(any_situation())
def test_nobody_gets_two_steps_and_nobody_that_serves_is_touched(given: Situation) -> None:
    """But for leaving a map, which may come before: nothing waits for that."""
    found = steps(given)
    assert max(Counter(step.instance_id for step in others(found)).values(), default=1) == 1
    assert max(Counter(step.instance_id for step in found if isinstance(step, Remove)).values(), default=1) == 1
    touched = {step.instance_id for step in found}
    assert not touched & serves_rightly(given)
    assert not touched & given.coming.keys()
    assert not {one.instance_id for one in found if isinstance(one, Assign | Release)} & set(given.kept_out)


@settings(max_examples=300, deadline=None)
@given(any_situation())
def test_steps_lead_to_groups_that_are_there(given: Situation) -> None:
    for step in others(steps(given)):
        record = given.alive[step.instance_id]
        if isinstance(step, Assign):
            assert step.place.group in given.specs
        elif isinstance(step, Admit):
            assert record.state == "ready"
            assert record.group in given.specs
        else:
            assert step.place == place_of(record)
            assert step.place.group not in given.specs


@settings(max_examples=300, deadline=None)
@given(any_situation())
def test_all_is_well_once_all_steps_are_done(given: Situation) -> None:
    """And it takes few rounds: steps do not go to and fro."""
    alive, epochs = dict(given.alive), count(10)
    maps = {
        name: [(one.instance_id, one.role, one.epoch) for one in group.members] for name, group in given.maps.items()
    }
    for _ in range(4):
        now = situation(
            alive.values(),
            *(
                map_of(name, *(serving(one, role, group=name, epoch=epoch) for one, role, epoch in members))
                for name, members in maps.items()
            ),
            specs=given.specs.values(),
            kept_out=given.kept_out,
        )
        found = steps(now)
        if not found:
            break
        for step in found:
            if isinstance(step, Remove):
                maps = {name: [one for one in members if one[0] != step.instance_id] for name, members in maps.items()}
            elif isinstance(step, Release):
                alive[step.instance_id] = spare(step.instance_id, epoch=next(epochs))
            elif isinstance(step, Assign):
                place = step.place
                alive[step.instance_id] = serving(step.instance_id, place.role, group=place.group, epoch=next(epochs))
            if isinstance(step, Admit | Assign):
                record = alive[step.instance_id]
                assert record.group is not None
                assert record.role is not None
                maps[record.group].append((record.id, record.role, record.epoch))
    assert not found
