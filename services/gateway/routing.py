"""Which waiting request is served next, which can no longer be served in time, and which instance to ask. Pure.

**Order of service.** Prompts are computed one after another, for about as long as estimated, and a first token after
its deadline is worth nothing. Most first tokens are in time if the waiting requests are taken by deadline, and as long
as somebody would be late, the longest request so far is set aside: J. M. Moore, "An n job, one machine sequencing
algorithm for minimizing the number of late jobs", Management Science 15 (1968), in the form of T. J. Hodgson. With
several instances, each request goes to the one that is free first, which is no longer optimal but close. The order is
computed anew from what waits at that time, so a request that was set aside comes back when there is time for it.

**Shedding.** A request that was set aside keeps waiting: it is served when nothing else can be. It is shed only when
it would be late even if it were started immediately (`is_hopeless`).

**Errors of estimates.** A request is counted on to be in time only if it would be even though it took `ESTIMATE_ERROR`
times as long as expected, and is hopeless only if it would be late even though it took that much less. Both were chosen
by simulation (`bench.schedule`), with estimates that are exact, 20 % off at random, and all 20 % too long or too short.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from types import MappingProxyType
from typing import Protocol, TypeVar

from shared.messages.records import InstanceRecord

STARTED, INTERACTIVE, BATCH = range(3)
"""Priorities of waiting requests. `STARTED`: the client has tokens already, and every moment is a pause of its stream.
"""
DUE_WITHOUT_OBJECTIVE_S = 10.0
"""A request without a deadline for its first token is served as if it had this one, so that others with deadlines
cannot overtake it forever. It is neither set aside nor shed."""
ESTIMATE_ERROR = 1.2
"""By which factor prefill may take longer, or less time, than expected."""
PREFIX_WEIGHT = 2.0
"""How many more open requests an instance that has the whole prompt cached may have, and is still asked first."""

_NO_SHARES: Mapping[str, float] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class Waiting:
    """What the order of service depends on, for one request. A queue may keep more in a subclass.

    Attributes:
        arrived_at: seconds on any clock; the same one for all times here.
        first_token_by: when the prefill instance must have computed the first token; None without an objective.
        expected_s: how long prefill takes once started (`prefill_s`); 0 if unknown.
        priority: `STARTED` before all others, `BATCH` after all others.
    """

    arrived_at: float
    first_token_by: float | None = None
    expected_s: float = 0.0
    priority: int = INTERACTIVE

    @property
    def due(self) -> tuple[int, float, float]:
        """Returns the sort key of service without regard to time: priority, deadline, arrival."""
        if self.priority != INTERACTIVE:
            return (self.priority, self.arrived_at, self.arrived_at)
        by = self.first_token_by
        return (INTERACTIVE, self.arrived_at + DUE_WITHOUT_OBJECTIVE_S if by is None else by, self.arrived_at)


AnyWaiting = TypeVar("AnyWaiting", bound=Waiting)


def service_order(waiting: Iterable[AnyWaiting], free_in_s: Sequence[float], now: float) -> list[AnyWaiting]:
    """Orders requests by who should get the next free prefill slot. O((n + m) log(n + m)).

    Started requests come first, then interactive ones by deadline, then interactive ones that would make others late
    (the shortest first), then batch ones.

    Args:
        free_in_s: for each instance, in how many seconds it could start another prompt; empty if there is none.
        now: on the clock of the requests' times.
    """
    by_due = sorted(waiting, key=lambda one: one.due)
    if not free_in_s:
        return by_due
    timeline = _Timeline(now + free_s for free_s in free_in_s)
    in_time: list[AnyWaiting | None] = []
    set_aside: list[AnyWaiting] = []
    batch: list[AnyWaiting] = []
    longest: list[tuple[float, int, int]] = []  # -expected_s, -index in `in_time`, instance
    for one in by_due:
        if one.priority == BATCH:
            batch.append(one)
            continue
        can_be_late = one.priority == STARTED or one.first_token_by is None
        by = inf if can_be_late or one.first_token_by is None else one.first_token_by
        seconds = ESTIMATE_ERROR * one.expected_s
        if timeline.earliest() + seconds > by:
            if not longest or -longest[0][0] <= one.expected_s:
                set_aside.append(one)
                continue
            # The longest so far ends at or before this deadline, so this shorter one can take its place.
            _, negative_index, instance = heappop(longest)
            removed = in_time[-negative_index]
            assert removed is not None, "a request is set aside once"
            timeline.take_back(instance, ESTIMATE_ERROR * removed.expected_s)
            set_aside.append(removed)
            in_time[-negative_index] = None
        instance = timeline.add(seconds)
        if not can_be_late:
            heappush(longest, (-one.expected_s, -len(in_time), instance))
        in_time.append(one)
    set_aside.sort(key=lambda one: (one.expected_s, one.arrived_at))
    return [*(one for one in in_time if one is not None), *set_aside, *batch]


class _Timeline:
    """When each instance has computed what it was given."""

    def __init__(self, free_at: Iterable[float]) -> None:
        self._free_at = list(free_at)
        self._heap = [(at, instance) for instance, at in enumerate(self._free_at)]
        heapify(self._heap)

    def earliest(self) -> float:
        """Returns when the first instance is free."""
        while self._heap[0][0] != self._free_at[self._heap[0][1]]:
            heappop(self._heap)  # an entry from before `take_back`
        return self._heap[0][0]

    def add(self, seconds: float) -> int:
        """Gives the instance that is free first so much to do, and returns its number."""
        free_at, instance = self.earliest(), self._heap[0][1]
        self._free_at[instance] = free_at + seconds
        heapreplace(self._heap, (free_at + seconds, instance))
        return instance

    def take_back(self, instance: int, seconds: float) -> None:
        self._free_at[instance] -= seconds
        heappush(self._heap, (self._free_at[instance], instance))


def is_hopeless(waiting: Waiting, now: float, starts_in_s: float = 0.0) -> bool:
    """Returns whether a request would certainly miss its deadline if it started in `starts_in_s`: it can be shed.

    Never for requests that have started, batch requests, and those without an objective.
    """
    if waiting.priority != INTERACTIVE or waiting.first_token_by is None:
        return False
    return now + starts_in_s + waiting.expected_s / ESTIMATE_ERROR > waiting.first_token_by


def hopeless_at(waiting: Waiting) -> float:
    """Returns when the request becomes hopeless if it has not started; infinity for those that never do."""
    if waiting.priority != INTERACTIVE or waiting.first_token_by is None:
        return inf
    return waiting.first_token_by - waiting.expected_s / ESTIMATE_ERROR


class PrefillSpeed(Protocol):
    """What an instance measures: its record and its heartbeat have it."""

    @property
    def id(self) -> str: ...
    @property
    def prefill_token_s(self) -> float: ...
    @property
    def prefill_pair_s(self) -> float: ...


def prefill_s(instance: PrefillSpeed, num_uncomputed_tokens: int, num_cached_tokens: int = 0) -> float:
    """Estimates the seconds in which an instance computes a prompt, once started; 0 if it has measured nothing yet.

    Each uncomputed token attends to itself and to all tokens before it, cached ones included.
    """
    pairs = num_uncomputed_tokens * num_cached_tokens + num_uncomputed_tokens * (num_uncomputed_tokens + 1) // 2
    return instance.prefill_token_s * num_uncomputed_tokens + instance.prefill_pair_s * pairs


def shortest_prefill_s(instances: Iterable[PrefillSpeed], num_tokens: int, cached: Mapping[str, float]) -> float:
    """Estimates the seconds in which the fastest of the instances computes a prompt; 0 while one has measured nothing.

    Args:
        cached: the share (0 to 1) of the prompt that instances have cached, by instance id.
    """

    def seconds(instance: PrefillSpeed) -> float:
        num_cached = min(num_tokens - 1, int(num_tokens * cached.get(instance.id, 0.0)))
        return prefill_s(instance, num_tokens - num_cached, num_cached)

    return min(map(seconds, instances), default=0.0)


def candidates(
    ready: Iterable[InstanceRecord],
    num_open: Mapping[str, int],
    tie: random.Random,
    matched_share: Mapping[str, float] = _NO_SHARES,
) -> list[InstanceRecord]:
    """Orders instances by who is asked first: fewest open requests, less what the prefix cache saves.

    Args:
        num_open: this gateway's open requests, by instance id.
        tie: breaks ties at random, so that several gateways in the same situation ask different instances.
        matched_share: the share (0 to 1) of the prompt that an instance has cached, by instance id.
    """

    def cost(instance: InstanceRecord) -> tuple[float, float]:
        saved = PREFIX_WEIGHT * matched_share.get(instance.id, 0.0)
        return (num_open.get(instance.id, 0) - saved, tie.random())

    return sorted(ready, key=cost)


def can_decode(fingerprint: str | None, num_tokens: int, instance: InstanceRecord) -> bool:
    """Returns whether `instance` can continue to `num_tokens` from KV of `fingerprint` (weights, dtype, layout)."""
    return instance.fingerprint == fingerprint and num_tokens <= instance.max_model_len


def can_prefill(
    fingerprint: str | None, num_tokens: int, decode_limits: Mapping[str, int], instance: InstanceRecord
) -> bool:
    """Returns whether `instance` can start a request that a decode instance can continue to `num_tokens` tokens.

    Args:
        fingerprint: a request that has started keeps its fingerprint; before that it is None.
        decode_limits: the longest request that decode instances take, by fingerprint (`longest_by_fingerprint`).
    """
    return (
        fingerprint in (None, instance.fingerprint)
        and num_tokens <= instance.max_model_len
        and num_tokens <= decode_limits.get(instance.fingerprint, 0)
    )


def longest_by_fingerprint(instances: Iterable[InstanceRecord]) -> dict[str, int]:
    """Returns the longest request in tokens that any of the instances takes, by fingerprint."""
    longest: dict[str, int] = {}
    for one in instances:
        longest[one.fingerprint] = max(longest.get(one.fingerprint, 0), one.max_model_len)
    return longest


def priority_of(*, has_started: bool, is_batch: bool) -> int:
    """Returns the priority of a waiting request."""
    return STARTED if has_started else BATCH if is_batch else INTERACTIVE
