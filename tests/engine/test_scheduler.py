from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from shared.engine.scheduler import StepPlan, schedule
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams

BLOCK_SIZE = 4


def sequence_with(
    request_id: str, num_tokens: int, num_computed_tokens: int = 0, blocks: Iterable[int] = (), num_shared: int = 0
) -> Sequence:
    """A prompt; or, of which all tokens but one are computed, a prompt and one generated token."""
    is_generated = num_computed_tokens == num_tokens - 1 > 0
    return Sequence(
        request_id,
        [0] * num_tokens,
        num_tokens - is_generated,
        list(blocks),
        SamplingParams(max_tokens=4),
        num_to_generate=4,
        num_computed_tokens=num_computed_tokens,
        num_shared_blocks=num_shared,
    )


def chunks(plan: StepPlan) -> list[tuple[str, int]]:
    return [(chunk.sequence.request_id, chunk.num_tokens) for chunk in plan.prefills]


def test_decodes_come_first_and_prefills_in_order_of_arrival() -> None:
    first, second = sequence_with("first", 30), sequence_with("second", 30)
    third, decode = sequence_with("third", 30), sequence_with("decode", 9, 8)
    plan = schedule([first, second, third, decode], 41, BLOCK_SIZE)
    assert plan.decodes == [decode]
    assert chunks(plan) == [("first", 30), ("second", 10)]


def test_the_last_token_of_a_prompt_is_prefill_even_alone() -> None:
    prompt = sequence_with("prompt", 9)
    prompt.num_computed_tokens = 8
    assert chunks(schedule([prompt], 16, BLOCK_SIZE)) == [("prompt", 1)]


def test_decodes_are_never_held_back() -> None:
    decodes = [sequence_with(str(number), 5, 4) for number in range(6)]
    plan = schedule([sequence_with("prompt", 10), *decodes], 4, BLOCK_SIZE)
    assert plan.decodes == decodes
    assert plan.prefills == []


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 49)), min_size=1, max_size=20), st.integers(1, 64))
def test_a_step_fills_its_budget_and_no_more(sizes: list[tuple[int, int]], budget: int) -> None:
    sequences = [sequence_with(str(i), size, min(done, size - 1)) for i, (size, done) in enumerate(sizes)]
    plan = schedule(sequences, budget, BLOCK_SIZE)
    wanted = sum(sequence.num_uncomputed_tokens for sequence in sequences)
    assert plan.num_tokens == max(len(plan.decodes), min(wanted, budget))
    assert all(chunk.num_tokens > 0 for chunk in plan.prefills)


def test_who_shares_a_block_waits_for_the_earliest_to_fill_it() -> None:
    """Others use the budget that those who wait leave."""
    leader = sequence_with("leader", 12, blocks=[0, 1, 2])
    follower = sequence_with("follower", 10, blocks=[0, 1, 3], num_shared=2)
    third = sequence_with("third", 14, blocks=[0, 1, 3, 4], num_shared=2)
    other = sequence_with("other", 9, blocks=[5, 6, 7])
    assert chunks(schedule([leader, follower, third, other], 100, BLOCK_SIZE)) == [("leader", 12), ("other", 9)]
    assert chunks(schedule([follower, third, other], 100, BLOCK_SIZE)) == [("follower", 10), ("other", 9)]


def test_behind_the_shared_blocks_nobody_waits() -> None:
    leader = sequence_with("leader", 12, 8, blocks=[0, 1, 2])
    follower = sequence_with("follower", 10, 8, blocks=[0, 1, 3], num_shared=2)
    assert chunks(schedule([leader, follower], 100, BLOCK_SIZE)) == [("leader", 4), ("follower", 2)]


def test_who_has_no_part_in_the_step_is_waited_for_all_the_same() -> None:
    first = sequence_with("first", 12, blocks=[7, 8, 9])
    leader = sequence_with("leader", 12, blocks=[0, 1, 2])
    follower = sequence_with("follower", 10, blocks=[0, 1, 3], num_shared=2)
    assert chunks(schedule([first, leader, follower], 13, BLOCK_SIZE)) == [("first", 12), ("leader", 1)]
    assert chunks(schedule([first, leader, follower], 12, BLOCK_SIZE)) == [("first", 12)]


def test_a_shared_block_that_no_earlier_one_fills_is_waited_for_by_nobody() -> None:
    """The one that filled it in part has gone; another that shares it came later."""
    heir = sequence_with("heir", 10, 4, blocks=[0, 1, 3], num_shared=2)
    later = sequence_with("later", 10, 4, blocks=[0, 1, 4], num_shared=2)
    assert chunks(schedule([heir, later], 100, BLOCK_SIZE)) == [("heir", 6)]
