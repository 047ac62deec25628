"""The `openai` client, unmodified, against the whole system."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.harness import System

QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture
def client(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_streamed_is_chat_collected(client: OpenAI) -> None:
    wishes = {"model": "demo", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**wishes)  # type: ignore[call-overload]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**wishes, **usage))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_text_logprobs_are_of_the_likeliest(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="A list is", max_tokens=5, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values())


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,  # type: ignore[arg-type]
    )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert [len(item.top_logprobs) for item in content] == [2] * len(content)


def test_n_and_stop(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="A list is", max_tokens=30, n=3, seed=1, stop=[" ", "\n"])
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(" " not in choice.text and "\n" not in choice.text for choice in answer.choices)


def test_the_same_seed_gives_the_same_text_alone_and_among_others(system: System) -> None:
    async def check() -> None:
        async with AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:

            async def text(seed: int) -> str:
                answer = await client.completions.create(
                    model="demo", prompt="The list", max_tokens=40, seed=seed, temperature=0.9, top_p=0.95
                )
                return answer.choices[0].text

            alone = [await text(seed) for seed in range(8)]
            assert await asyncio.gather(*(text(seed) for seed in range(8))) == alone
            assert len(set(alone)) > 1

    asyncio.run(check())


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"model": "gpt-7"}, openai.NotFoundError, "demo"),
        ({"prompt": ""}, openai.BadRequestError, "empty"),
        ({"prompt": [10] * 5000}, openai.BadRequestError, "4096.*5000"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "4096.*100000"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"temperature": "warm"}, openai.BadRequestError, "temperature"),
        ({"prompt": [4096]}, openai.BadRequestError, "4096"),
        ({"extra_body": {"top_k": 2**40}}, openai.BadRequestError, "top_k"),
        ({"extra_body": {"best_off": 2}}, openai.BadRequestError, "best_off"),
        ({"prompt": "x" * 10_000_000}, openai.APIStatusError, "413|large|bytes"),
    ],
)
def test_bad_input_is_a_typed_error_and_costs_nobody_else_anything(
    client: OpenAI, wrong: dict[str, object], kind: type[openai.APIStatusError], words: str
) -> None:
    with pytest.raises(kind, match=f"(?s){words}"):
        client.completions.create(**{"model": "demo", "prompt": "A list is", "max_tokens": 2, **wrong})  # type: ignore[call-overload]
    assert client.completions.create(model="demo", prompt="A list is", max_tokens=2).usage
