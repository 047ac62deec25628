import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from openai import AsyncOpenAI

from services.gateway.api import ApiContext
from services.gateway.openai.app import http_server_config
from services.gateway.openai.idempotency import IdempotencyIndex, idempotent_answers
from shared.settings import GatewaySettings
from shared.telemetry.gateway_metrics import GatewayMetrics
from shared.text.tokenizer import Tokenizer
from tests.gateway.openai.fake_core import FakeCore
from tests.harness import eventually

DEMO = Path(__file__).parents[3] / "models" / "demo"
MODEL = "demo"


@asynccontextmanager
async def serving(api: ApiContext, index: IdempotencyIndex | None = None, **settings: object) -> AsyncIterator[int]:
    """The API on the gateway's own server; gives its port."""
    values = {"http_port": 0, "drain_timeout_s": 1.0, **settings}
    async with idempotent_answers(300.0, index) as answers:
        server = uvicorn.Server(http_server_config(api, GatewaySettings(**values), answers))  # type: ignore[arg-type]
        task = asyncio.create_task(server.serve())
        await eventually(lambda: server.started)
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            await task


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def api(core: FakeCore, tokenizer: Tokenizer) -> ApiContext:
    return ApiContext(core=core, tokenizer=tokenizer, served_model_name=MODEL, metrics=GatewayMetrics())


@pytest.fixture
async def port(api: ApiContext) -> AsyncIterator[int]:
    async with serving(api) as port:
        yield port


@pytest.fixture
async def client(port: int) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        yield client


@pytest.fixture
async def locked(api: ApiContext) -> AsyncIterator[int]:
    """The port of an API that wants a key."""
    async with serving(replace(api, api_keys=frozenset({"first key", "zweiter Schlüssel"}))) as port:
        yield port


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text that the fake core is to give."""
    return tokenizer._encode(text, add_special_tokens=False)
