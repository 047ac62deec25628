"""Which group gets an instance that can be spared: a spare, or one of a group that has time. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.controller.policy import tidal
from services.controller.policy.load import GroupLoad
from services.controller.policy.model import Model
from shared.groups import GroupSpec, declared_name
from shared.messages.records import Role

CROWDED_S = 5.0
"""For how long requests have to wait, with both roles busy, before a group gets an instance more."""
APART_S = 20.0
"""How long after one instance the next one may go to the same group, or leave it."""
WAITING = 1.0
"""Requests that wait in gateways, from which on a group is crowded."""
BUSY, IDLE = 0.7, 0.4
"""How busy (0 .. 1) both roles of a group are that is crowded, and would be of one that gives an instance away."""


@dataclass(frozen=True, slots=True)
class Gift:
    """An instance for a group: a spare, or one of another group (`giver`) that plays `from_role` there."""

    group: str
    role: Role
    reason: str
    giver: str | None = None
    from_role: Role | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Since when groups are crowded, and when their members changed last, in monotonic seconds."""

    crowded_since: Mapping[str, float] = field(default_factory=dict)
    changed_at: Mapping[str, float] = field(default_factory=dict)


def decide(
    loads: Mapping[str, GroupLoad], specs: Mapping[str, GroupSpec], num_spares: int, state: State, now: float
) -> tuple[Gift | None, State]:
    """One instance at a time, for the group that has been crowded longest, by its share of spares if there are several.

    Args:
        loads: of the groups that serve.
        specs: of the same; `min_instances` and `max_instances` bound what is given and taken.
        num_spares: instances without a role.
    """
    crowded = {name: state.crowded_since.get(name, now) for name, load in loads.items() if _is_crowded(load)}
    state = State(crowded, state.changed_at)
    due = [name for name, since in crowded.items() if now - since >= CROWDED_S and _may_grow(name, loads, specs)]
    due = [name for name in due if now - state.changed_at.get(name, float("-inf")) >= APART_S]
    for name in sorted(due, key=lambda one: (-specs[one].share, crowded[one])):
        load = loads[name]
        role, why = _lacking_role(load)
        if num_spares > 0:
            gift = Gift(name, role, f"{load.num_waiting:.0f} requests wait, both roles are busy, and {why}")
            return gift, _after(state, now, name)
        giver = _giver(name, loads, specs, state, now)
        if giver is not None:
            from_role = _idler_role(loads[giver])
            time = _busy(loads[giver])
            reason = f"{load.num_waiting:.0f} requests wait and {why}, while group {giver} has time ({time})"
            return Gift(name, role, reason, giver, from_role), _after(state, now, name, giver)
    return None, state


def _is_crowded(load: GroupLoad) -> bool:
    return load.num_waiting >= WAITING and min(load.prefill_busy, load.decode_busy) >= BUSY


def _may_grow(name: str, loads: Mapping[str, GroupLoad], specs: Mapping[str, GroupSpec]) -> bool:
    bound = specs[name].max_instances
    return bound is None or _num_instances(name, loads) < bound


def _lacking_role(load: GroupLoad) -> tuple[Role, str]:
    """The role in which one instance more helps most."""
    model = Model.fitted([load])
    if model is None:
        role: Role = "prefill" if load.prefill_busy >= load.decode_busy else "decode"
        return role, f"{role} is busiest"
    prefill = model.predict(load.num_prefill + 1, load.num_decode).throughput_per_s
    decode = model.predict(load.num_prefill, load.num_decode + 1).throughput_per_s
    role = "prefill" if prefill >= decode else "decode"
    return role, f"one {role} instance more would do {max(prefill, decode):.3g} requests/s"


def _giver(
    name: str, loads: Mapping[str, GroupLoad], specs: Mapping[str, GroupSpec], state: State, now: float
) -> str | None:
    """The group with the most time, which keeps enough instances and would not be busy with one fewer."""
    able = [
        one
        for one, load in loads.items()
        if one != name
        and _num_instances(one, loads) > specs[one].min_instances
        and load.num_waiting < WAITING
        and _busy_without_one(load) <= IDLE
        and now - state.changed_at.get(one, float("-inf")) >= APART_S
    ]
    return min(able, key=lambda one: _busy_without_one(loads[one]), default=None)


def _idler_role(load: GroupLoad) -> Role:
    """The role that an instance can be taken of."""
    if load.num_prefill < 2 or load.num_decode < 2:
        return "decode" if load.num_prefill < 2 else "prefill"
    return "prefill" if load.prefill_busy <= load.decode_busy else "decode"


def _busy_without_one(load: GroupLoad) -> float:
    """How busy the role would be that gives an instance."""
    role = _idler_role(load)
    number, busy = (load.num_prefill, load.prefill_busy) if role == "prefill" else (load.num_decode, load.decode_busy)
    return busy * number / (number - 1) if number > 1 else float("inf")


def _busy(load: GroupLoad) -> tidal.Busy:
    return tidal.Busy(load.prefill_busy, load.decode_busy)


def _num_instances(name: str, loads: Mapping[str, GroupLoad]) -> int:
    """Of a group with all its replicas: bounds are for them together."""
    base = declared_name(name)
    return sum(load.num_prefill + load.num_decode for one, load in loads.items() if declared_name(one) == base)


def _after(state: State, now: float, *groups: str) -> State:
    return State(state.crowded_since, {**state.changed_at, **dict.fromkeys(groups, now)})
