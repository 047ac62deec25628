"""Every kind of bad request: the status, the field at fault, and that the sentence says what is wrong."""

import threading
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from services.gateway.api import ApiContext
from services.gateway.openai import handler
from services.gateway.openai.schemas import parse_request
from shared.telemetry.gateway_metrics import GatewayMetrics
from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.conftest import MODEL, serving
from tests.gateway.openai.fake_core import FakeCore

pytestmark = pytest.mark.asyncio(loop_scope="module")
CORE = FakeCore()

IMAGE = [{"type": "image_url", "image_url": {"url": "http://x"}}]

BAD_COMPLETIONS = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "empty"),
    ({"prompt": [1, "a"]}, "prompt", "must be a string"),
    ({"prompt": [4096]}, "prompt", "0 to 4095"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": ["a"] * 129}, "prompt", "129"),
    ({"prompt": [7] * 4096}, "prompt", "4096 tokens, but the prompt has 4096"),
    ({"prompt": [7] * 4000, "max_tokens": 100}, "max_tokens", "4000 and max_tokens is 100, together 4100"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, but it is 0"),
    ({"max_tokens": "many"}, "max_tokens", "valid integer, but it is 'many'"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", "max_tokens is 4"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number, but it is 'hot'"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -2}, "top_k", "greater than or equal to 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"stop": ""}, "stop", "empty string"),
    ({"stop": ["a", ""]}, "stop", "empty string"),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"stop": 3}, "stop", "string"),
    ({"logit_bias": {"5000": 1}}, "logit_bias", "0 to 4095"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ({"stop_token_ids": [9999]}, "stop_token_ids", "9999"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only for streams"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown"),
    ({"echo": True}, "echo", "not repeated"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "must equal `n`"),
    ({"temprature": 1}, "temprature", "unknown"),
    ({"model": 3}, "model", "valid string"),
]

BAD_CHATS = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "Hi"}, "messages", "valid list"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    ({"messages": [{"role": "boss", "content": "Hi"}]}, "messages.0.role", "'system'"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content", "image_url"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "list of text parts"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.x", "unknown"),
    ({"messages": [{"role": "user", "content": "fox " * 5000}]}, "messages", "context is 4096 tokens"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "list of text parts"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages.0.tool_calls", "empty"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning": "b"}]}, "messages.0.reasoning", "empty"),
    ({"messages": [{"role": "user", "content": "a"}] * 10_001}, "messages", "10000 messages at most, and has 10001"),
    ({"max_tokens": 0}, "max_tokens", "but it is 0"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "but it is 0"),
    ({"max_tokens": 5000}, "max_tokens", "together 50"),
    ({"top_logprobs": 3}, "top_logprobs", "needs `logprobs`"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"tools": [{"type": "function"}]}, "tools", "describe them in the prompt"),
    ({"response_format": {"type": "json_object"}}, "response_format", "ask for the format"),
    ({"modalities": ["audio"]}, "modalities", "only"),
    ({"audio": {"voice": "x"}}, "audio", "only text"),
    ({"prompt": "Hi"}, "prompt", "unknown"),
]


@pytest.fixture
def core() -> FakeCore:
    """The core of the one server of this module, as good as new."""
    CORE.calls.clear()
    CORE.context = FakeCore.context
    return CORE


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tokenizer: Tokenizer) -> AsyncIterator[int]:
    api = ApiContext(core=CORE, tokenizer=tokenizer, served_model_name=MODEL, metrics=GatewayMetrics())
    async with serving(api) as port:
        yield port


@pytest_asyncio.fixture(loop_scope="module")
async def http(port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def client(port: int) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
        yield client


async def rejection(client: httpx.AsyncClient, path: str, body: object) -> dict[str, str]:
    response = await client.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "param", "says"), BAD_COMPLETIONS)
async def test_bad_completions(
    http: httpx.AsyncClient, core: FakeCore, change: dict[str, object], param: str, says: str, stream: bool
) -> None:
    if "stream_options" in change and stream:
        return
    error = await rejection(http, "/v1/completions", {"model": MODEL, "prompt": "Hi", "stream": stream, **change})
    assert error["param"] == param
    assert says in error["message"]
    assert core.calls == []


@pytest.mark.parametrize(("change", "param", "says"), BAD_CHATS)
async def test_bad_chats(
    http: httpx.AsyncClient, core: FakeCore, change: dict[str, object], param: str, says: str
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    error = await rejection(http, "/v1/chat/completions", {"model": MODEL, "messages": messages, **change})
    assert error["param"] == param
    assert says in error["message"]
    assert core.calls == []


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ({"tool_calls": []}, {}),
        ({"tool_calls": None, "function_call": None}, {}),
        ({"reasoning_content": None}, {}),
        ({"reasoning_content": "", "reasoning": ""}, {}),
        ({"annotations": [], "audio": None, "refusal": None}, {}),
        ({"a_field_of_another_server": {}}, {}),
        ({"content": None}, {}),
        ({"name": None}, {}),
        ({}, {"top_logprobs": 0}),
        ({}, {"logprobs": False, "top_logprobs": 0}),
    ],
)
async def test_histories_of_other_servers_are_accepted(
    http: httpx.AsyncClient, core: FakeCore, message: dict[str, object], fields: dict[str, object]
) -> None:
    user = {"role": "user", "content": "Hi"}
    history = [user, {"role": "assistant", "content": "Hello", **message}, user]
    response = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": history, **fields})
    assert response.status_code == 200, response.text
    without = [user, {"role": "assistant", "content": "" if "content" in message else "Hello"}, user]
    await http.post("/v1/chat/completions", json={"model": MODEL, "messages": without})
    assert core.calls[0].prompt_token_ids == core.calls[1].prompt_token_ids


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "demo",}', "trailing comma at line 1 column 18"),
        (b'{"model": "d\xff"}', "line 1 column 13"),
        (b'{"prompt": "\\ud800"}', "line 1 column"),
        (b"", "line 1 column 0"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": NaN}', "line 1 column 11"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "out of range"),
        (b"[" * 100_000, "recursion limit"),
    ],
)
async def test_bodies_that_are_no_json_object(http: httpx.AsyncClient, body: bytes, says: str) -> None:
    response = await http.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


async def test_a_large_bad_body_is_rejected_fast(http: httpx.AsyncClient) -> None:
    unknown = {f"field{number}": 1 for number in range(300_000)}
    for body in [{"messages": [1] * 1_000_000}, unknown, {"messages": [unknown]}, {"metadata": unknown, "messages": 1}]:
        response = await http.post("/v1/chat/completions", json={"model": MODEL, **body}, timeout=2)
        assert response.status_code == 400
        assert len(response.content) < 1000


async def test_a_large_body_is_parsed_in_a_thread(
    http: httpx.AsyncClient, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def parse(*args: object) -> object:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse_request(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(handler, "parse_request", parse)
    for size in (1000, 300_000):
        body = {"model": MODEL, "prompt": "Hi", "user": "x" * size}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert threads == [True, False]


async def test_a_context_that_is_too_small_has_its_own_code(client: AsyncOpenAI, core: FakeCore) -> None:
    core.context = 8
    with pytest.raises(BadRequestError, match="8 tokens") as caught:
        await client.completions.create(model=MODEL, prompt=[7] * 9)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError, match="characters") as caught:
        await client.completions.create(model=MODEL, prompt="a" * 100_000)
    assert caught.value.code == "context_length_exceeded"


async def test_the_default_of_max_tokens_is_no_reason_to_reject(client: AsyncOpenAI, core: FakeCore) -> None:
    core.context = 10
    await client.completions.create(model=MODEL, prompt=[7] * 8)
    assert core.calls[0].sampling.max_tokens == 2


async def test_an_unknown_model_is_told_which_is_served(client: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError, match=f"`{MODEL}` is") as caught:
        await client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(NotFoundError):
        await client.models.retrieve("gpt-9")


async def test_an_unknown_path_or_method_is_answered_in_the_same_form(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/embeddings", json={})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "path_not_found")
    response = await http.get("/v1/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
