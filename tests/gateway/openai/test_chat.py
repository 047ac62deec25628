import asyncio
import json

import httpx
from openai import AsyncOpenAI

from services.gateway.api import ApiContext
from services.gateway.openai.app import create_app
from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.conftest import MODEL, ids_of
from tests.gateway.openai.fake_core import FakeCore

USER = [{"role": "user", "content": "Hi"}]


async def test_an_answer_in_one_piece(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    token_ids = ids_of(tokenizer, "Hello 🦔!")
    core.script = lambda call: [*token_ids, tokenizer.eos_token_ids[0]]
    core.num_cached = lambda call: 3
    answer = await client.chat.completions.create(model=MODEL, messages=USER)
    [choice] = answer.choices
    assert choice.message.content == "Hello 🦔!"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    [call] = core.calls
    assert call.prompt_token_ids == await tokenizer.encode_chat(USER)
    assert call.sampling.max_tokens == core.context - len(call.prompt_token_ids)
    assert call.sampling.temperature == 1.0
    assert set(call.sampling.stop_token_ids) == set(tokenizer.eos_token_ids)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(call.prompt_token_ids)
    assert answer.usage.completion_tokens == len(token_ids) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.id == f"chatcmpl-{call.request_id}"
    assert answer._request_id == call.request_id
    assert answer.model == MODEL
    assert answer.object == "chat.completion"


async def test_a_stream_gives_the_same_as_one_piece(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    core.script = lambda call: [*ids_of(tokenizer, "Hello 🦔!"), tokenizer.eos_token_ids[0]]
    core.num_cached = lambda call: 3
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    *texts, last = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in texts[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == "Hello 🦔!"
    assert [chunk.choices[0].finish_reason for chunk in texts][-1] == "stop"
    assert all(chunk.usage is None for chunk in texts)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ids_of(tokenizer, "Hello 🦔!")) + 1
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 3
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1


async def test_tokens_reach_the_client_as_they_come(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    first, *others = ids_of(tokenizer, "Once upon")
    core.script = lambda call: [first, gate, *others]
    stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    chunks = aiter(stream)
    assert (await anext(chunks)).choices[0].delta.content
    assert core.calls[0].num_given == 1
    gate.set()
    assert [chunk async for chunk in chunks][-1].choices[0].finish_reason == "length"


async def test_choices_are_interleaved_and_drawn_by_seeds_of_their_own(
    client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer
) -> None:
    gate = asyncio.Event()
    words = {"0": "one two", "1": "three four", "2": "five six"}
    core.script = lambda call: [
        *ids_of(tokenizer, words[call.request_id[-1]])[:1],
        *([gate] if call.request_id.endswith("-0") else []),
        *ids_of(tokenizer, words[call.request_id[-1]])[1:],
    ]
    stream = await client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7, stream=True)
    texts = ["", "", ""]
    order = []
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        order.append((chunk.choices[0].index, chunk.choices[0].finish_reason))
        if (1, "length") in order and (2, "length") in order:
            gate.set()
    assert texts == list(words.values())
    assert order[-1] == (0, "length")
    seeds = [call.sampling.seed for call in core.calls]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    answer = await client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7)
    assert [call.sampling.seed for call in core.calls[3:]] == seeds
    assert [choice.message.content for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(core.calls[0].prompt_token_ids)
    assert answer.usage.completion_tokens == sum(call.num_given for call in core.calls[3:])


async def test_without_a_seed_every_request_draws_anew(client: AsyncOpenAI, core: FakeCore) -> None:
    for _ in range(2):
        await client.chat.completions.create(model=MODEL, messages=USER)
    assert core.calls[0].sampling.seed != core.calls[1].sampling.seed


async def test_logprobs(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    token_ids = ids_of(tokenizer, "a🦔")
    core.script = lambda call: list(token_ids)
    answer = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == len(token_ids)
    assert b"".join(bytes(item.bytes or []) for item in content).decode() == "a🦔"
    assert [item.logprob for item in content] == [-1.0] * len(token_ids)
    assert [top.logprob for top in content[0].top_logprobs] == [-1.0, -2.0]
    stream = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, stream=True)
    items = [item async for chunk in stream for item in (chunk.choices[0].logprobs.content or [])]
    assert [item.token for item in items] == [item.token for item in content]
    assert items[0].top_logprobs == []


async def test_stop_strings_and_stop_tokens(client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer) -> None:
    core.script = lambda call: list(ids_of(tokenizer, "Once upon a time there was"))
    answer = await client.chat.completions.create(model=MODEL, messages=USER, stop="time th")
    assert answer.choices[0].message.content == "Once upon a "
    assert answer.choices[0].finish_reason == "stop"
    assert core.calls[0].is_closed
    token = ids_of(tokenizer, "Once upon a")[-1]
    answer = await client.chat.completions.create(
        model=MODEL, messages=USER, extra_body={"stop_token_ids": [token], "ignore_eos": True}
    )
    assert core.calls[1].sampling.stop_token_ids == (token,)
    assert answer.choices[0].message.content == "Once upon"


async def test_token_ids_are_returned_as_vllm_does(client: AsyncOpenAI, core: FakeCore) -> None:
    extra = {"return_token_ids": True}
    answer = await client.chat.completions.create(model=MODEL, messages=USER, extra_body=extra)
    [call] = core.calls
    assert answer.model_extra == {"prompt_token_ids": call.prompt_token_ids}
    assert answer.choices[0].model_extra == {"token_ids": [10, 11, 12]}
    stream = await client.chat.completions.create(model=MODEL, messages=USER, extra_body=extra, stream=True)
    first, *others = [chunk async for chunk in stream]
    assert first.model_extra == {"prompt_token_ids": call.prompt_token_ids}
    assert all(chunk.model_extra == {} for chunk in others)
    assert [(chunk.choices[0].model_extra or {})["token_ids"] for chunk in [first, *others]] == [[10], [11], [12]]


async def test_every_sampling_field_arrives(client: AsyncOpenAI, core: FakeCore) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, *USER],
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"17": -100},
        seed=-1,
        user="someone",
        metadata={"any": "thing"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        tools=[],
        response_format={"type": "text"},
        extra_body={"top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 2},
    )
    sampling = core.calls[0].sampling.model_dump(exclude={"stop_token_ids"})
    assert sampling == {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.05,
        "seed": 2**64 - 1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {17: -100.0},
        "logprobs": None,
    }


async def test_the_stream_on_the_wire(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "messages": USER, "stream": True}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["server"].startswith("pdserve/")
    assert len(response.headers["x-request-id"]) == 32
    assert response.text.endswith("data: [DONE]\n\n")


async def test_tokens_that_arrive_together_are_written_together(api: ApiContext, core: FakeCore) -> None:
    """One write per step and stream; more only of what has waited for a slow client."""
    gate = asyncio.Event()
    core.script = lambda call: [10, 11, gate, *[12] * 50]
    written: list[bytes] = []
    body = [json.dumps({"model": MODEL, "messages": USER, "stream": True, "n": 2}).encode()]
    gone = asyncio.Event()

    async def receive() -> dict[str, object]:
        if not body:
            await gone.wait()
        return {"type": "http.request", "body": body.pop(), "more_body": False}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            written.append(message["body"])  # type: ignore[arg-type]
            gate.set()

    headers = [(b"content-length", str(len(body[0])).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    await create_app(api)(scope, receive, send)  # type: ignore[arg-type]
    assert [chunk.count(b"data: ") for chunk in written] == [4, 101]
    assert written[1].endswith(b"data: [DONE]\n\n")


async def test_tokens_after_a_stop_string_are_not_counted(
    client: AsyncOpenAI, core: FakeCore, tokenizer: Tokenizer
) -> None:
    first, *others = ids_of(tokenizer, "Once upon a time there was a fox")
    core.script = lambda call: [first, *others, *[first] * 600, asyncio.Event(), 10]
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stop=" there", stream=True, stream_options={"include_usage": True}, max_tokens=2000
    )
    *texts, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == "Once upon a time"
    assert last.usage is not None
    assert last.usage.completion_tokens < 20
    assert core.calls[0].is_finished
