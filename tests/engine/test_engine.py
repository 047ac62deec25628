import pytest
import torch

from shared.engine.pool import KVPool
from shared.engine.sequence import num_kv_tokens
from shared.sampling import SamplingParams

from .models import VOCAB_SIZE, Served, ids, prompt_of, run, sequence_of


def params(**fields: object) -> SamplingParams:
    return SamplingParams.model_validate({"max_tokens": 12, "seed": 77, **fields})


SAMPLED = params(temperature=0.9, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.4)


def alone(served: Served, prompt: list[int], sampling: SamplingParams) -> list[int]:
    engine = served.engine()
    engine.add(sequence_of(engine, prompt, sampling))
    return ids(run(engine)["r"])


def test_same_seed_same_text_in_a_batch(llama_served: Served) -> None:
    engine = llama_served.engine(max_step_tokens=20)
    for number in range(6):
        sampling = SAMPLED if number == 3 else params(seed=number)
        prompt = prompt_of(40 + number)
        engine.add(sequence_of(engine, prompt, sampling, request_id=str(number), first_block=10 * number))
    assert ids(run(engine)["3"]) == alone(llama_served, prompt_of(43), SAMPLED)


@pytest.mark.parametrize("num_generated", [1, 5, 11])
def test_same_seed_same_text_when_taken_over(llama_served: Served, num_generated: int) -> None:
    whole = alone(llama_served, prompt_of(30), SAMPLED)
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(30), SAMPLED, generated=tuple(whole[:num_generated])))
    tokens = run(engine)["r"]
    assert ids(tokens) == whole[num_generated:]
    assert [token.index for token in tokens] == list(range(num_generated, 12))
    assert tokens[-1].finish_reason == "length"


@pytest.mark.parametrize("sampling", [SAMPLED, params(temperature=0.0)])
def test_logits_that_are_not_finite_fail_their_request_alone(llama_served: Served, sampling: SamplingParams) -> None:
    engine = llama_served.engine()
    damaged = sequence_of(engine, prompt_of(40), sampling, request_id="damaged", num_computed_tokens=32)
    engine.add(damaged)  # nobody has computed the KV of its first 32 tokens, and the pool is full of NaN
    engine.add(sequence_of(engine, prompt_of(43), sampling, request_id="other", first_block=50))
    tokens = run(engine)
    assert "damaged" not in tokens
    assert ids(tokens["other"]) == alone(llama_served, prompt_of(43), sampling)
    (failed,) = engine.take_failed()
    assert failed.request_id == "damaged"
    assert "not finite" in failed.message
    assert engine.take_failed() == []
    assert damaged.num_computed_tokens == 0, "its KV must not be cached"


def test_damaged_weights_fail_every_request(llama_served: Served) -> None:
    engine = llama_served.engine()
    weight = llama_served.loaded.model.get_input_embeddings().weight
    before = weight.detach().clone()
    for number in range(2):
        engine.add(sequence_of(engine, prompt_of(20), params(), request_id=str(number), first_block=50 * number))
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        assert run(engine) == {}
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert {failed.request_id for failed in engine.take_failed()} == {"0", "1"}


def test_other_seed_other_text(llama_served: Served) -> None:
    assert alone(llama_served, prompt_of(30), params()) != alone(llama_served, prompt_of(30), params(seed=78))


def test_stop_token_ends_the_request(llama_served: Served) -> None:
    greedy = alone(llama_served, prompt_of(20), params(temperature=0.0))
    stop = greedy[4]
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(20), params(temperature=0.0, stop_token_ids=(stop,))))
    tokens = run(engine)["r"]
    assert ids(tokens) == greedy[: greedy.index(stop) + 1]
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert (tokens[-1].finish_reason, tokens[-1].last) == ("stop", True)


def test_min_tokens_holds_the_stop_token_back(llama_served: Served) -> None:
    stop = alone(llama_served, prompt_of(20), params(temperature=0.0))[0]
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(20), params(temperature=0.0, min_tokens=4, stop_token_ids=(stop,))))
    assert stop not in ids(run(engine)["r"])[:4]


def test_leaves_after_num_to_generate_unfinished(llama_served: Served) -> None:
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(20), params(), num_to_generate=1))
    (token,) = run(engine)["r"]
    assert (token.index, token.finish_reason, token.last) == (0, None, True)
    assert not engine.has_work


def test_remove(llama_served: Served) -> None:
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(20), params(), request_id="a"))
    engine.add(sequence_of(engine, prompt_of(20), params(), request_id="b", first_block=50))
    engine.step()
    assert engine.remove("a")
    assert not engine.remove("a")
    assert run(engine).keys() == {"b"}


def test_too_few_blocks_are_a_bug(llama_served: Served) -> None:
    engine = llama_served.engine()
    sequence = sequence_of(engine, prompt_of(20), params())
    del sequence.blocks[-1:]
    with pytest.raises(AssertionError):
        engine.add(sequence)


def test_num_kv_tokens() -> None:
    assert num_kv_tokens(20, 20, max_tokens=12, num_to_generate=12) == 31
    assert num_kv_tokens(20, 20, max_tokens=12, num_to_generate=1) == 20
    assert num_kv_tokens(21, 20, max_tokens=12, num_to_generate=12) == 31


def test_logprobs_are_those_of_transformers(llama_served: Served) -> None:
    engine = llama_served.engine()
    prompt = prompt_of(33)
    engine.add(sequence_of(engine, prompt, params(logprobs=3, temperature=0.7, logit_bias={5: 3.0})))
    tokens = run(engine)["r"]
    with torch.inference_mode():
        logits = llama_served.plain(torch.tensor([prompt + ids(tokens)])).logits[0]
    for token, row in zip(tokens, logits[len(prompt) - 1 :].log_softmax(-1), strict=False):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        assert [one for one, _ in token.top] == row.topk(3).indices.tolist()


def test_the_last_block_of_handed_over_kv_may_hold_anything(llama_served: Served) -> None:
    """NaN behind the last token harms neither this request nor the one that is decoded beside it."""
    greedy = params(temperature=0.0)
    wanted = {length: alone(llama_served, prompt_of(length), greedy) for length in (21, 60)}
    engine = llama_served.engine()
    for length, first_block in ((21, 0), (60, 20)):
        prefill = sequence_of(engine, prompt_of(length), greedy, num_to_generate=1, first_block=first_block)
        engine.add(prefill)
        first = run(engine)["r"][0]
        for view in (*engine.pool.keys, *engine.pool.values):
            view[prefill.blocks[-1], length % 16 :] = float("nan")
        wanted[length] = wanted[length][1:]
        engine.add(
            sequence_of(
                engine,
                prompt_of(length),
                greedy,
                request_id=str(length),
                generated=(first.token_id,),
                num_computed_tokens=length,
                first_block=first_block,
            )
        )
        if length == 21:
            held = engine._sequences.pop("21")
    engine.add(held)
    assert {int(request): ids(tokens) for request, tokens in run(engine).items()} == wanted


def test_a_request_with_nan_in_its_kv_harms_no_other(llama_served: Served) -> None:
    greedy = params(temperature=0.0)
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(50), greedy, request_id="sick"))
    engine.add(sequence_of(engine, prompt_of(20), greedy, request_id="well", first_block=30))
    first = {token.request_id: token.token_id for token in engine.step()}
    engine.pool.data[0] = float("nan")
    assert [first["well"], *ids(run(engine)["well"])] == alone(llama_served, prompt_of(20), greedy)


def test_another_layout_is_a_bug(llama_served: Served) -> None:
    layout = llama_served.loaded.layout.model_copy(update={"block_size": 32})
    with pytest.raises(AssertionError):
        type(llama_served.engine())(llama_served.loaded, KVPool(layout, 4), 64)


def test_vocabulary(llama_served: Served) -> None:
    assert llama_served.loaded.vocab_size == VOCAB_SIZE
