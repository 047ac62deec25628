"""How many replicas of a group there should be, by the clock and by load.

The plan says how many there are at least. Load adds replicas where requests keep waiting though both roles are busy (if
one has time, the ratio is at fault), and takes them away where the others have time for all. What persists is told by
two moments, kept in `LoadState`, which is handed in and given back; nothing else is remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import time

from services.controller.policy.load import GroupLoad
from shared.groups import GroupSpec


@dataclass(frozen=True, slots=True)
class Bounds:
    """When load counts.

    Attributes:
        busy: both roles must be at least so busy (0 .. 1) for one more replica.
        idle: both roles must be at most so busy without the last replica for one fewer. Less than `busy`, so that a
            replica that has come is not sent away again.
        waiting: requests per replica that wait in gateways, from which on they count.
        more_after_s: for how many seconds without a break there must be reason for one more.
        fewer_after_s: the same for one fewer.
    """

    busy: float = 0.7
    idle: float = 0.5
    waiting: float = 1.0
    more_after_s: float = 10.0
    fewer_after_s: float = 120.0

    def __post_init__(self) -> None:
        if not 0 < self.idle < self.busy <= 1:
            raise ValueError(f"0 < idle < busy <= 1 must hold, but idle is {self.idle:g} and busy {self.busy:g}")


@dataclass(frozen=True, slots=True)
class LoadState:
    """Since when, on the caller's monotonic clock in seconds, there is reason for another number; None is not now."""

    crowded_since_s: float | None = None
    idle_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many there should be, why, and what to hand in next time."""

    count: int
    reason: str
    state: LoadState


@dataclass(frozen=True, slots=True)
class Busy:
    """How busy instances are by role; 1 is all the time, and infinite is that there are none."""

    prefill: float
    decode: float

    def __str__(self) -> str:
        return f"prefill {self.prefill:.0%}, decode {self.decode:.0%}"


DEFAULT_BOUNDS = Bounds()


def replicas_at(spec: GroupSpec, time_of_day_utc: time) -> int:
    """How many replicas the plan has at a time of day; 1 where it says nothing.

    0, which the group `default` never has, is that the group's requests go to `default`.
    """
    minute = time_of_day_utc.hour * 60 + time_of_day_utc.minute
    return next((entry.replicas for entry in spec.plan if entry.holds(minute)), 1)


def replicas_by_load(
    spec: GroupSpec,
    planned: int,
    current: int,
    loads: Sequence[GroupLoad],
    state: LoadState,
    now_s: float,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Replicas:
    """How many replicas a group should have: never fewer than planned, and one more or one fewer at a time by load.

    Args:
        planned: what `replicas_at` says.
        current: how many there should be by now: the last answer, or as many as a new leader finds.
        loads: of the replicas that serve, in their order; the last is the first to go.
        state: of the last answer; `LoadState()` at first.
        now_s: monotonic clock, seconds.
    """
    if planned == 0 or current < planned:
        reason = "as before" if current == planned else f"the plan has {planned} now"
        return Replicas(planned, reason, LoadState())
    state = _seen(spec, planned, current, loads, state, now_s, bounds)
    if _lasts(state.crowded_since_s, now_s, bounds.more_after_s):
        return _one_more(spec, current, loads, state)
    if _lasts(state.idle_since_s, now_s, bounds.fewer_after_s):
        rest = without_last(spec, current, loads)
        return Replicas(current - 1, f"one fewer has time for all: {rest}", LoadState())
    return Replicas(current, "as before", state)


def busy(spec: GroupSpec, loads: Sequence[GroupLoad]) -> Busy:
    """How busy the instances of these replicas are, all together."""
    return _busy(spec, loads, loads)


def without_last(spec: GroupSpec, current: int, loads: Sequence[GroupLoad]) -> Busy:
    """How busy instances would be with one replica fewer: the last, or one that is not there yet."""
    return _busy(spec, loads, loads[: current - 1])


def _seen(
    spec: GroupSpec,
    planned: int,
    current: int,
    loads: Sequence[GroupLoad],
    state: LoadState,
    now_s: float,
    bounds: Bounds,
) -> LoadState:
    """The state with what is seen now: a reason that was there keeps its moment, one that is not has none."""
    crowded = _is_crowded(spec, loads, bounds)
    idle = current > max(planned, 1) and _is_idle(spec, current, loads, bounds)
    return LoadState(
        crowded_since_s=_since(state.crowded_since_s, now_s) if crowded else None,
        idle_since_s=_since(state.idle_since_s, now_s) if idle else None,
    )


def _is_crowded(spec: GroupSpec, loads: Sequence[GroupLoad], bounds: Bounds) -> bool:
    if not loads or not _many_wait(loads, bounds):
        return False
    found = busy(spec, loads)
    return min(found.prefill, found.decode) >= bounds.busy


def _is_idle(spec: GroupSpec, current: int, loads: Sequence[GroupLoad], bounds: Bounds) -> bool:
    left = loads[: current - 1]
    if not left or _many_wait(loads, bounds) or _num_instances(left) < spec.min_instances:
        return False
    rest = without_last(spec, current, loads)
    return max(rest.prefill, rest.decode) <= bounds.idle


def _one_more(spec: GroupSpec, current: int, loads: Sequence[GroupLoad], state: LoadState) -> Replicas:
    """Another replica, unless one is on its way or the group's bound is reached; then the reason goes on."""
    if len(loads) < current:
        return Replicas(current, "requests wait, and a replica is on its way", state)
    if spec.max_instances is not None and _num_instances(loads) + spec.replica_instances > spec.max_instances:
        reason = f"requests wait, but max_instances is {spec.max_instances}"
        return Replicas(current, reason, state)
    waiting = sum(load.num_waiting for load in loads)
    return Replicas(current + 1, f"{waiting:.0f} requests wait: {busy(spec, loads)}", LoadState())


def _many_wait(loads: Sequence[GroupLoad], bounds: Bounds) -> bool:
    return sum(load.num_waiting for load in loads) >= bounds.waiting * len(loads)


def _num_instances(loads: Sequence[GroupLoad]) -> int:
    return sum(load.num_prefill + load.num_decode for load in loads)


def _busy(spec: GroupSpec, work: Sequence[GroupLoad], instances: Sequence[GroupLoad]) -> Busy:
    """How busy `instances` are if they do all of `work`."""
    return Busy(
        prefill=_part(sum(_prefill_filled(load) for load in work), sum(load.num_prefill for load in instances)),
        decode=_part(
            sum(_decode_filled(load, spec.tpot_s) for load in work), sum(load.num_decode for load in instances)
        ),
    )


def _prefill_filled(load: GroupLoad) -> float:
    """How many prefill instances this work fills."""
    return load.prefill_busy * load.num_prefill


def _decode_filled(load: GroupLoad, tpot_s: float | None) -> float:
    """How many decode instances this work fills: tokens per second, of those of a full instance.

    An engine with one row computes as much of the time as a full one: that is used only where nothing else is known.
    """
    full_tokens_per_s = _full_tokens_per_s(load, tpot_s)
    if full_tokens_per_s is None or load.output_tokens is None:
        return load.decode_busy * load.num_decode
    return load.done_per_s * load.output_tokens / full_tokens_per_s


def _full_tokens_per_s(load: GroupLoad, tpot_s: float | None) -> float | None:
    """What a decode instance generates with all slots taken, or as many as leave a token its objective."""
    base_s, row_s = load.step_base_s, load.step_row_s
    if base_s is None or row_s is None:
        return None
    rows = load.decode_slots
    if tpot_s is not None and row_s > 0:
        rows = min(rows, (tpot_s - base_s) / row_s)
    rows = max(rows, 1.0)
    step_s = base_s + rows * row_s
    return rows / step_s if step_s > 0 else None


def _part(filled: float, instances: int) -> float:
    return filled / instances if instances else float("inf")


def _since(before_s: float | None, now_s: float) -> float:
    return now_s if before_s is None else before_s


def _lasts(since_s: float | None, now_s: float, seconds: float) -> bool:
    return since_s is not None and now_s - since_s >= seconds
