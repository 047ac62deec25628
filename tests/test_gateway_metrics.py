"""Metrics: their values, and that nothing that clients name makes them grow without bound."""

import asyncio
import time

from shared.telemetry.gateway_metrics import (
    MAX_REASON_LABELS,
    MAX_SCENARIO_LABELS,
    ChoiceTimer,
    GatewayMetrics,
    TrafficCounts,
)
from tests.gateway.scripted import expected, fleet
from tests.harness import eventually

PROMPT = [3, 1, 4, 1, 5]


def lines_of(metrics: GatewayMetrics) -> list[str]:
    return metrics.render().decode().splitlines()


def test_a_choice_is_timed_from_its_arrival() -> None:
    metrics = GatewayMetrics()
    timer = ChoiceTimer(metrics, "chat", 100.0)
    for now in (100.3, 100.32, 100.4, 106.4):
        timer.token(now)
    timer.end()
    lines = lines_of(metrics)
    assert 'pdserve_ttft_seconds_bucket{endpoint="chat",le="0.25"} 0.0' in lines
    assert 'pdserve_ttft_seconds_bucket{endpoint="chat",le="0.5"} 1.0' in lines
    for bound, count in [("0.015", 0), ("0.03", 1), ("0.1", 2), ("5.0", 2), ("+Inf", 3)]:
        assert f'pdserve_itl_seconds_bucket{{endpoint="chat",le="{bound}"}} {count}.0' in lines
    assert 'pdserve_itl_seconds_count{endpoint="chat"} 3.0' in lines
    assert 'pdserve_e2e_seconds_count{endpoint="chat"} 1.0' in lines
    assert 'pdserve_tpot_seconds_count{endpoint="chat"} 1.0' in lines
    assert "pdserve_generated_tokens_total 4.0" in lines


def test_labels_are_bounded() -> None:
    metrics = GatewayMetrics()
    for number in range(1000):
        metrics.count_cached(f"scenario-{number}", 10, 1)
        metrics.count_failed_attempt(f"reason {number}")
    lines = lines_of(metrics)
    hits = [line for line in lines if line.startswith("pdserve_prefix_cache_hit_tokens_total{")]
    assert len(hits) == MAX_SCENARIO_LABELS + 1
    assert f'pdserve_prefix_cache_hit_tokens_total{{scenario="other"}} {1000 - MAX_SCENARIO_LABELS}.0' in hits
    reasons = [line for line in lines if line.startswith("pdserve_failed_attempts_total{")]
    assert len(reasons) == MAX_REASON_LABELS + 1


def test_repairs_are_counted() -> None:
    metrics = GatewayMetrics()
    metrics.count_retry()
    metrics.count_lost_instance()
    metrics.count_hedged_ask()
    metrics.count_pause()
    metrics.count_failed_attempt("no answer")
    lines = lines_of(metrics)
    for name in ("retries", "lost_instances", "hedged_asks", "instance_pauses"):
        assert f"pdserve_{name}_total 1.0" in lines
    assert 'pdserve_failed_attempts_total{reason="no answer"} 1.0' in lines


async def test_a_second_instance_asked_is_counted(nats_url: str) -> None:
    async with fleet(nats_url, answer_timeout_s=30.0) as one:
        silent = await one.add("p1", "prefill", None)
        await one.add("d", "decode")
        asking = asyncio.create_task(one.generate(PROMPT))
        await eventually(lambda: silent.requests)
        await one.add("p2", "prefill")
        assert await asking == expected(PROMPT, 8)
        lines = lines_of(one.metrics)
    assert "pdserve_hedged_asks_total 1.0" in lines
    assert "pdserve_instance_pauses_total 0.0" in lines


async def test_an_instance_that_does_not_answer_is_not_asked_for_a_while(nats_url: str) -> None:
    async with fleet(nats_url) as one:
        await one.add("p1", "prefill", None)
        await one.add("d", "decode")
        assert await one.generate(PROMPT) == expected(PROMPT, 8)
        lines = lines_of(one.metrics)
    assert "pdserve_instance_pauses_total 1.0" in lines
    assert "pdserve_hedged_asks_total 0.0" in lines


def test_traffic_adds_up() -> None:
    counts = TrafficCounts(num_arrived=3)
    now = time.monotonic()
    counts.first_token(now - 2.0, 1.0)
    counts.first_token(now - 0.5, 1.0)
    counts.first_token(now - 9.0, None)
    counts.done(now - 4.0, 10, 20)
    traffic = counts.snapshot(1, 2)
    assert (traffic.num_first_tokens, traffic.num_in_time, traffic.num_done) == (3, 2, 1)
    assert (traffic.prompt_tokens, traffic.output_tokens) == (10, 20)
    assert 11.5 <= traffic.ttft_s < 30
    assert 4.0 <= traffic.e2e_s < 30
    assert (traffic.waiting_prefill, traffic.waiting_decode, traffic.num_arrived) == (1, 2, 3)
