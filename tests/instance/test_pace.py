"""How long prompts will take, and what can be promised; pure but for the clock."""

import itertools
import random

import pytest

from shared.engine.work import PromptWork
from shared.instance import pace as pace_module
from shared.instance.pace import Pace
from shared.registry.records import Work

TOKEN_S = 1e-3
PAIR_S = 1e-6


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


def test_nothing_is_expected_before_anything_was_measured() -> None:
    pace = Pace()
    assert pace.expected_s(PromptWork.of(1000), Work()) == 0.0
    assert pace.expected_s(PromptWork.of(1000), Work(decode_steps=10, decode_s=3.0)) == 0.0
    assert pace.promised_s(0.0) == 0.0


def test_a_first_prompt_says_how_long_others_take() -> None:
    pace, engine = Pace(), Engine(pair_s=0.0)
    engine.compute(100)
    assert pace.expected_s(PromptWork.of(50), engine.work) == pytest.approx(50 * TOKEN_S)
    assert pace.expected_s(PromptWork(), engine.work) == 0.0


def test_short_and_long_prompts_tell_tokens_and_pairs_apart() -> None:
    pace, engine = Pace(), Engine()
    for length in (100, 1000, 200):
        engine.compute(length)
        pace.expected_s(PromptWork(), engine.work)
    for length in (10, 500, 4000):
        ahead = PromptWork.of(length) + PromptWork.of(300, 200)
        assert pace.expected_s(ahead, engine.work) == pytest.approx(engine.takes(ahead), rel=1e-6)


def test_prompts_of_one_length_do_not_pretend_to_know_more() -> None:
    pace, engine = Pace(), Engine()
    rng = random.Random(0)
    for _ in range(50):
        engine.compute(500, slower=rng.uniform(0.9, 1.1))
        pace.expected_s(PromptWork(), engine.work)
    assert pace.expected_s(PromptWork.of(500), engine.work) == pytest.approx(engine.takes(PromptWork.of(500)), rel=0.1)
    assert pace.expected_s(PromptWork.of(10), engine.work) == pytest.approx(
        10 / 500 * engine.takes(PromptWork.of(500)), rel=0.1
    )


def test_no_coefficient_is_below_zero() -> None:
    """Long prompts that are quicker for each token than short ones, as where a step costs something by itself."""
    pace = Pace()
    work = Work()
    for number in range(1, 20):
        length = 100 if number % 2 else 1000
        done = PromptWork.of(length)
        work = Work(
            prefill_tokens=work.prefill_tokens + done.tokens,
            prefill_pairs=work.prefill_pairs + done.pairs,
            prefill_s=work.prefill_s + 0.5 + 1e-3 * length,
        )
        pace.expected_s(PromptWork(), work)
    expected = [pace.expected_s(PromptWork.of(length), work) for length in range(1, 5000, 100)]
    assert all(0 < shorter < longer for shorter, longer in itertools.pairwise(expected))


def test_what_was_seen_counts_once() -> None:
    pace, engine = Pace(), Engine(pair_s=0.0)
    engine.compute(100)
    pace.expected_s(PromptWork(), engine.work)
    engine.token_s *= 3
    engine.compute(100)
    first, *more = [pace.expected_s(PromptWork.of(100), engine.work) for _ in range(4)]
    assert 100 * TOKEN_S < first < 300 * TOKEN_S
    assert more == [first] * 3


def test_it_follows_a_change_of_speed() -> None:
    pace, engine = Pace(), Engine()
    for slower in (10.0, 1.0):
        for length in [100, 900] * 100:
            engine.compute(length, slower=slower)
            pace.expected_s(PromptWork(), engine.work)
    assert pace.expected_s(PromptWork.of(700), engine.work) == pytest.approx(engine.takes(PromptWork.of(700)), rel=0.01)


def test_a_promise_has_room_from_the_beginning() -> None:
    assert 1.1 < Pace().promised_s(1.0) < 1.5


def test_expectations_that_come_true_are_promised_with_ever_less_room() -> None:
    pace = Pace()
    rooms = []
    for _ in range(100):
        pace.took(1.0, 1.0)
        rooms.append(pace.promised_s(1.0))
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[-1] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("bias", [0.5, 1.0, 3.0])
def test_nearly_all_promises_are_kept_however_expectations_err(bias: float) -> None:
    """Errors of a fifth to either side, and a bias."""
    pace, rng = Pace(), random.Random(1)
    promised, took = [], []
    for number in range(2000):
        expected_s = rng.uniform(0.05, 1.0)
        seconds = bias * expected_s * max(0.1, rng.gauss(1.0, 0.2))
        if number >= 50:
            promised.append(pace.promised_s(expected_s))
            took.append(seconds)
        pace.took(seconds, expected_s)
    num_kept = sum(one <= by for one, by in zip(took, promised, strict=True))
    assert num_kept / len(took) > 0.98
    assert sum(promised) < 2.5 * sum(took), "and not by promising nothing"


def test_what_a_short_prompt_takes_longer_says_little_about_long_ones() -> None:
    pace = Pace()
    before = pace.promised_s(1.0)
    for _ in range(20):
        pace.took(0.012, 0.002)
    assert pace.promised_s(1.0) < 2 * before


def test_it_is_old_until_something_was_tried_and_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now)
    pace = Pace()
    assert pace.is_old()
    pace.took(1.0, 0.0)
    assert not pace.is_old()
    now += pace_module.OLD_S + 1
    assert pace.is_old()
