"""What a client hears whose request outlasts its gateway: that, and not only a connection that closes."""

import asyncio

import httpx
import pytest

from services.gateway.api import ApiContext
from tests.gateway.openai.conftest import serving
from tests.gateway.openai.fake_core import FakeCore
from tests.harness import eventually


@pytest.mark.parametrize("stream", [True, False])
async def test_it_is_told_that_the_gateway_ends(api: ApiContext, core: FakeCore, stream: bool) -> None:
    core.script = lambda call: [10, 11, asyncio.Event(), 12]
    body = {"model": "demo", "prompt": "x", "max_tokens": 9, "stream": stream}
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        async with serving(api) as port:
            asking = asyncio.create_task(client.post(f"http://127.0.0.1:{port}/v1/completions", json=body))
            await eventually(lambda: core.calls and core.calls[0].num_given == 2)
        answer = await asking
    assert core.calls[0].is_closed
    assert "This gateway is ending" in answer.text
    assert answer.status_code == (200 if stream else 503)
    if not stream:
        assert answer.headers["retry-after"] == "1"
