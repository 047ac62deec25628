"""One request is one trace across gateway, prefill and decode, sent by OTLP to a real receiver."""

from collections.abc import Callable

import httpx
import pytest

from tests.harness import System, wait_until
from tests.system.otlp import Span, receiving

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
NAMES = {"POST /v1/chat/completions", "wait_prefill", "prefill", "wait_decode", "decode", "kv_transfer"}


def test_one_trace_across_all_processes(start_system: Callable[..., System], monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        system = start_system()
        answer = httpx.post(
            f"{system.url}/v1/chat/completions",
            json={
                "model": "demo",
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 5,
                "ignore_eos": True,
            },
            headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"},
            timeout=60,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        wait_until(lambda: {span.name for span in receiver.spans} >= NAMES)
        check({span.name: span for span in receiver.spans}, usage)
        assert len(receiver.spans) == len(NAMES)


def check(spans: dict[str, Span], usage: dict[str, int]) -> None:
    assert {span.trace_id for span in spans.values()} == {TRACE_ID}
    root = spans["POST /v1/chat/completions"]
    assert root.parent_id == PARENT_ID
    for name in ("wait_prefill", "prefill", "wait_decode", "decode"):
        assert spans[name].parent_id == root.span_id, name
    assert spans["kv_transfer"].parent_id == spans["decode"].span_id
    services = {name: span.service for name, span in spans.items()}
    assert services == {
        root.name: "pdserve-gateway",
        "wait_prefill": "pdserve-gateway",
        "wait_decode": "pdserve-gateway",
        "prefill": "pdserve-instance",
        "decode": "pdserve-instance",
        "kv_transfer": "pdserve-instance",
    }
    for role in ("prefill", "decode"):
        instance = spans[role].attributes["pdserve.instance.id"]
        assert str(instance).startswith("instance-")
        assert spans[f"wait_{role}"].attributes["pdserve.instance.id"] == instance
        assert spans[role].attributes["pdserve.num_prompt_tokens"] == usage["prompt_tokens"]
    assert spans["decode"].attributes["pdserve.num_output_tokens"] == usage["completion_tokens"] == 5
    assert root.attributes["pdserve.num_output_tokens"] == 5
    assert spans["kv_transfer"].attributes["pdserve.kv_bytes"] == spans["prefill"].attributes["pdserve.kv_bytes"]
