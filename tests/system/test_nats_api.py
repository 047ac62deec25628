"""The request API on NATS: what HTTP gives, in one unbroken series of messages with one end; and what it refuses."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.harness import TIMEOUT_S, System
from tests.system.client import Json, NatsClient, greedy, nats_client, next_message, post, prompt_of, token_ids

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture
async def client(system: System) -> AsyncIterator[NatsClient]:
    async with nats_client(system.nats_url) as client:
        yield client


def text_of(messages: list[Json]) -> str:
    return "".join(str(message["text"]) for message in messages[:-1])


def token_ids_of(messages: list[Json]) -> list[int]:
    return [token_id for message in messages[:-1] for token_id in message["token_ids"]]  # type: ignore[attr-defined]


async def over_http(system: System, path: str, body: Json) -> Json:
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as http:
        response = await http.post(f"{system.url}/v1/{path}", json={"model": "demo", "return_token_ids": True, **body})
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 40, "temperature": 0},
        {"max_tokens": 40, "seed": 7, "temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"max_tokens": 40, "seed": 7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"max_tokens": 60, "temperature": 0, "stop": ["e", "\n\n"], "min_tokens": 5},
        {"max_tokens": 10, "temperature": 0, "logit_bias": {"100": 100}},
        {"max_tokens": 10, "temperature": 0, "stop_token_ids": [100], "logit_bias": {"100": 100}},
    ],
)
@pytest.mark.parametrize("prompt", ["import os\n", prompt_of(30)], ids=["text", "ids"])
async def test_the_same_as_over_http(system: System, client: NatsClient, prompt: str | list[int], fields: Json) -> None:
    expected = (await over_http(system, "completions", {"prompt": prompt, **fields}))["choices"][0]  # type: ignore[index]
    name = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    messages = await client.answer({name: prompt, **fields})
    end = messages[-1]
    assert (end["type"], end["finish_reason"]) == ("done", expected["finish_reason"])
    assert text_of(messages) == expected["text"]
    assert token_ids_of(messages) == expected["token_ids"]


async def test_a_chat(system: System, client: NatsClient) -> None:
    body: Json = {"messages": QUESTION, "max_tokens": 50, "temperature": 0}
    expected = await over_http(system, "chat/completions", body)
    messages = await client.answer({**body, "model": "demo", "id": "a-chat"})
    assert {message["id"] for message in messages} == {"a-chat"}
    assert text_of(messages) == expected["choices"][0]["message"]["content"]  # type: ignore[index]
    usage, expected_usage = messages[-1]["usage"], expected["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == expected_usage[name]  # type: ignore[index]


async def test_logprobs(client: NatsClient) -> None:
    messages = await client.answer({"prompt": "import", "max_tokens": 4, "temperature": 0, "logprobs": 3})
    found = [one for message in messages[:-1] for one in message["logprobs"]]  # type: ignore[attr-defined]
    assert len(found) == 4
    for chosen, logprobs in zip(token_ids_of(messages), found, strict=True):
        assert [logprobs["top"][0]["token_id"], logprobs["top"][0]["logprob"]] == [chosen, logprobs["logprob"]]
        assert len(logprobs["top"]) == 3


async def test_many_at_once(system: System, client: NatsClient) -> None:
    prompts = [prompt_of(length) for length in (1, 17, 100, 300)]
    expected = [token_ids(await asyncio.to_thread(post, system.url, greedy(prompt, 30))) for prompt in prompts]
    fields = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
    answers = await asyncio.gather(*(client.answer({"prompt_token_ids": prompt, **fields}) for prompt in prompts * 8))
    assert [token_ids_of(answer) for answer in answers] == expected * 8


BAD: dict[str, tuple[Json | bytes, str, str | None, str]] = {
    "no JSON": (b"{", "invalid_request", None, "JSON"),
    "nothing": (b"", "invalid_request", None, "JSON"),
    "no object": (b"[1]", "invalid_request", None, "object"),
    "no UTF-8": (b'{"prompt": "\xff"}', "invalid_request", None, "JSON"),
    "half a surrogate": (b'{"prompt": "\\ud800"}', "invalid_request", None, "JSON"),
    "unknown field": ({"prompt": "x", "max_token": 1}, "invalid_request", "max_token", "max_token"),
    "no prompt": ({"max_tokens": 1}, "invalid_request", None, "prompt, prompt_token_ids and messages"),
    "two prompts": ({"prompt": "x", "prompt_token_ids": [1]}, "invalid_request", None, "exactly one"),
    "three prompts": (
        {"prompt": "x", "prompt_token_ids": [1], "messages": QUESTION},
        "invalid_request",
        None,
        "exactly one",
    ),
    "empty prompt": ({"prompt": ""}, "invalid_request", "prompt", "at least one token"),
    "empty tokens": ({"prompt_token_ids": []}, "invalid_request", "prompt_token_ids", "at least one token"),
    "no messages": ({"messages": []}, "invalid_request", "messages", "messages"),
    "number as prompt": ({"prompt": 5}, "invalid_request", "prompt", "string"),
    "text as tokens": ({"prompt_token_ids": ["a"]}, "invalid_request", "prompt_token_ids.0", "integer"),
    "unknown token": ({"prompt_token_ids": [4096]}, "invalid_request", "prompt_token_ids", "0 to 4095"),
    "negative token": ({"prompt_token_ids": [-1]}, "invalid_request", "prompt_token_ids", "0 to 4095"),
    "no role": ({"messages": [{"content": "x"}]}, "invalid_request", "messages.0.role", "required"),
    "max_tokens 0": ({"prompt": "x", "max_tokens": 0}, "invalid_request", "max_tokens", "greater than or equal to 1"),
    "max_tokens text": ({"prompt": "x", "max_tokens": "many"}, "invalid_request", "max_tokens", "integer"),
    "min over max": ({"prompt": "x", "max_tokens": 2, "min_tokens": 3}, "invalid_request", "min_tokens", "lower"),
    "temperature 3": ({"prompt": "x", "temperature": 3}, "invalid_request", "temperature", "less than or equal to 2"),
    "temperature NaN": (b'{"prompt": "x", "temperature": NaN}', "invalid_request", "temperature", "finite"),
    "top_p 0": ({"prompt": "x", "top_p": 0}, "invalid_request", "top_p", "greater than 0"),
    "logprobs 21": ({"prompt": "x", "logprobs": 21}, "invalid_request", "logprobs", "less than or equal to 20"),
    "bias of nothing": ({"prompt": "x", "logit_bias": {"9999": 1}}, "invalid_request", "logit_bias", "0 to 4095"),
    "empty stop": ({"prompt": "x", "stop": ["a", ""]}, "invalid_request", "stop", "1 to 1024 characters"),
    "bias of no id": ({"prompt": "x", "logit_bias": {"x": 1}}, "invalid_request", "logit_bias", "not a token id"),
    "timeout 0": ({"prompt": "x", "timeout_s": 0}, "invalid_request", "timeout_s", "over 0"),
    "timeout below 0": ({"prompt": "x", "timeout_s": -1.5}, "invalid_request", "timeout_s", "over 0"),
    "id with a dot": ({"prompt": "x", "id": "a.b"}, "invalid_request", "id", "id"),
    "empty id": ({"prompt": "x", "id": ""}, "invalid_request", "id", "id"),
    "other version": ({"prompt": "x", "v": 2}, "invalid_request", "v", "1"),
    "prompt over the context": ({"prompt": "word " * 20_000}, "context_length_exceeded", None, "shorten"),
    "tokens over the context": (
        {"prompt_token_ids": [1] * 4096},
        "context_length_exceeded",
        "prompt_token_ids",
        "shorten",
    ),
    "answer over the context": ({"prompt": "x", "max_tokens": 4096}, "context_length_exceeded", "max_tokens", "lower"),
    "other model": ({"prompt": "x", "model": "gpt-4"}, "model_not_found", "model", "`demo`"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_is_told_what_to_do(client: NatsClient, name: str) -> None:
    request, code, param, hint = BAD[name]
    [message] = await client.answer(request)
    error = message["error"]
    assert (message["type"], error["code"]) == ("error", code), error  # type: ignore[index]
    assert param is None or error["param"] == param, error  # type: ignore[index]
    assert hint in error["message"], error  # type: ignore[index]


async def test_an_id_that_is_in_use(system: System, client: NatsClient) -> None:
    endless: Json = {"id": "taken", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    first = await client.send(endless)
    assert (await next_message(first))["type"] == "chunk"
    await client.connection.publish("pdserve.v1.generate", json.dumps(endless).encode(), reply=first.subject)
    while (rejected := await next_message(first))["type"] == "chunk":
        pass
    assert rejected["error"]["code"] == "invalid_request"  # type: ignore[index]
    assert rejected["error"]["param"] == "id"  # type: ignore[index]
    other = await client.answer({**endless, "max_tokens": 3})
    assert other[-1]["type"] == "done", "ids of another inbox do not matter"
    await client.connection.publish("pdserve.v1.cancel", b'{"id": "taken"}')
    await client.connection.publish("pdserve.v1.cancel", b'{"id": "taken", "inbox": "_INBOX.another"}')
    assert (await client.answer({"prompt": "x", "max_tokens": 3}))[-1]["type"] == "done"
    assert (await next_message(first))["type"] == "chunk", "only its own client can cancel it"
    cancel = {"id": "taken", "inbox": first.subject}
    await client.connection.publish("pdserve.v1.cancel", json.dumps(cancel).encode())
    while (message := await next_message(first))["type"] == "chunk":
        pass
    assert message["error"]["code"] == "cancelled"  # type: ignore[index]
    again = await client.answer({**endless, "max_tokens": 3})
    assert again[-1]["type"] == "done", "an id can be used again after its request"


async def test_cancelled_as_soon_as_sent(system: System, client: NatsClient) -> None:
    """Wherever the request is by then, and be it nowhere yet: it ends, and its id is free again."""
    answers = []
    for number in range(50):
        name = f"brief-{number}"
        request = {"id": name, "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
        answers.append(await client.send(request))
        cancel = {"id": name, "inbox": answers[-1].subject}
        await client.connection.publish("pdserve.v1.cancel", json.dumps(cancel).encode())
    for answer in answers:
        while (message := await next_message(answer))["type"] == "chunk":
            pass
        assert message["type"] == "done" or message["error"]["code"] == "cancelled"  # type: ignore[index]
    await asyncio.to_thread(system.wait_until_nothing_is_held)
    messages = await client.answer({"id": "brief-0", "prompt": "x", "max_tokens": 2})
    assert messages[-1]["type"] == "done"
    assert all(answer.pending_msgs == 0 for answer in answers), "something follows a terminal message"


async def test_a_request_has_its_own_deadline(system: System, client: NatsClient) -> None:
    messages = await client.answer({"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "timeout_s": 0.7})
    assert messages[-1]["error"]["code"] == "deadline_exceeded"  # type: ignore[index]
    await asyncio.to_thread(system.wait_until_nothing_is_held)


async def test_the_example(system: System) -> None:
    command = [sys.executable, str(ROOT / "examples" / "nats_client.py"), system.nats_url, "What does os.path.join do?"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("tokens]"), done.stdout
    assert len(done.stdout.splitlines()[0]) > 0
