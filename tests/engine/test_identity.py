"""Greedy decoding in fp32 gives, token by token, what transformers' own `generate` gives."""

import pytest
import torch

from shared.sampling import SamplingParams

from .conftest import serve
from .models import WINDOW, Served, ids, prompt_of, run, sequence_of

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
    engine = served.engine(num_blocks=1200, max_step_tokens=300)
    lengths = [length for length in expected if length <= 600]
    wanted: dict[str, list[int]] = {}
    generated: dict[str, list[int]] = {}
    first_block = 0
    while engine.has_work or len(wanted) < 32:
        if len(wanted) < 32:
            length, request_id = lengths[len(wanted) % len(lengths)], str(len(wanted))
            sequence = sequence_of(engine, prompt_of(length), GREEDY, request_id=request_id, first_block=first_block)
            first_block += len(sequence.blocks)
            wanted[request_id] = expected[length]
            engine.add(sequence)
        # 20 at once, then one more per step
        if len(wanted) >= 20:
            for token in engine.step():
                generated.setdefault(token.request_id, []).append(token.token_id)
    assert generated == wanted


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


@pytest.mark.parametrize("num_decodes", [0, 1])
@pytest.mark.parametrize("length", [WINDOW, WINDOW + 1, WINDOW + 2, 3 * WINDOW])
def test_the_window_is_that_of_transformers(folders: dict[str, str], length: int, num_decodes: int) -> None:
    """One position more or less in the window would change the logits, at the end of a prompt as in a decode."""
    served = serve(folders["mistral"])
    engine = served.engine()
    sampling = SamplingParams(max_tokens=num_decodes + 1, temperature=0.0, logprobs=0)
    engine.add(sequence_of(engine, prompt_of(length), sampling))
    tokens = run(engine)["r"]
    with torch.inference_mode():
        row = served.plain(torch.tensor([prompt_of(length) + ids(tokens[:-1])])).logits[0, -1].log_softmax(-1)
    assert tokens[-1].logprob == pytest.approx(float(row.max()), abs=1e-5)
