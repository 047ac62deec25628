from openai import AsyncOpenAI

from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.conftest import MODEL, ids_of
from tests.gateway.openai.fake_core import FakeCore


async def test_an_answer_in_one_piece(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    core.script = lambda call: list(ids_of(tokenizer, " there was a fox"))
    answer = await client.completions.create(model=MODEL, prompt="Once upon a time")
    assert answer.choices[0].text == " there was a fox"
    assert answer.choices[0].finish_reason == "length"
    [call] = core.calls
    assert call.prompt_token_ids == await tokenizer.encode("Once upon a time")
    assert call.sampling.max_tokens == 16
    assert answer.id == f"cmpl-{call.request_id}"
    assert answer.object == "text_completion"


async def test_every_form_of_prompt(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    one, two = await tokenizer.encode("one"), await tokenizer.encode("two three")
    for prompt, expected in [
        ("one", [one]),
        (["one", "two three"], [one, two]),
        (one, [one]),
        ([one, two], [one, two]),
    ]:
        core.calls.clear()
        answer = await client.completions.create(model=MODEL, prompt=prompt, n=2)
        asked = sorted(core.calls, key=lambda call: int(call.request_id.rpartition("-")[2]))
        assert [call.prompt_token_ids for call in asked] == [ids for ids in expected for _ in range(2)]
        assert [choice.index for choice in answer.choices] == list(range(2 * len(expected)))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, expected))
        assert answer.usage.completion_tokens == 3 * 2 * len(expected)


async def test_cached_tokens_are_those_that_no_choice_of_a_prompt_computed(client: AsyncOpenAI, core: FakeCore) -> None:
    found = {0: 0, 1: 16, 2: 32, 3: 48}
    core.num_cached = lambda call: found[int(call.request_id.rpartition("-")[2])]
    answer = await client.completions.create(model=MODEL, prompt=[[10] * 50, [11] * 60], n=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0 + 32


async def test_a_prompt_among_others_draws_as_alone(client: AsyncOpenAI, core: FakeCore) -> None:
    await client.completions.create(model=MODEL, prompt=["one", "two"], n=2, seed=3)
    seeds = [call.sampling.seed for call in core.calls]
    await client.completions.create(model=MODEL, prompt="two", n=2, seed=3)
    assert seeds[2:] == [call.sampling.seed for call in core.calls[4:]]


async def test_a_stream_gives_the_same_as_one_piece(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    core.script = lambda call: list(ids_of(tokenizer, " there was a 🦔"))
    stream = await client.completions.create(model=MODEL, prompt=["a", "b"], stream=True, max_tokens=50)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [" there was a 🦔"] * 2


async def test_logprobs(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    token_ids = ids_of(tokenizer, "a fox 🦔")
    core.script = lambda call: list(token_ids)
    answer = await client.completions.create(model=MODEL, prompt="x", logprobs=2)
    given = answer.choices[0].logprobs
    assert given is not None
    assert given.tokens is not None
    assert given.tokens[:2] == ["a", " fox"] or "".join(given.tokens).startswith("a fox")
    assert any(token.startswith("bytes:\\x") for token in given.tokens)
    assert given.token_logprobs == [-1.0] * len(token_ids)
    assert given.top_logprobs is not None
    assert all(-1.0 in top.values() for top in given.top_logprobs)
    assert given.text_offset == [sum(map(len, given.tokens[:i])) for i in range(len(token_ids))]
    stream = await client.completions.create(model=MODEL, prompt="x", logprobs=2, stream=True)
    offsets = [offset async for chunk in stream for offset in (chunk.choices[0].logprobs.text_offset or [])]
    assert offsets == given.text_offset


async def test_token_ids_are_returned_as_vllm_does(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    prompts = [await tokenizer.encode("one"), await tokenizer.encode("two")]
    extra = {"return_token_ids": True}
    answer = await client.completions.create(model=MODEL, prompt=["one", "two"], extra_body=extra)
    assert [choice.model_extra for choice in answer.choices] == [
        {"token_ids": [10, 11, 12], "prompt_token_ids": prompt} for prompt in prompts
    ]
    stream = await client.completions.create(model=MODEL, prompt="one", extra_body=extra, stream=True)
    extras = [chunk.choices[0].model_extra async for chunk in stream]
    assert extras == [{"token_ids": [10], "prompt_token_ids": prompts[0]}, {"token_ids": [11]}, {"token_ids": [12]}]
