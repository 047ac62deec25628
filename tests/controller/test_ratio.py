"""The model of throughput, what is decided by it and by rules, and both in control of simulated groups."""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.policy.load import GroupLoad
from services.controller.policy.model import Model
from services.controller.policy.ratio import Bounds, Change, History, Move, decide
from tests.controller.group_simulation import CODE, CONVERSATION, READ_EVERY_S, Mix, Simulation

WINDOW_S = 2.5
LOAD = GroupLoad(
    window_s=WINDOW_S,
    num_prefill=4,
    num_decode=4,
    num_open=200.0,
    arrivals_per_s=30.0,
    done_per_s=30.0,
    prefill_s=0.1,
    step_base_s=0.01,
    step_row_s=0.0002,
    output_tokens=100.0,
    prefill_busy=1.0,
    decode_busy=1.0,
)
"""Of 8 instances, 6 for prefill are best: 56 requests/s, where 4 do 39 and 5 do 48."""
PREFILL_SHORT = replace(LOAD, num_prefill=2, num_decode=6)
DECODE_SHORT = replace(LOAD, num_prefill=7, num_decode=1)
NEARLY_BEST = replace(LOAD, num_prefill=5, num_decode=3)
BEST = replace(LOAD, num_prefill=6, num_decode=2)
UNKNOWN = replace(LOAD, prefill_s=None, output_tokens=None)


def model_of(load: GroupLoad) -> Model:
    model = Model.fitted([load])
    assert model is not None
    return model


@pytest.mark.parametrize("missing", ["prefill_s", "step_base_s", "step_row_s", "output_tokens"])
def test_no_model_without_a_figure(missing: str) -> None:
    unknown: dict[str, Any] = {missing: None}
    assert Model.fitted([LOAD, replace(LOAD, **unknown)]) is None


def test_no_model_of_nothing() -> None:
    assert Model.fitted([replace(LOAD, num_open=0.0)]) is None
    assert Model.fitted([replace(LOAD, prefill_s=0.0, output_tokens=1.0)]) is None


def test_one_request_waits_for_nobody() -> None:
    found = model_of(replace(LOAD, num_open=1.0)).predict(3, 5)
    assert found.ttft_s == pytest.approx(0.1)
    assert found.tpot_s == pytest.approx(0.0102)
    assert found.throughput_per_s == pytest.approx(1 / (0.1 + 99 * 0.0102))


def test_many_requests_are_bounded_by_prefill_or_by_decode_slots() -> None:
    many = model_of(replace(LOAD, num_open=1e6))
    assert many.predict(2, 6).throughput_per_s == pytest.approx(2 / 0.1, rel=1e-3)
    full_step_s = 0.01 + 64 * 0.0002
    assert many.predict(7, 1).throughput_per_s == pytest.approx(64 / (99 * full_step_s), rel=1e-3)
    assert many.predict(7, 1).tpot_s == pytest.approx(full_step_s)


@pytest.mark.parametrize("output_tokens", [0.0, 1.0])
def test_answers_of_one_token_need_no_decode(output_tokens: float) -> None:
    model = model_of(replace(LOAD, output_tokens=output_tokens, step_base_s=None, step_row_s=None))
    assert model.predict(7, 1).throughput_per_s == pytest.approx(7 / 0.1, rel=0.05)
    assert model.predict(7, 1).tpot_s == 0.0


def test_figures_below_zero_count_as_zero() -> None:
    model = model_of(replace(LOAD, step_row_s=-0.001))
    assert model.predict(4, 4).tpot_s == pytest.approx(0.01)


seconds = st.floats(0, 10, allow_subnormal=False)
counts = st.integers(1, 20)
models = st.builds(
    Model,
    num_open=st.floats(0.01, 1e5),
    prefill_s=st.floats(1e-6, 10),
    num_steps=st.floats(0, 1e4),
    step_base_s=seconds,
    step_row_s=seconds,
    decode_slots=st.floats(1, 1000),
)


@given(models, counts, counts)
def test_predictions_fit_together(model: Model, num_prefill: int, num_decode: int) -> None:
    found = model.predict(num_prefill, num_decode)
    assert 0 < found.throughput_per_s <= num_prefill / model.prefill_s * 1.001
    full_s = model.num_steps * model.step_s(model.decode_slots)
    assert found.throughput_per_s * full_s <= num_decode * model.decode_slots * 1.001
    in_system = found.throughput_per_s * (found.ttft_s + model.num_steps * found.tpot_s)
    assert in_system == pytest.approx(model.num_open, rel=1e-3)


@given(models, counts, counts)
def test_more_instances_do_no_harm(model: Model, num_prefill: int, num_decode: int) -> None:
    now = model.predict(num_prefill, num_decode).throughput_per_s
    assert model.predict(num_prefill + 1, num_decode).throughput_per_s >= now * 0.999
    assert model.predict(num_prefill, num_decode + 1).throughput_per_s >= now * 0.999


def test_windows_with_the_same_traffic_are_taken_together() -> None:
    longer = replace(LOAD, output_tokens=110.0, num_open=220.0)
    model = Model.fitted([replace(LOAD, output_tokens=10.0), LOAD, longer])
    assert model is not None
    assert model.num_steps == pytest.approx(104)
    assert model.num_open == pytest.approx(210)
    assert model.num_seen == pytest.approx(150)


@dataclass(slots=True)
class Run:
    """Asks every quarter of a second, and lets moves happen after `change_s`, or never."""

    bounds: Bounds = field(default_factory=Bounds)
    history: History = field(default_factory=History)
    now: float = 100.0
    change_s: float = math.inf
    moves: list[tuple[float, Move]] = field(default_factory=list)
    split: tuple[int, int] | None = None
    _coming: tuple[float, tuple[int, int]] | None = None

    def see(self, load: GroupLoad, for_s: float = WINDOW_S) -> list[Move]:
        """The moves of the next `for_s` seconds, with loads like `load` at the split that there is."""
        num_before = len(self.moves)
        self.split = self.split or (load.num_prefill, load.num_decode)
        for _ in range(round(for_s / READ_EVERY_S)):
            self.now += READ_EVERY_S
            if self._coming and self._coming[0] <= self.now:
                self.split, self._coming = self._coming[1], None
            self._ask(replace(load, num_prefill=self.split[0], num_decode=self.split[1]))
        return [move for _, move in self.moves[num_before:]]

    def _ask(self, load: GroupLoad) -> None:
        move, self.history = decide(load, self.history, self.bounds, self.now)
        if move is not None:
            self.moves.append((self.now, move))
            number = signed(move)
            self._coming = self.now + self.change_s, (load.num_prefill + number, load.num_decode - number)


def signed(move: Move) -> int:
    """Above 0 towards prefill."""
    assert {move.from_role, move.to_role} == {"prefill", "decode"}
    return move.number if move.to_role == "prefill" else -move.number


def test_two_windows_have_to_agree() -> None:
    run = Run()
    assert run.see(PREFILL_SHORT) == []
    (move,) = run.see(PREFILL_SHORT)
    assert (move.from_role, move.to_role) == ("decode", "prefill")


def test_windows_that_disagree_move_nothing() -> None:
    run, few = Run(), replace(LOAD, output_tokens=2.0)
    for _ in range(10):
        assert run.see(replace(few, output_tokens=1000.0)) == []
        assert run.see(few) == []


def test_half_the_way_at_once() -> None:
    assert [move.number for move in Run().see(PREFILL_SHORT, 6)] == [2]
    run = Run(change_s=1.0)
    run.see(PREFILL_SHORT, 60)
    assert run.split == (6, 2)
    assert [signed(move) for _, move in run.moves] == [2, 1, 1]


def test_a_reason_has_figures() -> None:
    (move,) = Run().see(PREFILL_SHORT, 6)
    assert "19.9 requests/s" in move.reason
    assert "by 2 prefill and 6 decode" in move.reason
    assert "an answer has 100 tokens" in move.reason


def test_the_best_split_stays() -> None:
    assert Run().see(BEST, 120) == []


def test_a_gain_that_is_small_or_not_sure_is_left() -> None:
    assert len(Run().see(NEARLY_BEST, 20)) == 1
    assert Run(bounds=Bounds(min_gain=0.3)).see(NEARLY_BEST, 60) == []
    assert Run().see(replace(NEARLY_BEST, done_per_s=1.0), 60) == []


@pytest.mark.parametrize(
    "quiet",
    [
        replace(PREFILL_SHORT, prefill_busy=0.4, decode_busy=0.3),
        replace(PREFILL_SHORT, num_open=2.0),
        replace(PREFILL_SHORT, arrivals_per_s=0.0),
    ],
)
def test_little_load_moves_nothing(quiet: GroupLoad) -> None:
    assert Run().see(quiet, 60) == []


@pytest.mark.parametrize("split", [(1, 1), (0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("load", [PREFILL_SHORT, DECODE_SHORT, replace(UNKNOWN, num_waiting=9.0, num_leased=32.0)])
def test_one_of_each_role_remains(load: GroupLoad, split: tuple[int, int]) -> None:
    assert Run(split=split).see(load, 60) == []


def test_figures_settle_after_a_change() -> None:
    run = Run(change_s=2.0)
    run.see(PREFILL_SHORT, 60)
    (first, _), (second, _), *_ = run.moves
    settled = first + run.change_s + run.bounds.settle_s
    assert settled + WINDOW_S <= second <= settled + WINDOW_S + 2 * READ_EVERY_S


def test_a_change_that_does_not_come_is_waited_for() -> None:
    run = Run()
    run.see(PREFILL_SHORT, 60)
    times = [at for at, _ in run.moves]
    assert len(times) == 3
    assert all(later - at >= run.bounds.patience_s for at, later in pairwise(times))


def test_a_change_of_others_settles_too() -> None:
    run = Run()
    run.see(PREFILL_SHORT)
    run.split = (2, 5)
    assert run.see(PREFILL_SHORT, 1.0 + 2 * WINDOW_S) == []
    assert len(run.see(PREFILL_SHORT, 2 * READ_EVERY_S)) == 1


def test_a_change_is_taken_back_at_once_only_for_much() -> None:
    def seen(load: GroupLoad, ago_s: float) -> list[Move]:
        run = Run()
        run.history = History(changes=(Change(run.now - ago_s, -1),))
        return run.see(load, 20)

    assert seen(NEARLY_BEST, ago_s=10) == []
    assert len(seen(NEARLY_BEST, ago_s=60)) == 1
    assert len(seen(PREFILL_SHORT, ago_s=10)) == 1


def test_changes_per_minute_are_bounded() -> None:
    run = Run(bounds=Bounds(max_changes=1), change_s=1.0)
    run.see(replace(PREFILL_SHORT, num_prefill=1, num_decode=15), 180)
    times = [at for at, _ in run.moves]
    assert len(times) >= 3
    assert all(later - at >= 60 for at, later in pairwise(times))


def test_slow_decode_that_holds_kv_back_gets_instances() -> None:
    pressed = replace(UNKNOWN, num_waiting=20.0, num_leased=30.0, prefill_busy=0.2)
    (move,) = Run().see(pressed, 6)
    assert signed(move) == -1
    assert "94% of prefill slots wait for decode" in move.reason


def test_busy_prefill_without_leases_gets_instances() -> None:
    (move,) = Run().see(replace(UNKNOWN, num_waiting=20.0, num_leased=1.0, prefill_busy=0.99), 6)
    assert signed(move) == 1
    assert "20 requests wait" in move.reason


def test_rules_say_nothing_while_nobody_waits() -> None:
    assert Run().see(replace(UNKNOWN, num_leased=30.0), 60) == []
    assert Run().see(replace(UNKNOWN, num_waiting=20.0, num_leased=12.0), 60) == []


@pytest.mark.parametrize(("occupied_s", "number"), [(2.0, 1), (0.3, -1)])
def test_times_alone(occupied_s: float, number: int) -> None:
    run = Run()
    assert run.see(replace(UNKNOWN, e2e_s=4.0, held_prefill_s=1.0), 30) == []
    (move,) = run.see(replace(UNKNOWN, e2e_s=5.0, held_prefill_s=occupied_s), 6)
    assert signed(move) == number
    assert "E2E went from 4 to 5 s" in move.reason


def test_times_of_another_split_are_not_compared() -> None:
    run = Run()
    run.see(replace(UNKNOWN, e2e_s=4.0, held_prefill_s=1.0), 30)
    run.split = (5, 3)
    assert run.see(replace(UNKNOWN, e2e_s=5.0, held_prefill_s=2.0), 30) == []


def test_back_pressure_can_stop_the_model() -> None:
    pressed = replace(PREFILL_SHORT, num_waiting=20.0, num_leased=16.0, prefill_busy=0.6)
    assert Run().see(pressed, 60) == []


def test_back_pressure_can_assure_the_model() -> None:
    """What the model is not sure enough of is done where requests wait for the same."""
    unsure = replace(NEARLY_BEST, done_per_s=3.0)
    assert Run().see(unsure, 60) == []
    move, *_ = Run().see(replace(unsure, num_waiting=20.0, num_leased=1.0), 60)
    assert signed(move) == 1
    assert "48.4 requests/s" in move.reason
    assert Run().see(replace(unsure, num_waiting=20.0, num_leased=40.0), 60) == [], "they wait for the other role"
    assert Run().see(replace(BEST, done_per_s=3.0, num_waiting=20.0, num_leased=1.0), 60) == [], "nothing is gained"


SLOW_TOKENS = replace(LOAD, num_prefill=6, num_decode=4, num_open=300.0, output_tokens=150.0, prefill_s=0.12)


def test_objectives_choose_among_splits_that_do_nearly_the_same() -> None:
    model = model_of(SLOW_TOKENS)
    by_prefill = {number: model.predict(number, 10 - number) for number in range(1, 10)}
    best = max(by_prefill, key=lambda number: by_prefill[number].throughput_per_s)
    there = Run(split=(best, 10 - best), bounds=Bounds(tolerance=0.2, min_gain=0.25), change_s=1.0)
    assert there.see(SLOW_TOKENS, 60) == []
    wanted = by_prefill[best - 1].tpot_s / 0.9
    assert wanted < by_prefill[best].tpot_s
    bounds = replace(there.bounds, tpot_s=wanted)
    strict = Run(split=(best, 10 - best), bounds=bounds, change_s=1.0)
    missed = replace(SLOW_TOKENS, tpot_s=by_prefill[best].tpot_s)
    assert [signed(move) for move in strict.see(missed, 6)] == [-1]
    assert strict.see(replace(SLOW_TOKENS, tpot_s=by_prefill[best - 1].tpot_s), 120) == []


figures = st.none() | st.floats(-1, 100)
loads = st.builds(
    GroupLoad,
    window_s=st.floats(0.5, 5),
    num_prefill=st.just(0),
    num_decode=st.just(0),
    prefill_slots=st.floats(0, 64),
    decode_slots=st.floats(0, 64),
    num_open=st.floats(0, 1000),
    num_waiting=st.floats(0, 1000),
    num_leased=st.floats(0, 100),
    arrivals_per_s=st.floats(0, 100),
    done_per_s=st.floats(0, 100),
    refusals_per_s=st.floats(0, 100),
    prefill_s=figures,
    step_base_s=figures,
    step_row_s=figures,
    output_tokens=st.none() | st.floats(0, 1000),
    prefill_busy=st.floats(0, 1),
    decode_busy=st.floats(0, 1),
    held_prefill_s=figures,
    e2e_s=figures,
    ttft_s=figures,
    tpot_s=figures,
)
bounds_of_all_kinds = st.builds(Bounds, tpot_s=st.none() | st.floats(0.001, 1), ttft_s=st.none() | st.floats(0.001, 10))


@settings(deadline=None)
@given(st.tuples(counts, counts), st.lists(loads, min_size=1, max_size=8), bounds_of_all_kinds, st.floats(0, 10))
def test_whatever_is_seen_one_of_each_role_remains(
    split: tuple[int, int], seen: list[GroupLoad], bounds: Bounds, change_s: float
) -> None:
    run = Run(bounds=bounds, split=split, change_s=change_s)
    for load in seen:
        for move in run.see(load, 7.5):
            assert move.number >= 1
            assert move.reason
        assert run.split is not None
        assert min(run.split) >= 1
        assert sum(run.split) == sum(split)


FIGURES = ("prefill_s", "step_base_s", "step_row_s", "output_tokens", "held_prefill_s", "e2e_s")


@pytest.mark.parametrize("tiny", [5e-324, 1e-200, 1e-7, -1e-7])
@pytest.mark.parametrize("figures", [*((name,) for name in FIGURES), FIGURES[:3], FIGURES])
def test_figures_below_the_resolution_are_not_measured(figures: tuple[str, ...], tiny: float) -> None:
    """Quotients of such figures are infinite or no number, and no split is the best of those."""
    timed = replace(LOAD, held_prefill_s=1.0, e2e_s=10.0)
    unmeasured: dict[str, Any] = dict.fromkeys(figures, 0.0)
    by_zero, by_tiny = Run(), Run()
    assert by_zero.see(replace(timed, **unmeasured), 20) == by_tiny.see(
        replace(timed, **dict.fromkeys(figures, tiny)), 20
    )
    for load in (replace(UNKNOWN, held_prefill_s=tiny, e2e_s=10.0), replace(UNKNOWN, held_prefill_s=5.0, e2e_s=20.0)):
        by_tiny.see(load, 20)


CLIENTS_PER_INSTANCE = 48
SEED = 203
PHASE_S = 60.0
STEADY_S = 600.0


@dataclass(frozen=True, slots=True)
class Controlled:
    """What happened: splits by time, and changes by time."""

    splits: list[tuple[float, tuple[int, int]]]
    changes: list[tuple[float, int]]

    def num_changes(self, start: float, end: float) -> int:
        return sum(start < at <= end for at, _ in self.changes)

    def split_at(self, when: float) -> tuple[int, int]:
        return next(split for at, split in self.splits if at == when)

    def until_good(self, start: float, end: float, mix: Mix, size: int) -> float:
        """Seconds from `start` to the last moment before `end` whose split was not good."""
        return max(
            (at - start for at, split in self.splits if start < at <= end and not is_good(split, mix, size)), default=0
        )


def control(simulation: Simulation, switch_to: Mix, until: float) -> Controlled:
    """Lets the policy change a simulated group, whose traffic changes after `PHASE_S`."""
    history, seen = History(), Controlled([], [])
    while simulation.now < until:
        load = simulation.read()
        seen.splits.append((simulation.now, simulation.split))
        if load is not None:
            move, history = decide(load, history, Bounds(), simulation.now)
            if move is not None:
                simulation.change(move)
                seen.changes.append((simulation.now, signed(move)))
        if simulation.now == PHASE_S:
            simulation.mix = switch_to
    return seen


@cache
def throughput(split: tuple[int, int], mix: Mix) -> float:
    """Requests per second of a ratio that stays."""
    simulation = Simulation(split, sum(split) * CLIENTS_PER_INSTANCE, mix, seed=1)
    warm_s, until, num_before = 20.0, 50.0, 0.0
    while simulation.now < until:
        simulation.read()
        if simulation.now == warm_s:
            num_before = simulation.totals.done
    return (simulation.totals.done - num_before) / (until - warm_s)


@cache
def best_prefill(size: int, mix: Mix) -> int:
    """The number of prefill instances with the highest throughput, which falls to both sides."""
    low, high = 1, size - 1
    while low < high:
        middle = (low + high) // 2
        if throughput((middle, size - middle), mix) < throughput((middle + 1, size - middle - 1), mix):
            low = middle + 1
        else:
            high = middle
    return low


@cache
def worst_split(size: int, mix: Mix) -> tuple[int, int]:
    return min((1, size - 1), (size - 1, 1), key=lambda split: throughput(split, mix))


def is_good(split: tuple[int, int], mix: Mix, size: int) -> bool:
    best = best_prefill(size, mix)
    return sum(split) == size and throughput(split, mix) >= 0.95 * throughput((best, size - best), mix)


def num_needed(split: tuple[int, int], mix: Mix) -> int:
    """Changes that it takes to the best ratio if each goes half the way."""
    return abs(best_prefill(sum(split), mix) - split[0]).bit_length()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize(("first", "second"), [(CODE, CONVERSATION), (CONVERSATION, CODE)], ids=["to-talk", "to-code"])
def test_the_ratio_follows_the_traffic(size: int, first: Mix, second: Mix) -> None:
    """From the worst ratio, and when all clients change their ways, to 95 % of the best in 30 s."""
    simulation = Simulation(worst_split(size, first), size * CLIENTS_PER_INSTANCE, first, seed=SEED)
    seen = control(simulation, second, 2 * PHASE_S)
    before = seen.split_at(PHASE_S)
    for start, split, mix in ((0.0, worst_split(size, first), first), (PHASE_S, before, second)):
        assert seen.until_good(start, start + PHASE_S, mix, size) <= 30
        assert seen.num_changes(start, start + PHASE_S) <= num_needed(split, mix) + 1


@pytest.mark.parametrize(("size", "mix"), [(4, CONVERSATION), (8, CODE), (16, CONVERSATION)], ids=["4", "8", "16"])
def test_steady_traffic_changes_nothing(size: int, mix: Mix) -> None:
    simulation = Simulation(worst_split(size, mix), size * CLIENTS_PER_INSTANCE, mix, seed=SEED)
    seen = control(simulation, mix, PHASE_S + STEADY_S)
    assert is_good(seen.split_at(PHASE_S), mix, size)
    assert seen.num_changes(PHASE_S, PHASE_S + STEADY_S) == 0
