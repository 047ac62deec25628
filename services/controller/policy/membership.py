"""Who should be in which group: what has to be done so that maps say what is, and spares are where they are needed.

Pure. It never takes a serving instance out of its role; that is ratio control's, the plan's and the operator's.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from shared.groups import GroupSpec
from shared.messages.records import ROLES, GroupMap, InstanceRecord, Member, Role


@dataclass(frozen=True, slots=True)
class Place:
    """A role in a group."""

    group: str
    role: Role


def place_of(record: InstanceRecord) -> Place | None:
    """Where an instance is now; None if it is a spare."""
    return Place(record.group, record.role) if record.group and record.role else None


@dataclass(frozen=True, slots=True)
class Remove:
    """The map is to lose a member, since it is not that any more."""

    instance_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Admit:
    """An instance plays a role in a group already: it wants a canary, and to be announced."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class Assign:
    """A spare is to be given a place."""

    instance_id: str
    place: Place
    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """An instance of a group that is no more becomes a spare."""

    instance_id: str
    place: Place


Step = Remove | Admit | Assign | Release


@dataclass(frozen=True, slots=True)
class Situation:
    """What there is.

    Args:
        alive: records of the instances whose hearts beat, by id.
        maps: by group.
        specs: what is declared, by group: a group that is not here is no more.
        coming: the places of instances that are on their way, by id, None for spares: they are left alone.
        kept_out: spares that are to stay so.
        resting: instances that nothing is to be tried with for a while.
        too_new: groups that are not filled with spares yet: instances that wish to be there may just be starting.
        vacant: places whose instances were lost, the latest last.
    """

    alive: Mapping[str, InstanceRecord]
    maps: Mapping[str, GroupMap]
    specs: Mapping[str, GroupSpec]
    coming: Mapping[str, Place | None]
    kept_out: Collection[str] = ()
    resting: Collection[str] = ()
    too_new: Collection[str] = ()
    vacant: tuple[Place, ...] = ()


def steps(situation: Situation) -> list[Step]:
    """All that has to be done now."""
    removals = _removals(situation)
    removed = {one.instance_id for one in removals}
    members = {
        member.instance_id: Place(one.name, member.role)
        for one in situation.maps.values()
        for member in one.members
        if member.instance_id not in removed
    }
    taken = Counter(place for place in {**members, **situation.coming}.values() if place is not None)
    result: list[Step] = [*removals]
    for record in sorted(situation.alive.values(), key=lambda one: (one.started_at, one.id)):
        if record.id in members or record.id in situation.coming:
            continue
        step = _step(record, situation, taken)
        if step is not None:
            result.append(step)
        if isinstance(step, Assign):
            taken[step.place] += 1
            situation = _filled(situation, step.place)
    return result


def num_lacking(situation: Situation) -> int:
    """How many places that are declared nobody has, or is on the way to."""
    taken = Counter(place for place in situation.coming.values() if place is not None)
    for one in situation.maps.values():
        taken.update(
            Place(one.name, member.role) for member in one.members if member.instance_id not in situation.coming
        )
    lacking = [
        spec.prefill + spec.decode - taken[Place(name, "prefill")] - taken[Place(name, "decode")]
        for name, spec in situation.specs.items()
    ]
    return sum(max(0, number) for number in lacking)


def _filled(situation: Situation, place: Place) -> Situation:
    """Somebody takes that place: if it was vacant, it is not for the next."""
    vacant = list(situation.vacant)
    if place in vacant:
        vacant.remove(place)
    return replace(situation, vacant=tuple(vacant))


def _removals(situation: Situation) -> list[Remove]:
    found = []
    for one in situation.maps.values():
        for member in one.members:
            why = _why_no_member(member, one, situation)
            if why is not None and member.instance_id not in situation.coming:
                found.append(Remove(member.instance_id, why))
    return found


def _why_no_member(member: Member, group: GroupMap, situation: Situation) -> str | None:
    record = situation.alive.get(member.instance_id)
    if record is None:
        return "it is gone"
    if record.state != "ready":
        return f"it is {record.state}"
    if (record.group, record.role, record.epoch) != (group.name, member.role, member.epoch):
        return f"it is {record.role or 'a spare'} of epoch {record.epoch} now"
    return None if group.name in situation.specs else "its group is no more"


def _step(record: InstanceRecord, situation: Situation, taken: Counter[Place]) -> Step | None:
    if record.id in situation.resting:
        return None
    if record.state == "ready" and record.group in situation.specs:
        return Admit(record.id)
    if record.state not in ("spare", "ready") or record.id in situation.kept_out:
        return None
    place, reason = _place_for(record, situation, taken)
    if place is not None:
        return Assign(record.id, place, reason)
    was = place_of(record)
    return Release(record.id, was) if was is not None else None


def _place_for(
    record: InstanceRecord, situation: Situation, taken: Counter[Place]
) -> tuple[Place, str] | tuple[None, str]:
    """A newcomer takes the place of one that was lost in the group of its wish, or the role of its wish; a spare
    without a wish (or whose group is not there now) goes to where the most is lacking of what is declared.
    """
    is_new = record.epoch == 0
    if is_new and record.preferred_role and record.preferred_group and record.preferred_group in situation.specs:
        wish = Place(record.preferred_group, record.preferred_role)
        vacant = [place for place in situation.vacant if place.group == wish.group]
        if vacant and wish not in vacant:
            return vacant[0], f"a {vacant[0].role} instance of the group was lost"
        return wish, "it is its wish"
    lacking = {
        Place(name, role): number - taken[Place(name, role)]
        for name, spec in situation.specs.items()
        if name not in situation.too_new and _is_short(name, spec, taken)
        for role, number in zip(ROLES, (spec.prefill, spec.decode), strict=True)
    }
    most = max(lacking.values(), default=0)
    if most <= 0:
        return None, ""
    place = next(place for place, number in lacking.items() if number == most)
    return place, f"the group lacks {most} {place.role}"


def _is_short(name: str, spec: GroupSpec, taken: Counter[Place]) -> bool:
    """Whether a group has too few instances, or none of a role; its ratio may be another than it began with."""
    found = [taken[Place(name, role)] for role in ROLES]
    return sum(found) < spec.prefill + spec.decode or not all(found)
