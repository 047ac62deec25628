"""Clients of the HTTP and NATS APIs that can do what good libraries do not, such as going away at any moment."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import nats
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from shared.addresses import credentials
from shared.bus.connection import inbox_prefix
from tests.harness import TIMEOUT_S

Json = dict[str, object]


def greedy(prompt: str | list[int], num_tokens: int, **more: object) -> Json:
    """A completion of exactly `num_tokens` tokens that is the same every time."""
    return {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def prompt_of(length: int, start: int = 0) -> list[int]:
    """Token ids; equal for equal arguments."""
    return [10 + (start + 37 * number) % 3000 for number in range(length)]


def post(url: str, request: Json) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=request, timeout=TIMEOUT_S, trust_env=False)


def token_ids(response: httpx.Response) -> list[int]:
    """What a completion that was not streamed generated."""
    assert response.status_code == 200, response.text
    generated: list[int] = response.json()["choices"][0]["token_ids"]
    return generated


class Streamed:
    """A streamed completion, as far as it has been read."""

    def __init__(self, lines: Iterator[str], request_id: str) -> None:
        self._lines = lines
        self.request_id = request_id
        self.token_ids: list[int] = []
        self.errors: list[Mapping[str, str]] = []
        self.is_done = False

    def read(self, num_tokens: int | None = None) -> list[int]:
        """Reads on until there are `num_tokens` in all, or to the end."""
        while num_tokens is None or len(self.token_ids) < num_tokens:
            line = next(self._lines, None)
            if line is None:
                assert self.is_done or self.errors, "the stream broke off"
                assert num_tokens is None, f"the stream ended early: {self.errors}"
                break
            if line:
                self._take(line.removeprefix("data: "))
        return self.token_ids

    def _take(self, data: str) -> None:
        assert not self.is_done
        assert not self.errors, "something follows the end"
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.errors.append(event["error"])
        else:
            self.token_ids += event["choices"][0]["token_ids"]


@contextmanager
def streaming(url: str, request: Json) -> Iterator[Streamed]:
    """Streams a completion; leaving the block before its end disconnects."""
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**request, "stream": True}, timeout=TIMEOUT_S, trust_env=False
    ) as response:
        assert response.status_code == 200, response.read()
        # Held here too: httpx closes the response once nobody has its lines any more.
        answer = Streamed(response.iter_lines(), response.headers["x-request-id"])
        yield answer


@contextmanager
def asking(url: str, request: Json) -> Iterator[None]:
    """Sends a request and does not read the answer; leaving the block disconnects."""
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
    try:
        yield
    finally:
        connection.close()


class NatsClient:
    """A client of the request API on NATS."""

    def __init__(self, connection: Client) -> None:
        self.connection = connection

    async def send(self, request: Json | bytes) -> Subscription:
        """Sends a request; its answer comes in the subscription."""
        inbox = self.connection.new_inbox()
        subscription = await self.connection.subscribe(inbox)
        payload = request if isinstance(request, bytes) else json.dumps(request).encode()
        await self.connection.publish("pdserve.v1.generate", payload, reply=inbox)
        return subscription

    async def answer(self, request: Json | bytes) -> list[Json]:
        """All messages of the answer, which are checked to be one unbroken series with one end."""
        subscription = await self.send(request)
        messages = [await next_message(subscription)]
        while messages[-1]["type"] == "chunk":
            messages.append(await next_message(subscription))
        await self.connection.flush()
        assert subscription.pending_msgs == 0, "something follows the terminal message"
        assert [message["index"] for message in messages] == list(range(len(messages)))
        assert len({message["id"] for message in messages}) == 1
        await subscription.unsubscribe()
        return messages


@asynccontextmanager
async def nats_client(url: str) -> AsyncIterator[NatsClient]:
    address = credentials(url)
    connection = await nats.connect(
        address.url, user=address.user, password=address.password, inbox_prefix=inbox_prefix(address.user)
    )
    try:
        yield NatsClient(connection)
    finally:
        await connection.close()


async def next_message(subscription: Subscription) -> Json:
    message: Json = json.loads((await subscription.next_msg(timeout=TIMEOUT_S)).data)
    return message
