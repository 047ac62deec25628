"""What `bench.engine` makes of its figures."""

import pytest

from bench.peers.campaign import Outcome
from bench.peers.catalog import OURS
from bench.peers.floor import Floor, Machine
from bench.peers.report import markdown

FLOOR = Floor(
    machine=Machine(bytes_per_s=1e11, flops_per_s=1e12),
    layers=80_000_000,
    last_layer=10_000_000,
    head=20_000_000,
    element_bytes=2,
    kv_bytes=1000,
)


def test_the_floor_of_prefill_is_its_multiplications() -> None:
    """Of the last layer and the head only one row per request."""
    assert FLOOR.prefill_ms(1, 1000) == pytest.approx(1000 * 2 * (70e6 * 1000 + 30e6) / 1e12)
    assert FLOOR.prefill_ms(8, 1000) == pytest.approx(8 * FLOOR.prefill_ms(1, 1000))


def test_the_floor_of_decode_is_what_it_reads_or_multiplies() -> None:
    assert FLOOR.decode_tok_s(1, 1000) == pytest.approx(1e11 / (100e6 * 2 + 1000 * 1000))
    assert FLOOR.decode_tok_s(2000, 10) == pytest.approx(1e12 / (2 * 100e6))


def test_tables_say_which_part_of_the_machine_we_use() -> None:
    floor_ms, floor_tok_s = FLOOR.prefill_ms(1, 1000), FLOOR.decode_tok_s(1, 1000)
    run = {"round": 1, "requests": 1, "context": 1000, "scaling": False, "busy": 1.0, "tokens": 5}
    ours = {**run, "engine": OURS.name, "prefill_ms": 2 * floor_ms, "decode_tok_s": floor_tok_s / 2}
    theirs = {**run, "engine": "vLLM", "prefill_ms": 6 * floor_ms, "decode_tok_s": floor_tok_s / 8}
    facts = {"version": "1", "load_s": 1.0, "rss_mb": 1.0, "peak_mb": 1.0, "same_tokens": 1.0}
    outcome = Outcome("bfloat16", FLOOR, {OURS.name: facts, "vLLM": facts}, [ours, theirs])
    said = markdown(outcome, "wall")
    assert f"| {2 * floor_ms:.0f} | {6 * floor_ms:.0f} (3.00x) | {floor_ms:.0f} (50%) |" in said
    assert f"| {floor_tok_s / 2:.0f} | {floor_tok_s / 8:.0f} (4.00x) | {floor_tok_s:.0f} (50%) |" in said
    whole = 2 * floor_ms + 2 * 4000 / floor_tok_s
    assert f"| {whole:.0f} | {6 * floor_ms + 8 * 4000 / floor_tok_s:.0f} (" in said
    assert f" | {floor_ms + 4000 / floor_tok_s:.0f} (50%) |" in said
    without = markdown(Outcome("bfloat16", None, {OURS.name: facts}, [ours]), "wall")
    assert "| requests | context | pdserve |\n" in without
