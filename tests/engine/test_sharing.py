"""Sequences that share blocks: each block is computed once, nobody reads one before it is filled, no token changes.

The pool is full of NaN at first, so that what is read unwritten is noticed.
"""

from collections.abc import Sequence as Sized

import pytest

from shared.engine.engine import Engine
from shared.engine.prefix_cache import Allocation, PrefixCache
from shared.engine.sequence import NewToken, Sequence
from shared.sampling import SamplingParams

from .models import Served, ids, prompt_of

NUM_TOKENS = 5
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
PREFIX = prompt_of(70)
PROMPTS = [[*PREFIX, *prompt_of(3 + 7 * number, seed=number)] for number in range(8)]


class Shared:
    """An engine and its prefix cache, as the prefill role has them."""

    def __init__(self, served: Served, *, enabled: bool = True, max_step_tokens: int = 512) -> None:
        self.engine: Engine = served.engine(max_step_tokens=max_step_tokens)
        self.cache = PrefixCache(800, self.engine.pool.layout.block_size, enabled=enabled)
        self.held: dict[str, tuple[Sequence, Allocation]] = {}
        self.tokens: dict[str, list[NewToken]] = {}

    def add(self, request_id: str, prompt: list[int]) -> Sequence:
        num_blocks = self.engine.pool.layout.num_blocks(len(prompt) + NUM_TOKENS - 1)
        allocation = self.cache.take(self.cache.match(prompt, pending=True), num_blocks)
        assert allocation is not None
        self.cache.name(allocation, prompt)
        sequence = Sequence(
            request_id,
            list(prompt),
            len(prompt),
            list(allocation.blocks),
            GREEDY,
            num_to_generate=NUM_TOKENS,
            num_shared_blocks=allocation.num_matched,
        )
        self.held[request_id] = (sequence, allocation)
        self.engine.add(sequence)
        return sequence

    def step(self) -> None:
        for token in self.engine.step():
            self.tokens.setdefault(token.request_id, []).append(token)
            if token.last:
                self.release(token.request_id)

    def cancel(self, request_id: str) -> None:
        assert self.engine.remove(request_id)
        self.release(request_id)
        self.tokens.pop(request_id, None)

    def release(self, request_id: str) -> None:
        sequence, allocation = self.held.pop(request_id)
        self.cache.release(allocation, sequence.token_ids[: sequence.num_computed_tokens])

    def run(self) -> dict[str, list[int]]:
        while self.engine.has_work:
            self.step()
        assert self.cache.num_free == 800
        return {request_id: ids(tokens) for request_id, tokens in self.tokens.items()}


@pytest.fixture(scope="module")
def expected(llama_served: Served) -> list[list[int]]:
    return [llama_served.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]


def answers(expected: list[list[int]], numbers: Sized[int]) -> dict[str, list[int]]:
    return {str(number): expected[number] for number in numbers}


@pytest.mark.parametrize("max_step_tokens", [1000, 50, 16])
def test_at_once_one_computes_the_prefix_for_all(
    llama_served: Served, expected: list[list[int]], max_step_tokens: int
) -> None:
    shared = Shared(llama_served, max_step_tokens=max_step_tokens)
    sequences = [shared.add(str(number), prompt) for number, prompt in enumerate(PROMPTS)]
    assert shared.run() == answers(expected, range(8))
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, *[64] * 7]


def test_one_after_another(llama_served: Served, expected: list[list[int]]) -> None:
    shared = Shared(llama_served)
    for number, prompt in enumerate(PROMPTS):
        sequence = shared.add(str(number), prompt)
        shared.run()
        assert sequence.num_cached_tokens == (64 if number else 0)
    assert shared.run() == answers(expected, range(8))


def test_a_request_that_comes_again(llama_served: Served, expected: list[list[int]]) -> None:
    """All but its last block is there, and the tokens generated before are, too, where they are part of the prompt."""
    shared = Shared(llama_served)
    shared.add("0", PROMPTS[0])
    first = shared.run()["0"]
    again = shared.add("again", PROMPTS[0])
    further = shared.add("further", [*PROMPTS[0], *first])
    shared.run()
    assert ids(shared.tokens["again"]) == first
    assert again.num_cached_tokens == (len(PROMPTS[0]) - 1) // 16 * 16
    assert further.num_cached_tokens == (len(PROMPTS[0]) + NUM_TOKENS - 1) // 16 * 16
    assert ids(shared.tokens["further"]) == llama_served.greedy([*PROMPTS[0], *first], NUM_TOKENS)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 5])
def test_the_leader_is_cancelled_and_the_next_goes_on(
    llama_served: Served, expected: list[list[int]], num_steps: int
) -> None:
    """In the middle of a block, at its end, or before anything: what is not filled is computed by the next."""
    shared = Shared(llama_served, max_step_tokens=20)
    sequences = [shared.add(str(number), prompt) for number, prompt in enumerate(PROMPTS)]
    for _ in range(num_steps):
        shared.step()
    shared.cancel("0")
    shared.add("late", PROMPTS[0])
    tokens = shared.run()
    assert tokens.pop("late") == expected[0]
    assert tokens == answers(expected, range(1, 8))
    num_filled = min(64, 20 * num_steps // 16 * 16)
    assert [sequence.num_cached_tokens for sequence in sequences[1:]] == [num_filled, *[64] * 6]


def test_all_leaders_are_cancelled_one_after_another(llama_served: Served, expected: list[list[int]]) -> None:
    shared = Shared(llama_served, max_step_tokens=20)
    for number, prompt in enumerate(PROMPTS):
        shared.add(str(number), prompt)
    for number in range(7):
        shared.step()
        shared.cancel(str(number))
    assert shared.run() == answers(expected, [7])


def test_a_block_that_changes_hands_is_not_taken_for_filled(llama_served: Served, expected: list[list[int]]) -> None:
    """Its content was evicted; who shares it with its new owner waits until that one has filled it."""
    shared = Shared(llama_served, max_step_tokens=20)
    shared.add("0", PROMPTS[0])
    shared.run()
    everything = shared.cache.take(shared.cache.match([0]), 800)
    assert everything is not None
    shared.cache.release(everything, [])
    assert shared.cache.num_cached == 0
    shared.add("1", PROMPTS[1])
    follower = shared.add("2", PROMPTS[2])
    shared.step()
    assert follower.num_computed_tokens <= 20
    assert shared.run() == answers(expected, [0, 1, 2])


def test_disabled_each_computes_all(llama_served: Served, expected: list[list[int]]) -> None:
    shared = Shared(llama_served, enabled=False)
    sequences = [shared.add(str(number), prompt) for number, prompt in enumerate(PROMPTS)]
    assert shared.run() == answers(expected, range(8))
    assert not any(sequence.num_cached_tokens for sequence in sequences)


def test_a_shared_prefix_takes_the_steps_of_one_prompt(llama_served: Served) -> None:
    """Prefill of 8 requests with 512 tokens in common: 4 times less to compute at least."""
    prefix = prompt_of(512)
    num_tokens = {}
    for enabled in (True, False):
        shared = Shared(llama_served, enabled=enabled)
        sequences = [shared.add(str(number), [*prefix, *prompt_of(16, seed=number)]) for number in range(8)]
        shared.run()
        num_tokens[enabled] = sum(one.num_prompt_tokens - one.num_cached_tokens for one in sequences)
    assert num_tokens[False] >= 4 * num_tokens[True]
