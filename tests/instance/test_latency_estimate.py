"""How long prompts will take; pure but for the clock."""

import itertools
import random
from types import SimpleNamespace

import pytest

from shared.engine.work import PromptWork
from shared.instance import latency_estimate
from shared.instance.latency_estimate import LatencyEstimate
from shared.messages.records import Work

TOKEN_S = 1e-3
PAIR_S = 1e-6


class Engine:
    """Computes prompts in so much time for each token and for each pair."""

    def __init__(self, token_s: float = TOKEN_S, pair_s: float = PAIR_S) -> None:
        self.token_s = token_s
        self.pair_s = pair_s
        self.done = PromptWork()
        self.seconds = 0.0

    def seconds_for(self, prompt: PromptWork) -> float:
        return self.token_s * prompt.tokens + self.pair_s * prompt.pairs

    def compute(self, length: int, slower: float = 1.0) -> None:
        prompt = PromptWork.of(length)
        self.done += prompt
        self.seconds += slower * self.seconds_for(prompt)

    @property
    def work(self) -> Work:
        return Work(prefill_tokens=self.done.tokens, prefill_pairs=self.done.pairs, prefill_s=self.seconds)


def observe(estimate: LatencyEstimate, engine: Engine, *lengths: int, slower: float = 1.0) -> None:
    """The engine computes prompts one after another, each of which is observed."""
    for length in lengths:
        engine.compute(length, slower=slower)
        estimate.observe(engine.work)


def test_the_pairs_of_a_chunk_are_of_its_tokens_with_all_before_them() -> None:
    assert PromptWork.of(3) == PromptWork(3, 1 + 2 + 3)
    assert PromptWork.of(5, 3) == PromptWork(2, 4 + 5)
    assert PromptWork.of(3) + PromptWork.of(5, 3) == PromptWork.of(5)


def test_nothing_is_expected_before_anything_was_measured() -> None:
    estimate = LatencyEstimate()
    assert estimate.seconds(PromptWork.of(1000)) == 0.0
    estimate.observe(Work(decode_steps=10, decode_s=3.0))
    assert estimate.seconds(PromptWork.of(1000)) == 0.0
    assert (estimate.token_s, estimate.pair_s) == (0.0, 0.0)


def test_a_first_prompt_says_how_long_others_take() -> None:
    estimate, engine = LatencyEstimate(), Engine(pair_s=0.0)
    observe(estimate, engine, 100)
    assert estimate.seconds(PromptWork.of(50)) == pytest.approx(50 * TOKEN_S)
    assert estimate.seconds(PromptWork()) == 0.0


def test_short_and_long_prompts_tell_tokens_and_pairs_apart() -> None:
    estimate, engine = LatencyEstimate(), Engine()
    observe(estimate, engine, 100, 1000, 200)
    assert estimate.token_s == pytest.approx(TOKEN_S)
    assert estimate.pair_s == pytest.approx(PAIR_S)
    for length in (10, 500, 4000):
        ahead = PromptWork.of(length) + PromptWork.of(300, 200)
        assert estimate.seconds(ahead) == pytest.approx(engine.seconds_for(ahead), rel=1e-6)


def test_prompts_of_one_length_do_not_pretend_to_know_more() -> None:
    estimate, engine = LatencyEstimate(), Engine()
    rng = random.Random(0)
    for _ in range(50):
        observe(estimate, engine, 500, slower=rng.uniform(0.9, 1.1))
    expected = engine.seconds_for(PromptWork.of(500))
    assert estimate.seconds(PromptWork.of(500)) == pytest.approx(expected, rel=0.1)
    assert estimate.seconds(PromptWork.of(10)) == pytest.approx(10 / 500 * expected, rel=0.1)


def test_no_coefficient_is_below_zero() -> None:
    """Long prompts that are quicker for each token than short ones, as where a step costs something by itself."""
    estimate = LatencyEstimate()
    work = Work()
    for number in range(1, 20):
        length = 100 if number % 2 else 1000
        done = PromptWork.of(length)
        work = Work(
            prefill_tokens=work.prefill_tokens + done.tokens,
            prefill_pairs=work.prefill_pairs + done.pairs,
            prefill_s=work.prefill_s + 0.5 + 1e-3 * length,
        )
        estimate.observe(work)
    assert min(estimate.token_s, estimate.pair_s) >= 0
    seconds = [estimate.seconds(PromptWork.of(length)) for length in range(1, 5000, 100)]
    assert all(0 < shorter < longer for shorter, longer in itertools.pairwise(seconds))


def test_what_was_observed_counts_once() -> None:
    estimate, engine = LatencyEstimate(), Engine(pair_s=0.0)
    observe(estimate, engine, 100)
    engine.token_s *= 3
    observe(estimate, engine, 100)
    first = estimate.seconds(PromptWork.of(100))
    assert 100 * TOKEN_S < first < 300 * TOKEN_S
    for _ in range(4):
        estimate.observe(engine.work)
        assert estimate.seconds(PromptWork.of(100)) == first


def test_it_follows_a_change_of_speed() -> None:
    estimate, engine = LatencyEstimate(), Engine()
    for slower in (10.0, 1.0):
        observe(estimate, engine, *[100, 900] * 100, slower=slower)
    expected = engine.seconds_for(PromptWork.of(700))
    assert estimate.seconds(PromptWork.of(700)) == pytest.approx(expected, rel=0.01)


def test_a_slow_phase_is_forgotten_even_where_little_is_computed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt every five seconds, as where nearly all go elsewhere."""
    now = 0.0
    monkeypatch.setattr(latency_estimate, "time", SimpleNamespace(monotonic=lambda: now))
    estimate, engine = LatencyEstimate(), Engine(pair_s=0.0)
    observe(estimate, engine, *[500] * 20, slower=10.0)
    for _ in range(12):
        now += 5.0
        observe(estimate, engine, 100)
    assert estimate.seconds(PromptWork.of(100)) < 2 * 100 * TOKEN_S
