"""How a request names its scenario and its priority: by header, or by a field of the body, which wins."""

from collections.abc import Mapping

import httpx
import pytest

from tests.gateway.openai.conftest import MODEL
from tests.gateway.openai.fake_core import FakeCore

PATHS = ["/v1/chat/completions", "/v1/completions"]
BODIES: Mapping[str, Mapping[str, object]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": MODEL, "prompt": "Hi"},
}
LONG = "x" * 65


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("headers", "fields", "scenario", "priority"),
    [
        ({}, {}, None, "interactive"),
        ({"X-Scenario": "chat-2_B"}, {}, "chat-2_B", "interactive"),
        ({"x-priority": "batch"}, {}, None, "batch"),
        ({}, {"scenario": "search", "priority": "batch"}, "search", "batch"),
        ({"X-Scenario": "chat", "X-Priority": "batch"}, {"scenario": "search"}, "search", "batch"),
        ({"X-Scenario": "chat", "X-Priority": "batch"}, {"priority": "interactive"}, "chat", "interactive"),
        ({"X-Scenario": "chat"}, {"scenario": None}, None, "interactive"),
        ({"X-Scenario": "a b", "X-Priority": "soon"}, {"scenario": "chat", "priority": "batch"}, "chat", "batch"),
        ({}, {"scenario": None, "priority": None}, None, "interactive"),
    ],
)
async def test_the_core_is_told_and_the_body_wins(
    http: httpx.AsyncClient,
    core: FakeCore,
    path: str,
    headers: dict[str, str],
    fields: dict[str, object],
    scenario: str | None,
    priority: str,
) -> None:
    response = await http.post(path, json={**BODIES[path], **fields, "n": 2}, headers=headers)
    assert response.status_code == 200, response.text
    assert [(call.request.scenario, call.request.is_batch) for call in core.calls] == [
        (scenario, priority == "batch")
    ] * 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("headers", "fields", "param", "says"),
    [
        ({}, {"scenario": "a b"}, "scenario", "pattern"),
        ({}, {"scenario": ""}, "scenario", "at least 1 character"),
        ({}, {"scenario": LONG}, "scenario", "at most 64 characters"),
        ({}, {"scenario": 3}, "scenario", "valid string"),
        ({}, {"priority": "urgent"}, "priority", "'interactive' or 'batch', but it is 'urgent'"),
        ({}, {"priority": 1}, "priority", "'interactive' or 'batch'"),
        ({"X-Scenario": "chat/2"}, {}, "scenario", "but it is 'chat/2'"),
        ({"X-Scenario": ""}, {}, "scenario", "at least 1 character"),
        ({"X-Scenario": LONG}, {}, "scenario", "at most 64 characters"),
        ({"X-Priority": "Batch"}, {}, "priority", "'interactive' or 'batch', but it is 'Batch'"),
        ({"X-Scenario": "chat"}, {"scenario": "a b"}, "scenario", "but it is 'a b'"),
    ],
)
async def test_a_bad_one_is_rejected_by_name(
    http: httpx.AsyncClient,
    core: FakeCore,
    path: str,
    headers: dict[str, str],
    fields: dict[str, object],
    param: str,
    says: str,
) -> None:
    response = await http.post(path, json={**BODIES[path], **fields}, headers=headers)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", param)
    assert says in error["message"]
    assert core.calls == []
