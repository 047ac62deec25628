"""Greedy decoding in fp32 gives, token by token, what transformers' own `generate` gives."""

import pytest

from shared.sampling import SamplingParams

from .models import Served, ids, prompt_of, run, sequence_of

LENGTHS = (1, 2, 15, 16, 17, 100, 600, 2000)
NUM_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)


def lengths_for(served: Served) -> list[int]:
    longest = served.loaded.max_position_embeddings - NUM_TOKENS
    return [length for length in LENGTHS if length <= longest]


@pytest.fixture(scope="module")
def expected(served: Served) -> dict[int, list[int]]:
    return {length: served.greedy(prompt_of(length), NUM_TOKENS) for length in lengths_for(served)}


def test_alone(served: Served, expected: dict[int, list[int]]) -> None:
    for length, tokens in expected.items():
        engine = served.engine()
        engine.add(sequence_of(engine, prompt_of(length), GREEDY))
        assert ids(run(engine)["r"]) == tokens, f"prompt of {length}"


@pytest.mark.parametrize("max_step_tokens", [7, 64])
def test_in_chunks(served: Served, expected: dict[int, list[int]], max_step_tokens: int) -> None:
    for length in (17, 100, 600):
        if length in expected:
            engine = served.engine(max_step_tokens=max_step_tokens)
            engine.add(sequence_of(engine, prompt_of(length), GREEDY))
            assert ids(run(engine)["r"]) == expected[length], f"prompt of {length}"


def test_32_mixed(served: Served, expected: dict[int, list[int]]) -> None:
    engine = served.engine(max_step_tokens=300)
    lengths = [length for length in expected if length <= 600]
    wanted: dict[str, list[int]] = {}
    first_block = 0
    for number in range(32):
        length = lengths[number % len(lengths)]
        sequence = sequence_of(
            engine, prompt_of(length), GREEDY, request_id=str(number), first_block=first_block
        )
        first_block += len(sequence.blocks)
        wanted[str(number)] = expected[length]
        engine.add(sequence)
        if number % 5 == 0:
            engine.step()
    engine.add(sequence_of(engine, prompt_of(5), GREEDY, request_id="late", first_block=first_block))
    finished = {request: [token.token_id for token in tokens] for request, tokens in run(engine).items()}
    for request, tokens in wanted.items():
        # some came out in the steps above
        assert tokens[len(tokens) - len(finished[request]) :] == finished[request]
    assert finished["late"] == served.greedy(prompt_of(5), NUM_TOKENS)


def test_prefill_here_decode_there(served: Served, expected: dict[int, list[int]]) -> None:
    for length, tokens in expected.items():
        here, there = served.engine(), served.engine()
        prefill = sequence_of(here, prompt_of(length), GREEDY, num_to_generate=1, first_block=3)
        here.add(prefill)
        (first,) = run(here)["r"]
        assert first.last
        assert first.finish_reason is None

        decode = sequence_of(
            there, prompt_of(length), GREEDY, generated=(first.token_id,), num_computed_tokens=length, first_block=100
        )
        decode.blocks.reverse()
        decode.__post_init__()
        num_blocks = there.pool.layout.num_blocks(length)
        num_bytes = num_blocks * there.pool.layout.block_bytes
        sent = b"".join(here.pool.byte_views(prefill.blocks[:num_blocks], num_bytes))
        assert len(sent) == num_bytes
        for view in there.pool.byte_views(decode.blocks[:num_blocks], num_bytes):
            view[:] = sent[: len(view)]
            sent = sent[len(view) :]
        there.add(decode)
        assert [first.token_id, *ids(run(there)["r"])] == tokens, f"prompt of {length}"
