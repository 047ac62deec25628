"""What an engine says it has done, with a clock that the test turns."""

from types import SimpleNamespace

import pytest

from shared.engine.sampling.sampler import Choice
from shared.engine.scheduler import PrefillChunk, StepPlan
from shared.engine.sequence import Sequence
from shared.engine.work import WorkDone
from shared.messages.records import Work
from shared.sampling import SamplingParams

from .models import Served, prompt_of, run, sequence_of


def sequence_with(num_tokens: int, num_computed_tokens: int = 0) -> Sequence:
    return Sequence(
        "r", [0] * num_tokens, 1, [], SamplingParams(max_tokens=99), 99, num_computed_tokens=num_computed_tokens
    )


def decodes(num_rows: int) -> list[Sequence]:
    return [sequence_with(5, 4)] * num_rows


def test_nothing_is_done_at_first() -> None:
    assert WorkDone().snapshot() == Work()


def test_steps_of_decodes_give_all_sums_that_a_line_through_them_needs() -> None:
    work = WorkDone()
    seconds = {1: 0.23, 4: 0.32, 10: 0.50}
    for num_rows, step_s in seconds.items():
        work.add(StepPlan(decodes(num_rows), []), step_s)
    done = work.snapshot()
    assert (done.decode_steps, done.decode_rows, done.decode_rows_squared) == (3, 15, 117)
    assert (done.prefill_tokens, done.prefill_s, done.num_prefilled) == (0, 0.0, 0)
    spread = done.decode_steps * done.decode_rows_squared - done.decode_rows**2
    row_s = (done.decode_steps * done.decode_rows_s - done.decode_rows * done.decode_s) / spread
    base_s = (done.decode_s - row_s * done.decode_rows) / done.decode_steps
    assert (base_s, row_s) == (pytest.approx(0.2), pytest.approx(0.03))


def test_a_step_with_prefill_counts_as_prefill_alone() -> None:
    work = WorkDone()
    chunks = [PrefillChunk(sequence_with(30, 10), 20), PrefillChunk(sequence_with(30), 7)]
    work.add(StepPlan(decodes(3), chunks), 0.5)
    assert work.snapshot() == Work(
        prefill_tokens=27,
        prefill_pairs=(30 * 31 - 10 * 11) // 2 + 28,
        prefill_s=0.5,
        num_prefilled=1,
        rows_beside_prefill=3,
    )


def test_what_a_snapshot_says_stays() -> None:
    work = WorkDone()
    before = work.snapshot()
    work.add(StepPlan(decodes(2), []), 1.0)
    assert before == Work()
    assert work.snapshot().decode_rows == 2


def test_an_engine_counts_its_steps(llama_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 40 tokens and one of 20, in chunks of 32; then the first two, then one of them alone."""
    ticks = iter(range(1000))
    monkeypatch.setattr("shared.engine.engine.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    engine = llama_served.engine(max_step_tokens=32)
    for request_id, length, max_tokens, first_block in (("a", 40, 3, 0), ("b", 20, 5, 10)):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        engine.add(sequence_of(engine, prompt_of(length), sampling, request_id=request_id, first_block=first_block))
    assert {name: len(tokens) for name, tokens in run(engine).items()} == {"a": 3, "b": 5}
    assert engine.work.snapshot() == Work(
        prefill_tokens=60,
        prefill_pairs=40 * 41 // 2 + 20 * 21 // 2,
        prefill_s=2.0,
        num_prefilled=2,
        decode_steps=4,
        decode_s=4.0,
        decode_rows=6,
        decode_rows_squared=10,
        decode_rows_s=6.0,
    )


def test_a_step_that_fails_is_not_counted(llama_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(20), SamplingParams(max_tokens=3)))

    def fail(plan: StepPlan) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(engine, "_compute", fail)
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.work.snapshot() == Work()


def test_how_long_the_step_under_way_has_been(llama_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama_served.engine()
    engine.add(sequence_of(engine, prompt_of(20), SamplingParams(max_tokens=3)))
    assert engine.in_step_s() == 0.0
    compute, seen = engine._compute, []

    def look_and_compute(plan: StepPlan) -> list[tuple[Sequence, Choice]]:
        seen.append(engine.in_step_s())
        return compute(plan)

    monkeypatch.setattr(engine, "_compute", look_and_compute)
    engine.step()
    assert seen[0] > 0.0
    assert engine.in_step_s() == 0.0
