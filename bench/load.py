"""Requests for a running system, as a client of its NATS API sends them: in a closed loop, or as a trace says."""

import asyncio
import csv
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import nats
from nats.aio.client import Client

from shared.addresses import credentials
from shared.bus.connection import inbox_prefix

GENERATE = "pdserve.v1.generate"
VOCABULARY = 4000
"""Token ids of prompts are below this."""
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Item:
    """A request of a trace: when (seconds after its first), and how many tokens in and out."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def read_trace(path: str | Path, length_factor: float, *, longest: int, limit: int | None = None) -> list[Item]:
    """A trace with the columns TIMESTAMP, ContextTokens and GeneratedTokens (Azure's LLM inference traces).

    Args:
        length_factor: both lengths are multiplied by it.
        longest: prompts and answers are cut so that both together have at most so many tokens.
        limit: how many requests to read.
    """
    items: list[Item] = []
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            outputs = max(1, min(round(int(row["GeneratedTokens"]) * length_factor), longest // 2))
            prompt = max(1, min(round(int(row["ContextTokens"]) * length_factor), longest - outputs))
            items.append(Item(at, prompt, outputs))
            if limit is not None and len(items) == limit:
                break
    first = items[0].at_s
    return [Item(one.at_s - first, one.num_prompt_tokens, one.num_output_tokens) for one in items]


def at_rate(items: Sequence[Item], per_s: float, seconds: float) -> list[Item]:
    """The beginning of a trace, at the speed that gives so many requests per second for so long."""
    part = items[: round(per_s * seconds)]
    slower = (len(part) - 1) / part[-1].at_s / per_s
    return [replace(one, at_s=one.at_s * slower) for one in part]


@dataclass(slots=True)
class Outcome:
    """What became of a request; times are monotonic seconds."""

    item: Item
    sent_at: float
    scenario: str | None = None
    first_token_at: float | None = None
    done_at: float | None = None
    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    token_at: list[float] = field(default_factory=list)
    """When each token came."""
    cached_tokens: int = 0
    error: str | None = None
    """The code of the terminal error, or what went wrong with the answer."""

    @property
    def ttft_s(self) -> float:
        return float("inf") if self.first_token_at is None else self.first_token_at - self.sent_at


@dataclass(slots=True)
class LoadClient:
    """Sends requests on one connection, and keeps what became of them."""

    connection: Client
    seed: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def send(
        self, item: Item, *, scenario: str | None = None, prefix: Sequence[int] = (), **fields: object
    ) -> Outcome:
        """One request, to its terminal message. Its prompt begins with `prefix`, and is random behind it."""
        outcome = Outcome(item, time.monotonic(), scenario)
        self.outcomes.append(outcome)
        rest = max(1, item.num_prompt_tokens - len(prefix))
        prompt = [*prefix, *(self._random.randrange(10, VOCABULARY) for _ in range(rest))]
        request = {
            "prompt_token_ids": prompt,
            "max_tokens": item.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **({"scenario": scenario} if scenario else {}),
            **fields,
        }
        inbox = self.connection.new_inbox()
        answer = await self.connection.subscribe(inbox)
        try:
            await self.connection.publish(GENERATE, json.dumps(request).encode(), reply=inbox)
            async with asyncio.timeout(PATIENCE_S):
                async for message in answer.messages:
                    if self._take(json.loads(message.data), outcome):
                        break
        except TimeoutError:
            outcome.error = f"no terminal message within {PATIENCE_S:g} s"
        finally:
            await answer.unsubscribe()
        return outcome

    def _take(self, event: dict[str, object], outcome: Outcome) -> bool:
        """Whether it is the terminal message."""
        now = time.monotonic()
        if event["type"] == "chunk":
            outcome.first_token_at = outcome.first_token_at or now
            token_ids = event["token_ids"]
            assert isinstance(token_ids, list)
            outcome.num_tokens += len(token_ids)
            outcome.token_ids += token_ids
            outcome.token_at += [now] * len(token_ids)
            return False
        outcome.done_at = now
        if event["type"] == "error":
            error = event["error"]
            assert isinstance(error, dict)
            outcome.error = f"{error['code']}: {error['message']}"
        elif outcome.num_tokens != outcome.item.num_output_tokens:
            outcome.error = f"{outcome.num_tokens} tokens where {outcome.item.num_output_tokens} are due"
        else:
            usage = event["usage"]
            assert isinstance(usage, dict)
            outcome.cached_tokens = usage["cached_tokens"]
        return True

    async def closed_loop(
        self, items: Iterator[Item], num_clients: int, until: Callable[[], bool], **fields: object
    ) -> None:
        """So many clients, each with one request at a time, until it is so and all have their last answer."""

        async def client() -> None:
            while not until():
                await self.send(next(items), **fields)  # type: ignore[arg-type]

        await asyncio.gather(*(client() for _ in range(num_clients)))

    async def open_loop(self, items: Sequence[Item], **fields: object) -> None:
        """Requests at their times, whatever becomes of those before."""
        started_at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for item in items:
                await asyncio.sleep(max(0.0, started_at + item.at_s - time.monotonic()))
                tasks.create_task(self.send(item, **fields))  # type: ignore[arg-type]


@asynccontextmanager
async def load_client(nats_url: str, seed: int = 0) -> AsyncIterator[LoadClient]:
    """A client of the system that serves on this bus."""
    address = credentials(nats_url)
    connection = await nats.connect(
        address.url,
        user=address.user,
        password=address.password,
        inbox_prefix=inbox_prefix(address.user),
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.2,  # type: ignore[arg-type]
    )
    try:
        yield LoadClient(connection, seed)
    finally:
        await connection.close()


def throughput(outcomes: Sequence[Outcome], first_s: float, last_s: float) -> float:
    """Requests done per second between two moments (monotonic seconds)."""
    done = [one for one in outcomes if one.error is None and one.done_at and first_s <= one.done_at < last_s]
    return len(done) / (last_s - first_s)
