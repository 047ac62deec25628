"""From counters that grow to what happened in a window: records and traffic in, `GroupLoad` out. Pure."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.controller.policy.load import GroupLoad
from shared.messages.records import GatewayRecord, GroupMap, InstanceRecord, Member, Traffic, Work

WINDOW_S = 2.5
LONG_S = 30.0
"""For figures that change slowly and want many samples: lengths, and what a step takes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """All records at one moment (controller's monotonic seconds)."""

    at: float
    instances: Mapping[str, InstanceRecord]
    gateways: Mapping[str, GatewayRecord]


@dataclass(slots=True)
class Samples:
    """The samples of the last `LONG_S`."""

    _kept: deque[Sample] = field(default_factory=deque)

    def add(self, at: float, instances: Mapping[str, InstanceRecord], gateways: Iterable[GatewayRecord]) -> None:
        self._kept.append(Sample(at, dict(instances), {one.id: one for one in gateways}))
        while self._kept[0].at < at - LONG_S - 1.0:
            self._kept.popleft()

    def since(self, at: float) -> list[Sample]:
        return [one for one in self._kept if one.at >= at]

    def load(self, group: GroupMap) -> GroupLoad | None:
        """What the group has done in the last window; None while samples are too few."""
        latest = self._kept[-1] if self._kept else None
        if latest is None:
            return None
        window = [one for one in self._kept if one.at >= latest.at - WINDOW_S]
        if len(window) < 2 or window[-1].at - window[0].at < 0.8 * WINDOW_S:
            return None
        long = [one for one in self._kept if one.at >= latest.at - LONG_S]
        return _load(group, window, long)


def _load(group: GroupMap, window: list[Sample], long: list[Sample]) -> GroupLoad:
    first, last = window[0], window[-1]
    seconds = last.at - first.at
    prefill, decode = _Work.of(group.of("prefill"), first, last), _Work.of(group.of("decode"), first, last)
    traffic = _traffic_between(group.name, first, last)
    slow = _traffic_between(group.name, long[0], last)
    base_s, row_s = _fit(group, first, last) or _fit(group, long[0], last) or (None, None)
    waiting = [_traffic_at(group.name, one) for one in window]
    tokens_after_first = traffic.output_tokens - traffic.num_done
    return GroupLoad(
        window_s=seconds,
        num_prefill=prefill.num_instances,
        num_decode=decode.num_instances,
        prefill_slots=prefill.slots,
        decode_slots=decode.slots,
        num_open=_mean(one.open for one in waiting),
        num_waiting=_mean(one.waiting_prefill + one.waiting_decode for one in waiting),
        num_leased=_mean(_leased(group, one) for one in window),
        arrivals_per_s=traffic.num_arrived / seconds,
        done_per_s=traffic.num_done / seconds,
        refusals_per_s=(prefill.num_rejected + decode.num_rejected) / seconds,
        prefill_s=_ratio(prefill.work.prefill_s, traffic.num_first_tokens)
        or _ratio(_Work.of(group.of("prefill"), long[0], last).work.prefill_s, slow.num_first_tokens),
        step_base_s=base_s,
        step_row_s=row_s,
        output_tokens=_output_tokens(decode.work, traffic, slow),
        prefill_busy=_share(prefill.work.prefill_s, seconds * prefill.num_instances),
        decode_busy=_share(decode.work.decode_s + decode.work.prefill_s, seconds * decode.num_instances),
        held_prefill_s=_ratio(prefill.occupied_s, prefill.num_ended),
        held_decode_s=_ratio(decode.occupied_s, decode.num_ended),
        e2e_s=_ratio(traffic.e2e_s, traffic.num_done),
        ttft_s=_ratio(traffic.ttft_s, traffic.num_first_tokens),
        tpot_s=_ratio(decode.occupied_s, tokens_after_first) if decode.num_ended else None,
    )


MANY = 10
"""Requests that have to be done within a window for its own mean to count."""


@dataclass(slots=True)
class _Work:
    """What the members of one role did between two samples, summed; those that changed meanwhile are left out."""

    num_instances: int = 0
    slots: float = 0.0
    num_rejected: int = 0
    num_ended: int = 0
    occupied_s: float = 0.0
    work: Work = field(default_factory=Work)

    @classmethod
    def of(cls, members: list[Member], first: Sample, last: Sample) -> "_Work":
        total = cls(num_instances=len(members))
        slots = [last.instances[one.instance_id].slots_total for one in members if one.instance_id in last.instances]
        total.slots = _mean(slots)
        for before, after in _pairs(members, first, last):
            total.num_rejected += after.admissions.num_rejected - before.admissions.num_rejected
            total.num_ended += after.admissions.num_ended - before.admissions.num_ended
            total.occupied_s += after.admissions.occupied_s - before.admissions.occupied_s
            total.work = _plus(total.work, _minus(after.work, before.work))
        return total


def _pairs(members: list[Member], first: Sample, last: Sample) -> list[tuple[InstanceRecord, InstanceRecord]]:
    """Records of those that had the same epoch in both samples."""
    found = [(first.instances.get(one.instance_id), last.instances.get(one.instance_id)) for one in members]
    return [(before, after) for before, after in found if before and after and before.epoch == after.epoch]


def _minus(after: Work, before: Work) -> Work:
    return Work(**{name: getattr(after, name) - getattr(before, name) for name in Work.model_fields})


def _plus(one: Work, other: Work) -> Work:
    return Work(**{name: getattr(one, name) + getattr(other, name) for name in Work.model_fields})


def _output_tokens(work: Work, traffic: Traffic, slow: Traffic) -> float | None:
    """Of a request: the first, and those that decode generated for each that was done. Right after a shift of traffic
    this knows of long answers that are still going on; the mean over those done (`slow`) knows only short ones, and
    stands in for what few requests leave open.
    """
    num_tokens = work.decode_rows + work.rows_beside_prefill
    usual = _ratio(slow.output_tokens, slow.num_done)
    if usual is None:
        return 1 + num_tokens / traffic.num_done if traffic.num_done >= MANY else None
    num_lacking = max(0.0, MANY - traffic.num_done)
    return 1 + (num_tokens + num_lacking * (usual - 1)) / (traffic.num_done + num_lacking)


def _fit(group: GroupMap, first: Sample, last: Sample) -> tuple[float, float] | None:
    """Seconds of a decode step as base + row * rows, by least squares over the steps between two samples.

    Where all steps had about as many rows, the base is taken from what a step took, by a row's usual part in it.
    """
    work = _Work.of(group.of("decode"), first, last).work
    steps = work.decode_steps
    if steps < MANY or work.decode_rows == 0:
        return None
    rows, seconds = work.decode_rows / steps, work.decode_s / steps
    variance = work.decode_rows_squared / steps - rows**2
    covariance = work.decode_rows_s / steps - rows * seconds
    if variance < max(0.25, 0.01 * rows**2):
        return (seconds * USUAL_BASE, seconds * (1 - USUAL_BASE) / rows) if rows > 1.5 else (seconds, 0.0)
    row_s = min(max(covariance / variance, 0.0), seconds / rows)
    return seconds - row_s * rows, row_s


USUAL_BASE = 0.5
"""The share of a step that does not depend on its rows, where it cannot be measured."""


def _traffic_between(group: str, first: Sample, last: Sample) -> Traffic:
    """The sums of what gateways counted between two samples; a gateway that has come or gone meanwhile counts not."""
    total = dict.fromkeys(Traffic.model_fields, 0.0)
    for name, after in last.gateways.items():
        before = first.gateways.get(name)
        if before is None:
            continue
        new, old = after.traffic.get(group, Traffic()), before.traffic.get(group, Traffic())
        for key in total:
            total[key] += max(0.0, getattr(new, key) - getattr(old, key))
    return Traffic.model_construct(**total)  # type: ignore[arg-type]


def _traffic_at(group: str, sample: Sample) -> Traffic:
    """What is in gateways at a moment, summed."""
    found = [one.traffic[group] for one in sample.gateways.values() if group in one.traffic]
    return Traffic(
        open=sum(one.open for one in found),
        waiting_prefill=sum(one.waiting_prefill for one in found),
        waiting_decode=sum(one.waiting_decode for one in found),
    )


def _leased(group: GroupMap, sample: Sample) -> int:
    ids = [one.instance_id for one in group.of("prefill")]
    return sum(sample.instances[one].slots_leased for one in ids if one in sample.instances)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _ratio(total: float, number: float) -> float | None:
    return total / number if number > 0 else None


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
