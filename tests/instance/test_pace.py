"""How long prompts will take, and what can be promised; pure but for the clock."""

import itertools
import random
import time
from types import SimpleNamespace

import pytest

from shared.engine.work import PromptWork
from shared.instance import pace as pace_module
from shared.instance.pace import FIRST, NEW_S, NUM_OUTCOMES, OLD_S, Pace
from shared.messages.records import Work

TOKEN_S = 1e-3
PAIR_S = 1e-6
STEP = 512


class Engine:
    """Computes prompts in so much time for each token and for each pair."""

    def __init__(self, token_s: float = TOKEN_S, pair_s: float = PAIR_S) -> None:
        self.token_s = token_s
        self.pair_s = pair_s
        self.done = PromptWork()
        self.seconds = 0.0

    def takes(self, prompt: PromptWork) -> float:
        return self.token_s * prompt.tokens + self.pair_s * prompt.pairs

    def compute(self, length: int, slower: float = 1.0) -> None:
        prompt = PromptWork.of(length)
        self.done += prompt
        self.seconds += slower * self.takes(prompt)

    @property
    def work(self) -> Work:
        return Work(prefill_tokens=self.done.tokens, prefill_pairs=self.done.pairs, prefill_s=self.seconds)


def test_the_pairs_of_a_chunk_are_of_its_tokens_with_all_before_them() -> None:
    assert PromptWork.of(3) == PromptWork(3, 1 + 2 + 3)
    assert PromptWork.of(5, 3) == PromptWork(2, 4 + 5)
    assert PromptWork.of(3) + PromptWork.of(5, 3) == PromptWork.of(5)


def told(pace: Pace, engine: Engine, *lengths: int, slower: float = 1.0) -> None:
    """The engine computes one after another, and the pace hears of each."""
    for length in lengths:
        engine.compute(length, slower=slower)
        pace.look(engine.work)


def test_nothing_is_expected_before_anything_was_measured() -> None:
    pace = Pace(STEP)
    assert pace.seconds(PromptWork.of(1000)) == 0.0
    pace.look(Work(decode_steps=10, decode_s=3.0))
    assert pace.seconds(PromptWork.of(1000)) == 0.0
    assert pace.promised_s(0.0) == 0.0


def test_a_first_prompt_says_how_long_others_take() -> None:
    pace, engine = Pace(STEP), Engine(pair_s=0.0)
    told(pace, engine, 100)
    assert pace.seconds(PromptWork.of(50)) == pytest.approx(50 * TOKEN_S)
    assert pace.seconds(PromptWork()) == 0.0


def test_short_and_long_prompts_tell_tokens_and_pairs_apart() -> None:
    pace, engine = Pace(STEP), Engine()
    told(pace, engine, 100, 1000, 200)
    for length in (10, 500, 4000):
        ahead = PromptWork.of(length) + PromptWork.of(300, 200)
        assert pace.seconds(ahead) == pytest.approx(engine.takes(ahead), rel=1e-6)


def test_prompts_of_one_length_do_not_pretend_to_know_more() -> None:
    pace, engine = Pace(STEP), Engine()
    rng = random.Random(0)
    for _ in range(50):
        told(pace, engine, 500, slower=rng.uniform(0.9, 1.1))
    takes = engine.takes(PromptWork.of(500))
    assert pace.seconds(PromptWork.of(500)) == pytest.approx(takes, rel=0.1)
    assert pace.seconds(PromptWork.of(10)) == pytest.approx(10 / 500 * takes, rel=0.1)


def test_no_coefficient_is_below_zero() -> None:
    """Long prompts that are quicker for each token than short ones, as where a step costs something by itself."""
    pace = Pace(STEP)
    work = Work()
    for number in range(1, 20):
        length = 100 if number % 2 else 1000
        done = PromptWork.of(length)
        work = Work(
            prefill_tokens=work.prefill_tokens + done.tokens,
            prefill_pairs=work.prefill_pairs + done.pairs,
            prefill_s=work.prefill_s + 0.5 + 1e-3 * length,
        )
        pace.look(work)
    seconds = [pace.seconds(PromptWork.of(length)) for length in range(1, 5000, 100)]
    assert all(0 < shorter < longer for shorter, longer in itertools.pairwise(seconds))


def test_what_was_seen_counts_once() -> None:
    pace, engine = Pace(STEP), Engine(pair_s=0.0)
    told(pace, engine, 100)
    engine.token_s *= 3
    told(pace, engine, 100)
    first = pace.seconds(PromptWork.of(100))
    assert 100 * TOKEN_S < first < 300 * TOKEN_S
    for _ in range(4):
        pace.look(engine.work)
        assert pace.seconds(PromptWork.of(100)) == first


def test_it_follows_a_change_of_speed() -> None:
    pace, engine = Pace(STEP), Engine()
    for slower in (10.0, 1.0):
        told(pace, engine, *[100, 900] * 100, slower=slower)
    assert pace.seconds(PromptWork.of(700)) == pytest.approx(engine.takes(PromptWork.of(700)), rel=0.01)


def test_a_slow_phase_is_forgotten_even_where_little_is_computed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt every five seconds, as where nearly all are refused."""
    now = 0.0
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: now))
    pace, engine = Pace(STEP), Engine(pair_s=0.0)
    told(pace, engine, *[500] * 20, slower=10.0)
    for _ in range(12):
        now += 5.0
        told(pace, engine, 100)
    assert pace.seconds(PromptWork.of(100)) < 2 * 100 * TOKEN_S


@pytest.fixture
def pace() -> Pace:
    """It knows the speed of an engine."""
    known = Pace(STEP)
    told(known, Engine(), 100, 1000, 200)
    return known


def test_a_promise_has_room_from_the_beginning(pace: Pace) -> None:
    assert pace.promised_s(1.0) > FIRST


def test_expectations_that_come_true_are_promised_as_they_are_once_there_were_enough(pace: Pace) -> None:
    for number in range(NUM_OUTCOMES):
        assert pace.promised_s(1.0) > FIRST, f"after {number}"
        pace.took(1.0, 1.0)
    assert pace.promised_s(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("bias", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("waits", [0.0, 1.0])
def test_all_promises_but_a_few_are_kept_however_expectations_err(pace: Pace, bias: float, waits: float) -> None:
    """Errors of a fifth to either side, a bias, and waits of up to a step."""
    rng = random.Random(1)
    step_s = pace.seconds(PromptWork.of(STEP))
    promised, took = [], []
    for number in range(4000):
        expected_s = rng.uniform(0.05, 2.0)
        seconds = bias * expected_s * max(0.1, rng.gauss(1.0, 0.2)) + waits * step_s * rng.random()
        if number >= NUM_OUTCOMES:
            promised.append(pace.promised_s(expected_s))
            took.append(seconds)
        pace.took(seconds, expected_s)
    num_kept = sum(one <= by for one, by in zip(took, promised, strict=True))
    assert num_kept / len(took) > 0.985
    assert sum(promised) < 3 * sum(took), "and not by promising nothing"


def test_what_a_short_prompt_waits_for_a_step_says_little_about_long_ones(pace: Pace) -> None:
    before = pace.promised_s(5.0)
    for _ in range(20):
        pace.took(0.1, 0.01)
    assert pace.promised_s(5.0) == pytest.approx(before)


def test_one_that_was_odd_is_forgotten(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    pace.took(100.0, 1.0)
    assert pace.promised_s(1.0) == pytest.approx(100.0)
    later = time.monotonic() + NEW_S + 1
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: later))
    assert pace.promised_s(1.0) < 2.0


def test_it_is_old_until_something_was_tried_and_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(STEP)
    assert pace.is_old()
    pace.took(1.0, 0.0)
    assert not pace.is_old()
    later = time.monotonic() + OLD_S + 1
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: later))
    assert pace.is_old()
