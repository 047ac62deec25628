from hypothesis import given
from hypothesis import strategies as st

from shared.engine.scheduler import schedule
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams


def sequence_with(request_id: str, num_tokens: int, num_computed_tokens: int = 0) -> Sequence:
    sampling = SamplingParams(max_tokens=4)
    return Sequence(request_id, [0] * num_tokens, num_tokens, [], sampling, 4, num_computed_tokens)


def test_decodes_come_first_and_prefills_in_order_of_arrival() -> None:
    first, second = sequence_with("first", 30), sequence_with("second", 30)
    third, decode = sequence_with("third", 30), sequence_with("decode", 9, 8)
    plan = schedule([first, second, third, decode], 41)
    assert plan.decodes == [decode]
    assert [(chunk.sequence, chunk.num_tokens) for chunk in plan.prefills] == [(first, 30), (second, 10)]


def test_decodes_are_never_held_back() -> None:
    decodes = [sequence_with(str(number), 5, 4) for number in range(6)]
    plan = schedule([sequence_with("prompt", 10), *decodes], 4)
    assert plan.decodes == decodes
    assert plan.prefills == []


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 49)), min_size=1, max_size=20), st.integers(1, 64))
def test_a_step_fills_its_budget_and_no_more(sizes: list[tuple[int, int]], budget: int) -> None:
    sequences = [sequence_with(str(i), size, min(done, size - 1)) for i, (size, done) in enumerate(sizes)]
    plan = schedule(sequences, budget)
    wanted = sum(sequence.num_uncomputed_tokens for sequence in sequences)
    assert plan.num_tokens == max(len(plan.decodes), min(wanted, budget))
    assert all(chunk.num_tokens > 0 for chunk in plan.prefills)
