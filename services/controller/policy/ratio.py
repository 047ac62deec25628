"""When instances of a group change their role, and how many. Pure: what was seen and done before goes in and comes out.

Two voices. The model (`model.py`) wishes for the best split, if that promises enough even where the model errs, or as
much as it is likely to where back-pressure shows that requests wait for the same. Where a window lacks a figure, rules
speak: who holds up whom, and P/D-Serve's comparison of T_p with E2E (arXiv 2408.08147). A wish is followed when two
windows in succession agree on its direction. No window counts that began before the last change had settled: its
figures are in part those of another split.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from services.controller.policy.load import GroupLoad
from services.controller.policy.model import Model, Prediction
from shared.messages.records import Role

MINUTE_S = 60.0
NUM_WINDOWS = 16
"""How many are kept."""
DOUBT, DOUBT_AT_REST = 1.0, 2.5
"""What to allow the model for, after a change in the last minute and without one."""
AGREED_DOUBT, AGREED_GAIN = 0.5, 0.02
"""What to allow the model for, and what it has to promise, where back-pressure points the same way."""
IDLE, BUSY = 0.5, 0.8
"""Shares of the time in which engines compute."""
FEW_LEASED, MANY_LEASED = 0.25, 0.5
"""Shares of the prefill slots."""
RISE = 0.1
"""The share by which E2E and T_p / E2E have to change for the rule to speak."""
SPARE = 0.1
"""The share of an objective that another split has to leave unused by prediction."""
RESOLUTION = 1e-6
"""The least seconds, and the least output tokens, that count as measured. Smaller figures, and negative ones, are 0:
they are rounding errors, and would make a quotient infinite."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What to aim at, and how much change a group bears.

    Attributes:
        tpot_s, ttft_s: objectives; None is none.
        min_gain: the throughput that a change has to promise, as a share of the present one. A promise is what is left
            if the model errs, so that the expected gain is higher.
        tolerance: the throughput that an objective may cost; below `min_gain`, or it would be taken back.
        settle_s: how long figures are passed over after a change of the split.
        patience_s: how long a change may take; after that it counts as failed.
        cooldown_s: how long after a change the opposite one has to promise `reversal_gain`.
        max_changes: in any minute.
    """

    tpot_s: float | None = None
    ttft_s: float | None = None
    min_gain: float = 0.05
    tolerance: float = 0.03
    settle_s: float = 1.0
    patience_s: float = 20.0
    cooldown_s: float = 40.0
    reversal_gain: float = 0.15
    max_changes: int = 6


@dataclass(frozen=True, slots=True)
class Move:
    """`number` instances should change their role."""

    from_role: Role
    to_role: Role
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wish:
    """`number` decode instances should be prefill instances, or -`number` the other way round.

    `gain` is the throughput that they promise, as a share of the present one; 0 where none is known.
    """

    number: int
    gain: float
    reason: str


@dataclass(frozen=True, slots=True)
class Change:
    at: float
    number: int
    """As in `Wish`."""


@dataclass(frozen=True, slots=True)
class History:
    """What `decide` remembers of a group.

    Attributes:
        split: instances of prefill and of decode, as seen last.
        awaited: the split that a change leads to that is under way.
        since: when the next window that counts may begin.
        windows: those that counted last, the newest last.
        wish: of the newest window.
        changes: of the last minutes, the newest last.
    """

    split: tuple[int, int] | None = None
    awaited: tuple[int, int] | None = None
    since: float = 0.0
    windows: tuple[GroupLoad, ...] = ()
    wish: Wish | None = None
    changes: tuple[Change, ...] = ()


def decide(load: GroupLoad, history: History, bounds: Bounds, now: float) -> tuple[Move | None, History]:
    """What to do, if anything, and what to pass in next time. Made to be asked whenever there are new figures.

    Args:
        now: in seconds, on a clock that never goes back.
    """
    load = _measured(load)
    history = _noticing(load, history, bounds, now)
    if now - load.window_s < history.since:
        return None, history
    earlier, windows = history.wish, (*history.windows, load)[-NUM_WINDOWS:]
    recent = _within(bounds.cooldown_s, history.changes[-1:], now)
    wish = _wish(windows, bounds, DOUBT if _within(MINUTE_S, history.changes, now) else DOUBT_AT_REST, AGREED_DOUBT)
    if wish and any(_are_opposite(wish, one) for one in recent):
        wish = _wish(windows, bounds, DOUBT_AT_REST, DOUBT_AT_REST)  # to take back what was just decided
    history = replace(history, awaited=None, since=now, windows=windows, wish=wish)
    if wish is None or earlier is None or _are_opposite(wish, earlier) or _is_too_soon(wish, history, bounds, now):
        return None, history
    number = (abs(wish.number) + 1) // 2
    if wish.number > 0:
        return Move("decode", "prefill", number, wish.reason), _changing(number, load, history, bounds, now)
    return Move("prefill", "decode", number, wish.reason), _changing(-number, load, history, bounds, now)


def _measured(load: GroupLoad) -> GroupLoad:
    """The load with 0 for each figure below `RESOLUTION`: nothing was measured."""

    def measured(figure: float | None) -> float | None:
        return 0.0 if figure is not None and figure < RESOLUTION else figure

    return replace(
        load,
        prefill_s=measured(load.prefill_s),
        step_base_s=measured(load.step_base_s),
        step_row_s=measured(load.step_row_s),
        output_tokens=measured(load.output_tokens),
        held_prefill_s=measured(load.held_prefill_s),
        e2e_s=measured(load.e2e_s),
    )


def _noticing(load: GroupLoad, history: History, bounds: Bounds, now: float) -> History:
    """Lets figures settle where the split is another than before."""
    split = (load.num_prefill, load.num_decode)
    if history.split is None:
        return replace(history, split=split, since=now - load.window_s)
    if split == history.split:
        return history
    settled = now + bounds.settle_s
    if history.awaited is None:
        return replace(history, split=split, since=settled, wish=None)
    has_come = split == history.awaited
    return replace(history, split=split, since=settled if has_come else max(history.since, settled))


def _changing(number: int, load: GroupLoad, history: History, bounds: Bounds, now: float) -> History:
    """A promise of the model holds beyond the change, and counts as the earlier of two; what rules see does not."""
    return replace(
        history,
        awaited=(load.num_prefill + number, load.num_decode - number),
        since=now + bounds.patience_s,
        wish=history.wish if history.wish and history.wish.gain > 0 else None,
        changes=(*_within(max(MINUTE_S, bounds.cooldown_s), history.changes, now), Change(now, number)),
    )


def _within(seconds: float, changes: Iterable[Change], now: float) -> list[Change]:
    return [one for one in changes if now - one.at < seconds]


def _are_opposite(one: Wish | Change, other: Wish | Change) -> bool:
    return (one.number > 0) != (other.number > 0)


def _is_too_soon(wish: Wish, history: History, bounds: Bounds, now: float) -> bool:
    if len(_within(MINUTE_S, history.changes, now)) >= bounds.max_changes:
        return True
    last = _within(bounds.cooldown_s, history.changes[-1:], now)
    return any(_are_opposite(wish, one) for one in last) and wish.gain < bounds.reversal_gain


def _wish(windows: Sequence[GroupLoad], bounds: Bounds, doubt: float, agreed_doubt: float) -> Wish | None:
    load = windows[-1]
    if min(load.num_prefill, load.num_decode) < 1 or _is_quiet(load):
        return None
    model = Model.fitted(windows)
    if model is None:
        return _by_rules(windows)
    wish, held_up = _by_model(model, load, bounds, doubt), _by_back_pressure(load)
    if wish is None and held_up is not None:
        # What requests wait for is seen, and not computed: where the model says the same, it need not be as sure.
        likely = _by_model(model, load, replace(bounds, min_gain=AGREED_GAIN, tolerance=0.0), agreed_doubt)
        return None if likely is None or _are_opposite(likely, held_up) else likely
    if wish and held_up and wish.gain >= bounds.min_gain and _are_opposite(wish, held_up):
        return None  # the model knows no blocks, for example, and decode may be short of them
    return wish


def _is_quiet(load: GroupLoad) -> bool:
    """Whether the split does not matter now: little to do, or no request that ever has to share an instance."""
    is_idle = load.prefill_busy < IDLE and load.decode_busy < IDLE
    return is_idle or load.arrivals_per_s <= 0 or load.num_open <= min(load.num_prefill, load.num_decode)


def _by_model(model: Model, load: GroupLoad, bounds: Bounds, doubt: float) -> Wish | None:
    """The way to the most promising split; among splits that promise nearly the same, to one that meets objectives."""
    promises = _promises(model.in_doubt(doubt), load)
    met = {number: _objectives_met(model, load, number, bounds) for number in promises}
    most = max(promises.values())
    number = max(
        (number for number in promises if promises[number] >= most - bounds.tolerance),
        key=lambda number: (met[number], promises[number]),
    )
    if number and (promises[number] >= bounds.min_gain or met[number] > met[0]):
        return Wish(number, promises[number], _model_reason(model, load, number))
    return None


def _promises(models: Iterable[Model], load: GroupLoad) -> dict[int, float]:
    """By the number of new prefill instances: the gain of throughput on which all models agree."""
    gains = [_gains(model, load) for model in models]
    return {number: min(one[number] for one in gains) for number in gains[0]}


def _gains(model: Model, load: GroupLoad) -> dict[int, float]:
    now = _predict(model, load, 0).throughput_per_s
    numbers = range(1 - load.num_prefill, load.num_decode)
    return {number: _predict(model, load, number).throughput_per_s / now - 1 for number in numbers}


def _predict(model: Model, load: GroupLoad, number: int) -> Prediction:
    return model.predict(load.num_prefill + number, load.num_decode - number)


def _objectives_met(model: Model, load: GroupLoad, number: int, bounds: Bounds) -> tuple[bool, bool]:
    """Of TPOT and of TTFT, by the present split as clients see it, and with something to spare by others."""
    predicted = _predict(model, load, number)
    tpot_s, ttft_s = predicted.tpot_s / (1 - SPARE), predicted.ttft_s / (1 - SPARE)
    if not number:
        tpot_s = predicted.tpot_s if load.tpot_s is None else load.tpot_s
        ttft_s = predicted.ttft_s if load.ttft_s is None else load.ttft_s
    return bounds.tpot_s is None or tpot_s <= bounds.tpot_s, bounds.ttft_s is None or ttft_s <= bounds.ttft_s


def _model_reason(model: Model, load: GroupLoad, number: int) -> str:
    return (
        f"{_split_text(model, load, number)} instead of {_split_text(model, load, 0)}: a prefill takes "
        f"{model.prefill_s * 1000:.3g} ms, an answer has {model.num_steps + 1:.3g} tokens, and {model.num_open:.0f} "
        f"requests are there"
    )


def _split_text(model: Model, load: GroupLoad, number: int) -> str:
    predicted = _predict(model, load, number)
    return (
        f"{predicted.throughput_per_s:.3g} requests/s at {predicted.tpot_s * 1000:.3g} ms per token by "
        f"{load.num_prefill + number} prefill and {load.num_decode - number} decode"
    )


def _by_rules(windows: Sequence[GroupLoad]) -> Wish | None:
    load = windows[-1]
    wish = _by_back_pressure(load) or _by_times(load, windows[:-1])
    return wish if wish and (load.num_decode if wish.number > 0 else load.num_prefill) > 1 else None


def _by_back_pressure(load: GroupLoad) -> Wish | None:
    """Requests wait in gateways. If prefill is full of KV that nobody fetches, decode holds them up; if it is not, and
    computes all the time, prefill does.
    """
    if load.num_waiting < 1 and load.refusals_per_s <= 0:
        return None
    leased = load.num_leased / max(1.0, load.num_prefill * load.prefill_slots)
    if leased >= MANY_LEASED:
        return Wish(-1, 0.0, f"{load.num_waiting:.0f} requests wait, and {leased:.0%} of prefill slots wait for decode")
    if leased <= FEW_LEASED and load.prefill_busy >= BUSY:
        return Wish(1, 0.0, f"{load.num_waiting:.0f} requests wait, and prefill is busy {load.prefill_busy:.0%}")
    return None


def _by_times(load: GroupLoad, windows: Sequence[GroupLoad]) -> Wish | None:
    """E2E up and T_p / E2E up: more prefill. E2E up and T_p / E2E down: more decode (arXiv 2408.08147)."""
    same = [one for one in windows if (one.num_prefill, one.num_decode) == (load.num_prefill, load.num_decode)]
    before, now = _share_of_prefill(same[0]) if same else None, _share_of_prefill(load)
    if before is None or now is None or (load.e2e_s or 0.0) < (same[0].e2e_s or 0.0) * (1 + RISE):
        return None
    if abs(now / before - 1) < RISE:
        return None
    reason = (
        f"E2E went from {same[0].e2e_s:.3g} to {load.e2e_s:.3g} s, and prefill from {before:.0%} to {now:.0%} of it"
    )
    return Wish(1 if now > before else -1, 0.0, reason)


def _share_of_prefill(load: GroupLoad) -> float | None:
    """T_p / E2E, above 0."""
    return load.held_prefill_s / load.e2e_s if load.held_prefill_s and load.e2e_s else None
